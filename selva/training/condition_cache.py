"""Cache of latents and projected conditions, in the form that the generator's blocks take, kept on the device.

The projections of pictures, motion and text depend neither on the time nor on the noise. Unless the adapter changes
them, a clip's are the same in every batch, and a step then needs nothing from the host but random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, Lengths, collate
from selva.data.order import ClipWindow, read_window
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
    total, counted = 0, set()
    for index in range(len(clips)):
        if (key := clips.key(index)) in counted:  # used several times, and kept once
            continue
        counted.add(key)
        latent_len, clip_len, _ = clips.lengths(index)
        tokens = latent_len + clip_len + config.text_seq_len + 2
        one = tokens * config.hidden_dim * itemsize + 2 * latent_len * config.latent_dim * 4
        total += one * clips.num_windows(index)
        total += (clips.num_prompts(index) - 1) * (config.text_seq_len + 1) * config.hidden_dim * itemsize
        if total > MAX_BYTES:
            break
    return total


Row = tuple[Tensor, Tensor, Tensor, Conditions, Padding | None]  # of one window: mean, std, has_video ...
Text = tuple[Tensor, Tensor]  # of one prompt: text_f and text_f_c of its conditions


class ConditionCache:
    """The conditions of a training set, those of each window computed at its first use.

    Args:
        generator: with its adapter, on its device. precision: autocast dtype of the projections.
    """

    def __init__(self, generator: Generator, clips: ClipDataset, precision: torch.dtype) -> None:
        self.generator, self.clips, self.precision = generator, clips, precision
        self._known: dict[tuple[tuple[int, int], int], Row] = {}  # (clip, window), with the first prompt of each clip
        self._texts: dict[tuple[tuple[int, int], int], Text] = {}  # (clip, prompt), other than the first
        self._empty: dict[Lengths, Conditions] = {}

    def load(self, windows: Sequence[ClipWindow]) -> CachedBatch:
        """Return the batch of these windows, which are of one length."""
        lengths = self.clips.lengths(windows[0].index)
        self.generator.set_sequence(*lengths)
        rows = [self._row(window) for window in windows]
        means, stds, has_video, conditions, paddings = zip(*rows, strict=True)
        return CachedBatch(
            torch.cat(means), torch.cat(stds), torch.cat(has_video), Conditions.cat_all(conditions),
            self._empty_conditions(lengths), lengths, join_paddings(paddings, lengths[0]),
        )

    def _row(self, use: ClipWindow) -> Row:
        clip = self.clips.key(use.index)
        if (row := self._known.get((clip, use.window))) is None:
            row = self._known[clip, use.window] = self._compute(use._replace(prompt=0))
        if not use.prompt:
            return row
        if (text := self._texts.get((clip, use.prompt))) is None:
            text = self._texts[clip, use.prompt] = self._compute_text(use)
        text_f, text_f_c = text
        mean, std, has_video, conditions, padding = row
        return mean, std, has_video, replace(conditions, text_f=text_f, text_f_c=text_f_c), padding

    @torch.no_grad()
    def _compute_text(self, use: ClipWindow) -> Text:
        """Project the text of a prompt beside features that do not matter to it: the empty ones."""
        _, text_f = self.clips.prompt(use.index, use.prompt)
        empty_clip, empty_sync, _ = self.generator.empty_features(1)
        with self.generator.computing_in(self.precision):
            conditions = self.generator.preprocess_conditions(
                empty_clip, empty_sync, text_f[None].to(self.generator.latent_mean.device))
        return conditions.text_f, conditions.text_f_c

    @torch.no_grad()
    def _compute(self, window: ClipWindow) -> Row:
        # One clip at a time, whatever batch it comes in: its bits must not depend on its neighbours.
        read, device = read_window(self.clips, window), self.generator.latent_mean.device
        clip, padding = collate([read]).to(device), None if read.padding is None else read.padding.to(device)
        with self.generator.computing_in(self.precision):
            conditions = self.generator.preprocess_conditions(clip.clip_f, clip.sync_f, clip.text_f)
        return clip.mean, clip.std, clip.has_video, conditions, padding

    @torch.no_grad()
    def _empty_conditions(self, lengths: Lengths) -> Conditions:
        if lengths not in self._empty:
            with self.generator.computing_in(self.precision):
                self._empty[lengths] = self.generator.empty_conditions(1)
        return self._empty[lengths]
