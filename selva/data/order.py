"""Order in which batches visit the clips of a set, and what of a clip each visit uses.

    BucketBatchSampler  draw() -> windows of clips of equal length -> load() -> one batch
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from selva.data.dataset import Batch, ClipDataset, Lengths, ListDataset, TrainingClip, collate
from selva.data.mixture import seed_of
from selva.utils.errors import UserError
from selva.utils.text import counted


class ShuffledIndices:
    """Endless stream of indices from shuffled epochs: every item once per epoch.

    The order depends on ``seed`` alone, not on the global random state, and continues exactly after
    :meth:`load_state_dict`.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        if num_items < 1:
            raise UserError(f"cannot draw from {counted(num_items, 'item')}, expected at least 1")
        self.num_items = num_items
        self._rng = torch.Generator().manual_seed(seed)
        self._remaining: deque[int] = deque()  # of the current epoch

    def __iter__(self) -> ShuffledIndices:
        return self

    def __next__(self) -> int:
        if not self._remaining:
            self._remaining = deque(torch.randperm(self.num_items, generator=self._rng).tolist())
        return self._remaining.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and tensors, from which :meth:`load_state_dict` continues with the next index."""
        return {"num_items": self.num_items, "remaining": list(self._remaining), "generator": self._rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the state belongs to another number of items.
        """
        if state["num_items"] != self.num_items:
            raise UserError(f"the stored order is over {counted(state['num_items'], 'item')}, now {self.num_items}")
        self._remaining = deque(state["remaining"])
        self._rng.set_state(state["generator"].to("cpu", torch.uint8))


class ClipWindow(NamedTuple):
    """One use of a clip: its number in the set, that of the window in the clip, and that of the prompt."""

    index: int
    window: int
    prompt: int = 0


def read_window(clips: ClipDataset, use: ClipWindow) -> TrainingClip:
    """Return the window of a clip with the prompt of this use."""
    clip = clips.clip(use.index, use.window)
    if not use.prompt:
        return clip
    prompt, text_f = clips.prompt(use.index, use.prompt)
    return replace(clip, prompt=prompt, text_f=text_f)


class BucketBatchSampler:
    """Endless batches of clips of equal length; every epoch visits each clip once, in a seeded order.

    Clips are drawn one by one from shuffled epochs, a window of a long clip and one of several prompts at random, and
    wait in the bucket of their length until a batch is full. A batch holds no clip twice, unless fewer clips of its
    length exist than it has places: then it is filled over several epochs, with new noise for every visit.

    Drawing and loading are apart, so that several processes can agree on the same windows and load a part of them each.
    """

    def __init__(self, clips: ClipDataset | Sequence[TrainingClip], batch_size: int, seed: int) -> None:
        self.clips = clips if isinstance(clips, ClipDataset) else ListDataset(clips)
        self.batch_size, self.seed = batch_size, seed
        self.num_drawn = 0  # clips, which names the draw of a prompt
        self.sampler = ShuffledIndices(len(self.clips), seed)
        self.window_rng = torch.Generator().manual_seed(seed)
        self.waiting: dict[Lengths, list[ClipWindow]] = {}
        self.num_clips = Counter(self.clips.lengths(i) for i in range(len(self.clips)))
        self._next: list[ClipWindow] | None = None  # drawn already, to be read ahead

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.load(self.draw())

    def draw(self) -> list[ClipWindow]:
        """Return the ``batch_size`` windows of the next batch; reads nothing."""
        windows, self._next = self.peek(), None
        return windows

    def peek(self) -> list[ClipWindow]:
        """Return the windows of the next :meth:`draw`."""
        while self._next is None:
            index = next(self.sampler)
            lengths = self.clips.lengths(index)
            bucket = self.waiting.setdefault(lengths, [])
            bucket.append(ClipWindow(index, self._draw_window(index), self._draw_prompt(index)))
            self.num_drawn += 1
            batch = self._first_batch(bucket, distinct=self.num_clips[lengths] >= self.batch_size)
            if batch:
                self.waiting[lengths] = [window for i, window in enumerate(bucket) if i not in batch]
                self._next = [bucket[i] for i in batch]
        return self._next

    def load(self, windows: Sequence[ClipWindow]) -> Batch:
        """Return the batch of these windows, or of some of them."""
        return collate([read_window(self.clips, window) for window in windows])

    def _draw_window(self, index: int) -> int:
        count = self.clips.num_windows(index)
        return int(torch.randint(count, (), generator=self.window_rng)) if count > 1 else 0

    def _draw_prompt(self, index: int) -> int:
        """Return the number of a prompt, by the seed, the draw and the clip alone; nothing else is drawn otherwise."""
        count = self.clips.num_prompts(index)
        return seed_of("prompt", self.seed, self.num_drawn, index) % count if count > 1 else 0

    def _first_batch(self, bucket: Sequence[ClipWindow], distinct: bool) -> list[int]:
        """Return the positions of the first full batch in a bucket, none if there is none yet."""
        places: dict[int, int] = {}
        for place, window in enumerate(bucket):
            places.setdefault(window.index if distinct else place, place)
        return list(places.values())[: self.batch_size] if len(places) >= self.batch_size else []

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and tensors from which :meth:`load_state_dict` continues exactly."""
        return {
            **({} if self._next is None else {"next": [list(window) for window in self._next]}),
            "ids": _fingerprint(self.clips.ids),
            "sampler": self.sampler.state_dict(),
            "drawn": self.num_drawn,
            "windows": self.window_rng.get_state(),
            "waiting": [[list(window) for window in bucket] for bucket in self.waiting.values() if bucket],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the state is over other clips: another number, other names, or other lengths.
        """
        self.sampler.load_state_dict(state["sampler"])
        waiting = [[ClipWindow(*window) for window in bucket] for bucket in state["waiting"]]
        following = [ClipWindow(*window) for window in state.get("next", [])]
        buckets = [*waiting, following] if following else waiting
        if state["ids"] != _fingerprint(self.clips.ids) or not all(self._fits(bucket) for bucket in buckets):
            raise UserError(
                f"the stored order is over other clips than the {len(self.clips)} there are now; "
                "give the same data as before, or start a new run"
            )
        self.waiting = {self.clips.lengths(bucket[0].index): bucket for bucket in waiting}
        self._next = following or None
        self.num_drawn = state.get("drawn", 0)  # an earlier version drew no prompts
        self.window_rng.set_state(state["windows"].to("cpu", torch.uint8))

    def _fits(self, bucket: Sequence[ClipWindow]) -> bool:
        """Return True where the windows of a stored bucket exist and are of one length."""
        lengths = {self.clips.lengths(use.index) for use in bucket}
        return len(lengths) == 1 and all(
            use.window < self.clips.num_windows(use.index) and use.prompt < self.clips.num_prompts(use.index)
            for use in bucket)


def _fingerprint(ids: Sequence[str]) -> int:
    return zlib.crc32("\n".join(ids).encode())
