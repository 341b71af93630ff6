"""Training clips, read on demand, and the order in which batches visit them.

    ClipDataset  clip i, window w -> latents (N, C), CLIP (T, ·), sync (S, ·), text (77, ·)
    BucketBatchSampler  draw() -> windows of clips of equal length -> load() -> one batch

A set knows the lengths of its clips without reading them, and reads a clip only when it is asked for, so memory does
not grow with the number of clips. Clips keep their true length and are batched with clips of the same length: nothing
is ever padded in feature space (pitfall B1).
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selva.data.padding import Padding, join_paddings
from selva.sequence import SequenceConfig
from selva.utils.device import to_device
from selva.utils.errors import UserError
from selva.utils.graph import leaves, with_leaves

Lengths = tuple[int, int, int]  # (N, T, S): latent frames, CLIP frames, sync tokens


@dataclass(frozen=True)
class TrainingClip:
    """One clip, or one window of a long one, as the generator is trained on it; float32, on the CPU, no batch axis.

    Attributes:
        audio_path: the sound itself; None where only its latents are known.
        mean, std: (N, C) VAE posterior of the sound.
        clip_f: (T, clip_dim). sync_f: (S, sync_dim). text_f: (77, text_dim).
        has_video: False for sound without pictures. ``clip_f`` and ``sync_f`` are then NaN, to be replaced by the
            learned empty features; where that was forgotten, the loss is NaN at once.
        padding: (N,) of sound that is shorter than its features; None if it fills the clip.
    """

    id: str
    prompt: str
    audio_path: Path | None
    sequence: SequenceConfig
    mean: Tensor
    std: Tensor
    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor
    has_video: bool = True
    padding: Padding | None = None

    @property
    def lengths(self) -> Lengths:
        """(N, T, S), which all clips of a batch share."""
        return self.mean.shape[0], self.clip_f.shape[0], self.sync_f.shape[0]


@dataclass(frozen=True)
class Batch:
    """Clips of one length stacked.

    Attributes:
        mean, std: (B, N, C). clip_f: (B, T, clip_dim). sync_f: (B, S, sync_dim). text_f: (B, 77, text_dim).
        has_video: (B,) bool; where it is False, ``clip_f`` and ``sync_f`` are NaN, see :class:`TrainingClip`.
        padding: (B, N); None where no clip has any.
    """

    mean: Tensor
    std: Tensor
    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor
    has_video: Tensor
    ids: tuple[str, ...]
    padding: Padding | None = None

    @property
    def lengths(self) -> Lengths:
        return self.mean.shape[1], self.clip_f.shape[1], self.sync_f.shape[1]

    def to(self, device: torch.device) -> Batch:
        return with_leaves(self, (to_device(tensor, device) for tensor in leaves(self)))


def collate(clips: Sequence[TrainingClip]) -> Batch:
    """Return clips of equal lengths as one batch."""
    names = ("mean", "std", "clip_f", "sync_f", "text_f")
    mean, std, clip_f, sync_f, text_f = (torch.stack([getattr(clip, name) for clip in clips]) for name in names)
    has_video = torch.tensor([clip.has_video for clip in clips])
    padding = join_paddings([clip.padding for clip in clips], mean.shape[1])
    return Batch(mean, std, clip_f, sync_f, text_f, has_video, tuple(clip.id for clip in clips), padding)


# ---------------------------------------------------------------------------------------------------------------
# sets
# ---------------------------------------------------------------------------------------------------------------


class ClipDataset(ABC):
    """Clips by number, from 0. ``ids`` and lengths are at hand; everything else is read on demand."""

    @property
    @abstractmethod
    def ids(self) -> list[str]:
        """Names of the clips in messages and metrics."""

    @abstractmethod
    def lengths(self, index: int) -> Lengths:
        """Return (N, T, S) of every window of a clip, without reading it."""

    @abstractmethod
    def num_windows(self, index: int) -> int:
        """Return the number of windows of a clip; 1 unless it is longer than the longest allowed clip."""

    @abstractmethod
    def clip(self, index: int, window: int = 0) -> TrainingClip:
        """Return one window of a clip, read now.

        Raises:
            ValueError, FileNotFoundError: its files have changed or gone since the set was made.
        """

    def origins(self, index: int) -> tuple[str, ...]:
        """Return keys of the video and the sound of a clip; clips that share one of them are not independent."""
        return ()

    def content(self, index: int) -> dict[str, str]:
        """Return hashes of what is trained on, by the names of :data:`selva.data.content.ASPECTS`; {} if unknown."""
        return {}

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Iterable[int]) -> ClipDataset:
        """Return the clips of these numbers, in this order, as a set of their own."""
        return Subset(self, indices)


class Subset(ClipDataset):
    """Some clips of another set."""

    def __init__(self, base: ClipDataset, indices: Iterable[int]) -> None:
        self.base = base
        self.indices = indices if isinstance(indices, range) else list(indices)  # a range takes no memory
        self._ids: list[str] | None = None

    @property
    def ids(self) -> list[str]:
        if self._ids is None:
            ids = self.base.ids
            self._ids = [ids[i] for i in self.indices]
        return self._ids

    def __len__(self) -> int:
        return len(self.indices)

    def lengths(self, index: int) -> Lengths:
        return self.base.lengths(self.indices[index])

    def num_windows(self, index: int) -> int:
        return self.base.num_windows(self.indices[index])

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        return self.base.clip(self.indices[index], window)

    def origins(self, index: int) -> tuple[str, ...]:
        return self.base.origins(self.indices[index])

    def content(self, index: int) -> dict[str, str]:
        return self.base.content(self.indices[index])


class PrefixedDataset(Subset):
    """All clips of another set, with names that begin with its own."""

    def __init__(self, base: ClipDataset, prefix: str) -> None:
        super().__init__(base, range(len(base)))
        self._ids = [prefix + name for name in base.ids]

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        return replace(self.base.clip(index, window), id=self.ids[index])


class ListDataset(ClipDataset):
    """Clips that exist already, one window each."""

    def __init__(self, clips: Iterable[TrainingClip]) -> None:
        self.clips = list(clips)

    @property
    def ids(self) -> list[str]:
        return [clip.id for clip in self.clips]

    def __len__(self) -> int:
        return len(self.clips)

    def lengths(self, index: int) -> Lengths:
        return self.clips[index].lengths

    def num_windows(self, index: int) -> int:
        return 1

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        assert window == 0, window
        return self.clips[index]


class ConcatDataset(ClipDataset):
    """Two sets one after the other."""

    def __init__(self, first: ClipDataset, second: ClipDataset) -> None:
        self.first, self.second = first, second
        self._num_first, self._num_second = len(first), len(second)
        self._ids: list[str] | None = None

    @property
    def ids(self) -> list[str]:
        if self._ids is None:
            self._ids = [*self.first.ids, *self.second.ids]
        return self._ids

    def __len__(self) -> int:
        return self._num_first + self._num_second

    def lengths(self, index: int) -> Lengths:
        owner, own = self._find(index)
        return owner.lengths(own)

    def num_windows(self, index: int) -> int:
        owner, own = self._find(index)
        return owner.num_windows(own)

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        owner, own = self._find(index)
        return owner.clip(own, window)

    def origins(self, index: int) -> tuple[str, ...]:
        owner, own = self._find(index)
        return owner.origins(own)

    def content(self, index: int) -> dict[str, str]:
        owner, own = self._find(index)
        return owner.content(own)

    def _find(self, index: int) -> tuple[ClipDataset, int]:
        count = self._num_first
        return (self.first, index) if index < count else (self.second, index - count)


def split_validation(
    clips: ClipDataset, fraction: float, seed: int, *, by_origin: bool = True
) -> tuple[ClipDataset, ClipDataset]:
    """Return (training, held-out) clips; a seeded choice of at least one clip, or none if fewer than five are there.

    Clips of one origin (:meth:`ClipDataset.origins`: windows of one video, the same sound) stay together: what is held
    out would otherwise have been trained on. Where no origin is as small as the share to hold out, the smallest one is
    held out, unless that were more than half of the clips: then none is.

    Args:
        by_origin: False splits as version 0.1.0 did, clip by clip.
    """
    count = len(clips)
    if fraction <= 0 or count < 5:
        return clips, clips.subset([])
    wanted = min(count - 1, max(1, round(fraction * count)))
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if not by_origin:
        return clips.subset(sorted(order[wanted:])), clips.subset(sorted(order[:wanted]))
    groups: dict[int, list[int]] = {}  # in the order in which chance comes to them
    group_of = origin_groups(clips)
    for index in order:
        groups.setdefault(group_of[index], []).append(index)
    held_out: set[int] = set()
    for group in groups.values():
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    smallest = min(groups.values(), key=len)
    if not held_out and 2 * len(smallest) <= count:
        held_out.update(smallest)
    return clips.subset(i for i in range(count) if i not in held_out), clips.subset(sorted(held_out))


def origin_groups(clips: ClipDataset) -> list[int]:
    """Return a number for every clip, which those have in common that share an origin, directly or through others."""
    parent = list(range(len(clips)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]  # halves the way for the next time
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index in range(len(clips)):
        for origin in clips.origins(index):
            parent[root(index)] = root(first_with.setdefault(origin, index))
    return [root(index) for index in range(len(clips))]


# ---------------------------------------------------------------------------------------------------------------
# order
# ---------------------------------------------------------------------------------------------------------------


class ShuffledIndices:
    """Endless stream of indices from shuffled epochs: every item once per epoch.

    The order depends on ``seed`` alone, not on the global random state, and continues exactly after
    :meth:`load_state_dict`.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        if num_items < 1:
            raise UserError(f"cannot draw from {num_items} items, expected at least 1")
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
            raise UserError(f"the stored order is over {state['num_items']} items, but there are {self.num_items} now")
        self._remaining = deque(state["remaining"])
        self._rng.set_state(state["generator"].to("cpu", torch.uint8))


