"""Batches of a base training: rows of mixed sets with their noise, read ahead by threads, the same for any world.

A batch is ``batch_size`` visits of the mixture in a row; every process reads and computes its own part of it.
The random numbers of a visit depend on the seed, the epoch and the item alone.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from selva.data.dataset import Batch, collate
from selva.data.mixture import MixedClips, Visit, seed_of
from selva.training.config import ObjectiveConfig
from selva.training.objective import NoiseSample, sample_noise
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.text import counted

Stacked = TypeVar("Stacked", Batch, NoiseSample)


@dataclass(frozen=True)
class Part:
    """Rows of one forward pass of one process: on the CPU, pinned where a GPU is to take them."""

    batch: Batch
    noise: NoiseSample


@dataclass(frozen=True)
class Step:
    """One update.

    Attributes:
        parts: that this process computes, one after the other.
        per_source: rows of every set in the whole batch, of all processes.
    """

    parts: list[Part]
    per_source: list[int]


def split(count: int, parts: int) -> list[slice]:
    """Return ``parts`` slices of ``count`` items whose sizes differ by one at most."""
    bounds = [count * i // parts for i in range(parts + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]


def own_parts(batch_size: int, micro_batch_size: int | None, world: World) -> list[slice]:
    """Return the parts of a global batch that a process computes one after the other; as many in every process.

    Raises:
        UserError: there are fewer rows than processes, or parts.
    """
    per_process = split(batch_size, world.size)
    largest = max(own.stop - own.start for own in per_process)
    count = -(-largest // (micro_batch_size or largest or 1)) if largest else 1
    if batch_size < world.size * count:
        raise UserError(f"batch_size {batch_size} is for {counted(world.size, 'process', 'processes')} with "
                        f"{counted(count, 'forward pass', 'forward passes')} each, expected at least one row for each "
                        "of them; use a larger --batch_size or --micro_batch_size")
    own = per_process[world.rank]
    return [slice(own.start + s.start, own.start + s.stop) for s in split(own.stop - own.start, count)]


class BatchStream:
    """Endless batches from a step on, read ahead.

    Args:
        config: the objective, for the noise. steps: of the whole run, for a curriculum.
        prefetch: batches that are read ahead. readers: threads that do it. pin: into pinned memory.
    """

    def __init__(
        self, clips: MixedClips, config: ObjectiveConfig, *, batch_size: int, steps: int, world: World,
        micro_batch_size: int | None = None, prefetch: int = 4, readers: int = 2, pin: bool = False,
    ) -> None:
        self.clips, self.config, self.batch_size, self.steps, self.pin = clips, config, batch_size, steps, pin
        self.parts = own_parts(batch_size, micro_batch_size, world)
        self.waited_sec = 0.0  # that the training has waited for data
        self._prefetch, self._readers = prefetch, ThreadPoolExecutor(readers, thread_name_prefix="reader")
        self._next = (0, 0)  # step and first place of the next batch to be read
        self._ahead: deque[Future[Step]] = deque()

    def start_at(self, step: int, place: int) -> None:
        """Go on with the batch of a step, which begins at a place of the mixture."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next = (step, place)

    def draw(self) -> Step:
        """Return the next batch, or rather what this process computes of it."""
        while len(self._ahead) < self._prefetch:
            step, place = self._next
            self._ahead.append(self._readers.submit(self.read, step, place))
            self._next = (step + 1, place + self.batch_size)
        started = time.monotonic()
        result = self._ahead.popleft().result()
        self.waited_sec += time.monotonic() - started
        return result

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def read(self, step: int, place: int) -> Step:
        """Return the part of this process of the batch of a step, which begins at ``place``; read now."""
        visits = [self.clips.mixture.visit(place + i) for i in range(self.batch_size)]
        return Step([self._part(visits[own], step) for own in self.parts], self.clips.mixture.per_source(visits))

    def _part(self, visits: Sequence[Visit], step: int) -> Part:
        batch = collate([self.clips.clip(visit) for visit in visits])
        noise = visit_noise(visits, batch.mean.shape[1:], self.config, step / self.steps)
        return Part(_pinned(batch), _pinned(noise)) if self.pin else Part(batch, noise)


def visit_noise(visits: Sequence[Visit], shape: torch.Size, config: ObjectiveConfig, progress: float) -> NoiseSample:
    """Return the random numbers of some visits to clips with latents of ``shape`` (N, C), the same in any batch.

    The seeds have 32 bits: among the 150 million visits of a whole training, some pairs see the same noise, at other
    steps and with other latents.
    """
    draws = []
    for visit in visits:
        rng = torch.Generator().manual_seed(seed_of("noise", config.seed, visit.epoch, visit.item))
        draws.append(sample_noise(torch.Size((1, *shape)), config, rng, progress))
    return NoiseSample(*(torch.cat([getattr(one, field.name) for one in draws]) for field in fields(NoiseSample)))


def _pinned(value: Stacked) -> Stacked:
    tensors = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: x.pin_memory() for name, x in tensors.items() if isinstance(x, Tensor)})
