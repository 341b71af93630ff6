"""Training clips, read on demand, and sets of them.

    ClipDataset  clip i, window w -> latents (N, C), CLIP (T, ·), sync (S, ·), text (77, ·)

A set knows the lengths of its clips without reading them and reads a clip when asked, so memory does not grow with
their number. Clips are batched with clips of the same length: nothing is padded in feature space (pitfall B1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from selva.data.padding import Padding, join_paddings
from selva.sequence import SequenceConfig
from selva.utils.device import to_device
from selva.utils.graph import leaves, with_leaves

Lengths = tuple[int, int, int]  # (N, T, S): latent frames, CLIP frames, sync tokens


@dataclass(frozen=True)
class TrainingClip:
    """One clip, or one window of a long one, as the generator is trained on it; float32, on the CPU, no batch axis.

    Attributes:
        audio_path: the sound; None where only its latents are known.
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

    def num_prompts(self, index: int) -> int:
        """Return the number of prompts of a clip, of which training draws one at each use."""
        return 1

    def prompt(self, index: int, number: int) -> tuple[str, Tensor]:
        """Return a prompt of a clip and its (77, text_dim) features, read now; number 0 is what :meth:`clip` has."""
        assert number == 0, number
        clip = self.clip(index)
        return clip.prompt, clip.text_f

    def source(self, index: int) -> str:
        """Return the name of the data set that a clip is of, where there are several; "" otherwise."""
        return ""

    def key(self, index: int) -> tuple[int, int]:
        """Return an identity of a clip, which is the same for all numbers of a clip that a set uses several times."""
        return id(self), index

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

    def num_prompts(self, index: int) -> int:
        return self.base.num_prompts(self.indices[index])

    def prompt(self, index: int, number: int) -> tuple[str, Tensor]:
        return self.base.prompt(self.indices[index], number)

    def source(self, index: int) -> str:
        return self.base.source(self.indices[index])

    def key(self, index: int) -> tuple[int, int]:
        return self.base.key(self.indices[index])

    def origins(self, index: int) -> tuple[str, ...]:
        return self.base.origins(self.indices[index])

    def content(self, index: int) -> dict[str, str]:
        return self.base.content(self.indices[index])


class NamedDataset(Subset):
    """All clips of another set, which has a name with which theirs begin."""

    def __init__(self, base: ClipDataset, name: str) -> None:
        super().__init__(base, range(len(base)))
        self.name = name
        self._ids = [f"{name}/{one}" for one in base.ids]

    def source(self, index: int) -> str:
        return self.name

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

    def num_prompts(self, index: int) -> int:
        owner, own = self._find(index)
        return owner.num_prompts(own)

    def prompt(self, index: int, number: int) -> tuple[str, Tensor]:
        owner, own = self._find(index)
        return owner.prompt(own, number)

    def source(self, index: int) -> str:
        owner, own = self._find(index)
        return owner.source(own)

    def key(self, index: int) -> tuple[int, int]:
        owner, own = self._find(index)
        return owner.key(own)

    def origins(self, index: int) -> tuple[str, ...]:
        owner, own = self._find(index)
        return owner.origins(own)

    def content(self, index: int) -> dict[str, str]:
        owner, own = self._find(index)
        return owner.content(own)

    def _find(self, index: int) -> tuple[ClipDataset, int]:
        count = self._num_first
        return (self.first, index) if index < count else (self.second, index - count)