class ClipWindow(NamedTuple):
    """One window of a clip: the number of the clip in the set, and that of the window in the clip."""

    index: int
    window: int


class BucketBatchSampler:
    """Endless batches of clips of equal length; every epoch visits each clip once, in a seeded order.

    Clips are drawn one by one from shuffled epochs, a window of a long clip at random, and wait in the bucket of their
    length until a batch is full. A batch holds no clip twice, unless fewer clips of its length exist than it has
    places: then it is filled over several epochs, with new noise for every visit.

    Drawing and loading are apart, so that several processes can agree on the same windows and load a part of them each.
    """

    def __init__(self, clips: ClipDataset | Sequence[TrainingClip], batch_size: int, seed: int) -> None:
        self.clips = clips if isinstance(clips, ClipDataset) else ListDataset(clips)
        self.batch_size = batch_size
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
            bucket.append(ClipWindow(index, self._draw_window(index)))
            batch = self._first_batch(bucket, distinct=self.num_clips[lengths] >= self.batch_size)
            if batch:
                self.waiting[lengths] = [window for i, window in enumerate(bucket) if i not in batch]
                self._next = [bucket[i] for i in batch]
        return self._next

    def load(self, windows: Sequence[ClipWindow]) -> Batch:
        """Return the batch of these windows, or of some of them."""
        return collate([self.clips.clip(*window) for window in windows])

    def _draw_window(self, index: int) -> int:
        count = self.clips.num_windows(index)
        return int(torch.randint(count, (), generator=self.window_rng)) if count > 1 else 0

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
        self.window_rng.set_state(state["windows"].to("cpu", torch.uint8))

    def _fits(self, bucket: Sequence[ClipWindow]) -> bool:
        """Return True where the windows of a stored bucket exist and are of one length."""
        lengths = {self.clips.lengths(index) for index, _ in bucket}
        return len(lengths) == 1 and all(window < self.clips.num_windows(index) for index, window in bucket)


def _fingerprint(ids: Sequence[str]) -> int:
    return zlib.crc32("\n".join(ids).encode())
