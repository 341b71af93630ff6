"""Cache of latents and projected conditions, in the form that the generator's blocks take, kept on the device.

The projections of pictures, motion and text depend neither on the time nor on the noise. Unless the adapter changes
them, a clip's are the same in every batch, and a step then needs nothing from the host but random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, ClipWindow, Lengths, collate
from selva.data.padding import Padding, join_paddings
from selva.lora.layers import lora_layers
from selva.models.generator import CONDITION_PARTS, Conditions, Generator

MAX_BYTES = 512 * 2**20  # about 500 clips of 8 s; a larger set is not cached


@dataclass(frozen=True)
class CachedBatch:
    """A batch behind the projections, see :class:`selva.data.dataset.Batch`.

    Attributes:
        mean, std: (B, N, C). has_video: (B,) bool; where it is False, the conditions of pictures and motion are NaN.
        conditions: of B clips. empty: of batch 1, in place of a dropped condition.
        lengths: (N, T, S).
        padding: (B, N); None where no clip has any.
    """

    mean: Tensor
    std: Tensor
    has_video: Tensor
    conditions: Conditions
    empty: Conditions
    lengths: Lengths
    padding: Padding | None = None

    def with_dropped(self, clip: Tensor, sync: Tensor, text: Tensor) -> Conditions:
        """Return the conditions with the empty ones wherever the (B,) bool masks are True."""

        def choose(mask: Tensor, name: str) -> Tensor:
            full, empty = getattr(self.conditions, name), getattr(self.empty, name)
            return torch.where(mask.view(-1, *[1] * (full.ndim - 1)), empty, full)

        masks = {"clip_f": clip, "clip_f_c": clip, "sync_f": sync, "text_f": text, "text_f_c": text}
        return Conditions(**{name: choose(mask, name) for name, mask in masks.items()})


def can_cache(generator: Generator, clips: ClipDataset, precision: torch.dtype) -> bool:
    """Return True where the conditions of a set can be cached: no projection is adapted, and the cache is small enough.

    The answer depends on settings and data only, so that a resumed run computes what the interrupted one did.
    """
    adapted = any(name.startswith(CONDITION_PARTS) for name, _ in lora_layers(generator))
    return not adapted and cache_bytes(generator, clips, precision) <= MAX_BYTES


def cache_bytes(generator: Generator, clips: ClipDataset, precision: torch.dtype) -> int:
    """Return the size of the cache with all windows of a set in it; of more than ``MAX_BYTES``, any size above it."""
    config = generator.config
    itemsize = torch.finfo(precision).bits // 8
    total = 0
    for index in range(len(clips)):
        latent_len, clip_len, _ = clips.lengths(index)
        tokens = latent_len + clip_len + config.text_seq_len + 2
        one = tokens * config.hidden_dim * itemsize + 2 * latent_len * config.latent_dim * 4
        total += one * clips.num_windows(index)
        if total > MAX_BYTES:
            break
    return total


Row = tuple[Tensor, Tensor, Tensor, Conditions, Padding | None]  # of one window: mean, std, has_video ...


class ConditionCache:
    """The conditions of a training set, those of each window computed at its first use.

    Args:
        generator: with its adapter, on its device. precision: autocast dtype of the projections.
    """

    def __init__(self, generator: Generator, clips: ClipDataset, precision: torch.dtype) -> None:
        self.generator, self.clips, self.precision = generator, clips, precision
        self._known: dict[ClipWindow, Row] = {}
        self._empty: dict[Lengths, Conditions] = {}

    def load(self, windows: Sequence[ClipWindow]) -> CachedBatch:
        """Return the batch of these windows, which are of one length."""
        lengths = self.clips.lengths(windows[0].index)
        self.generator.set_sequence(*lengths)
        rows = [self._known.get(window) or self._compute(window) for window in windows]
        means, stds, has_video, conditions, paddings = zip(*rows, strict=True)
        return CachedBatch(
            torch.cat(means), torch.cat(stds), torch.cat(has_video), Conditions.cat_all(conditions),
            self._empty_conditions(lengths), lengths, join_paddings(paddings, lengths[0]),
        )

    @torch.no_grad()
    def _compute(self, window: ClipWindow) -> Row:
        # One clip at a time, whatever batch it comes in: its bits must not depend on its neighbours.
        read, device = self.clips.clip(*window), self.generator.latent_mean.device
        clip, padding = collate([read]).to(device), None if read.padding is None else read.padding.to(device)
        with self.generator.computing_in(self.precision):
            conditions = self.generator.preprocess_conditions(clip.clip_f, clip.sync_f, clip.text_f)
        self._known[window] = clip.mean, clip.std, clip.has_video, conditions, padding
        return self._known[window]

    @torch.no_grad()
    def _empty_conditions(self, lengths: Lengths) -> Conditions:
        if lengths not in self._empty:
            with self.generator.computing_in(self.precision):
                self._empty[lengths] = self.generator.empty_conditions(1)
        return self._empty[lengths]
