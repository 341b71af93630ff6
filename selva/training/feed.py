"""Batches of features for a GPU: from a set that lies in its memory, or read ahead and pinned.

Only for sets whose projected conditions are not cached (:mod:`selva.training.condition_cache`). Neither way changes a
number: a batch is what :meth:`selva.data.order.BucketBatchSampler.load` returns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from selva.data.dataset import Batch, ClipDataset
from selva.data.order import BucketBatchSampler, ClipWindow
from selva.data.padding import Padding, join_paddings
from selva.models.config import GeneratorConfig
from selva.utils.graph import leaves, with_leaves

log = logging.getLogger(__name__)

TENSORS = ("mean", "std", "clip_f", "sync_f", "text_f", "has_video")  # of every batch
RESIDENT_SHARE = 0.25  # of the free memory of a device, that the features of a set may take


class Feed(Protocol):
    """Source of batches on a device."""

    def load(self, windows: Sequence[ClipWindow]) -> Batch:
        """Return the batch of these windows."""
        ...

    def wait(self) -> None:
        """Return when nothing reads the set any more."""
        ...


class ReadNow:
    """Batches that are read when they are asked for."""

    def __init__(self, batches: BucketBatchSampler, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def load(self, windows: Sequence[ClipWindow]) -> Batch:
        return self.batches.load(windows).to(self.device)

    def wait(self) -> None:
        pass


class Resident:
    """Windows that stay on the device from their first use on."""

    def __init__(self, batches: BucketBatchSampler, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._known: dict[tuple[tuple[int, int], int, int], Batch] = {}  # (clip, window, prompt)

    def load(self, windows: Sequence[ClipWindow]) -> Batch:
        keys = [(self.batches.clips.key(use.index), use.window, use.prompt) for use in windows]
        for key, use in zip(keys, windows, strict=True):
            if key not in self._known:
                self._known[key] = self.batches.load([use]).to(self.device)
        return joined([self._known[key] for key in keys])

    def wait(self) -> None:
        pass


class ReadAhead:
    """The next batch is read, and put into memory that the device can fetch from, while the step before it is done.

    Args:
        own: the items of a batch that this process computes. pin: to pinned memory, which only CUDA knows.
    """

    def __init__(self, batches: BucketBatchSampler, device: torch.device, own: slice, *, pin: bool = True) -> None:
        self.batches, self.device, self.own, self.pin = batches, device, own, pin
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read ahead")
        self._coming: tuple[list[ClipWindow], Future[Batch]] | None = None

    def load(self, windows: Sequence[ClipWindow]) -> Batch:
        coming, self._coming = self._coming, None
        expected, future = coming or ([], None)
        # Other windows come at first, and after the run has been restored.
        batch = self._read(windows) if future is None or expected != list(windows) else future.result()
        following = self.batches.peek()[self.own]
        self._coming = following, self._pool.submit(self._read, following)
        return batch.to(self.device)

    def wait(self) -> None:
        if self._coming is not None:
            self._coming[1].exception()  # raised by load(), if it is asked for that batch

    def _read(self, windows: Sequence[ClipWindow]) -> Batch:
        batch = self.batches.load(windows)
        return with_leaves(batch, (tensor.pin_memory() for tensor in leaves(batch))) if self.pin else batch


def joined(batches: Sequence[Batch]) -> Batch:
    """Return batches of one clip each as one."""
    parts = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    paddings = [None if batch.padding is None else Padding(batch.padding.mask[0], batch.padding.silence)
                for batch in batches]
    return Batch(**parts, ids=tuple(name for batch in batches for name in batch.ids),
                 padding=join_paddings(paddings, batches[0].mean.shape[1]))


def make_feed(
    batches: BucketBatchSampler, config: GeneratorConfig, device: torch.device, own: slice
) -> Feed:
    """Return the feed for a device: resident where the set takes little of its memory, read ahead else; it is logged.

    Args:
        own: the items of a batch that this process computes.
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # a device may be there in name only, to be counted
        return ReadNow(batches, device)
    size, free = features_bytes(batches.clips, config), torch.cuda.mem_get_info(device)[0]
    if size <= RESIDENT_SHARE * free:
        log.info("the features of all clips stay on the GPU: %.2f GiB", size / 2**30)
        return Resident(batches, device)
    log.info("the features of all clips take %.1f GiB, %.1f GiB are free on the GPU: they are read ahead, batch by "
             "batch", size / 2**30, free / 2**30)
    return ReadAhead(batches, device, own)


def features_bytes(clips: ClipDataset, config: GeneratorConfig) -> int:
    """Return the size of a set in float32, all windows of all clips with each of their prompts."""
    total, counted = 0, set()
    for index in range(len(clips)):
        if (key := clips.key(index)) in counted:  # used several times, and kept once
            continue
        counted.add(key)
        latent_len, clip_len, sync_len = clips.lengths(index)
        numbers = (2 * latent_len * config.latent_dim + clip_len * config.clip_dim + sync_len * config.sync_dim
                   + config.text_seq_len * config.text_dim)
        total += 4 * numbers * clips.num_windows(index) * clips.num_prompts(index)
    return total
