"""Memory that a training step takes on a GPU, found without one: the step runs on tensors that have sizes and no numbers.

Everything a run allocates goes through PyTorch's dispatcher. Under ``FakeTensorMode`` the real :class:`TrainingRun` does
real steps there, of any size and in seconds, while :class:`LiveStorages` adds up what is alive. No weight is read.

The fake tensors say that they are on the CPU, because PyTorch's autograd refuses to go back through CUDA tensors where
there is no CUDA device; :func:`selva.utils.device.standing_for_gpu` has the networks compute as they do on a GPU.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selva.data.dataset import ClipDataset, ClipWindow, Lengths, TrainingClip
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models.blocks import forget_tables
from selva.models.generator import Generator, cast_frozen_
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_generator
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.training.condition_cache import cache_bytes
from selva.training.config import TrainConfig
from selva.training.objective import VALIDATION_TIMES, held_out_losses
from selva.training.run import TrainingRun
from selva.utils.device import standing_for_gpu

BLOCK = 512  # bytes to which the allocator of CUDA rounds every request
# What a card gives to other things: the CUDA context and its libraries (0.4 to 0.6 GiB), workspaces of the kernels,
# gaps between blocks.
RESERVED_BYTES, RESERVED_SHARE = 768 * 2**20, 0.05
LARGEST_BATCH = 256


@dataclass(frozen=True)
class StepMemory:
    """Bytes that are allocated on the device in a step, at most at one time, and what they are made of.

    Attributes:
        peak: all of it. weights: the base model with its adapter. resident: what else stays between two steps: the
            optimiser's moments, averages, conditions of the data set. peak - weights - resident is what a step keeps
            for its backward pass and its gradients.
        batch_size: clips per forward pass.
    """

    peak: int
    weights: int
    resident: int
    batch_size: int


class LiveStorages(TorchDispatchMode):
    """Adds up the storages of all tensors made within the block, each as long as something refers to it.

    Attributes:
        total: bytes now. peak: highest total so far.
        at_peak: bytes by the operation that made them, at the highest total since ``record`` was set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self.record = False
        self.at_peak: Counter[str] = Counter()
        self._live: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, func)
        return result

    def _see(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._live[key] = size, str(func)
        weakref.finalize(storage, self._forget, key).atexit = False
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            if self.record:
                self.at_peak = Counter()
                for size, name in self._live.values():
                    self.at_peak[name] += size

    def _forget(self, key: int) -> None:
        self.total -= self._live.pop(key)[0]


def step_memory(
    variant: str,
    lora: LoRAConfig,
    training: TrainConfig,
    precision: torch.dtype,
    *,
    duration_sec: float = DEFAULT_DURATION_SEC,
    checkpoint_blocks: bool | int = False,
    num_clips: int = 1,
    validates: bool = True,
    live: LiveStorages | None = None,
) -> StepMemory:
    """Return the memory of a training step, and of a validation, on an NVIDIA GPU.

    Args:
        precision: of the frozen matrices and of autocast.
        duration_sec: length of every clip. num_clips: in the data set; their conditions stay on the device as far as
            the cache takes them.
        checkpoint_blocks: :attr:`Generator.gradient_checkpointing`.
        validates: False for a run without held-out clips.
        live: adds up, and can be asked afterwards what was alive at the peak.

    Raises:
        ValueError: the adapter does not fit the model, or the clips are too short.
    """
    live = live or LiveStorages()
    with torch.device("meta"):
        without_numbers = build_generator(variant)
    cast_frozen_(without_numbers, precision)
    inject_lora(without_numbers, lora, torch.Generator())
    clips = _Clips(get_variant(variant), duration_sec, num_clips)
    windows = [ClipWindow(i % num_clips, 0) for i in range(training.batch_size)]
    # Two forward passes and an update are all that many of them need.
    training = dataclasses.replace(training, grad_accum=min(training.grad_accum, 2))
    with _isolated(), FakeTensorMode(), live:
        generator = _allocated_(without_numbers)
        generator.gradient_checkpointing = checkpoint_blocks
        weights = live.total
        run = TrainingRun(generator, clips, clips.subset([0]), training, precision)
        run.batches.draw = lambda: windows  # the order is random numbers, which there are none of
        generator.train()
        _make_moments(run)
        run.train_step()
        if validates and training.batch_size < VALIDATION_TIMES:  # a larger step takes more than a validation does
            with run.evaluated():
                held_out_losses(generator, run.val_clips, training, precision)
        # Every clip that is not in the batch will be in the cache too, sooner or later.
        others = clips.subset(range(min(training.batch_size, num_clips), num_clips))
        later = cache_bytes(generator, others, precision) if run.condition_cache is not None else 0
        return StepMemory(live.peak + later, weights, live.total - weights + later, training.batch_size)


class _Clips(ClipDataset):
    """Clips of one length that hold one number each, so that what is on the host takes no memory."""

    def __init__(self, variant: Variant, duration_sec: float, count: int) -> None:
        self.variant, self.count = variant, count
        self.sequence = sequence_config(variant.mode, duration_sec)

    @property
    def ids(self) -> list[str]:
        return [str(i) for i in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def lengths(self, index: int) -> Lengths:
        return self.sequence.latent_seq_len, self.sequence.clip_seq_len, self.sequence.sync_seq_len

    def num_windows(self, index: int) -> int:
        return 1

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        (latent_len, clip_len, sync_len), sizes, one = self.lengths(index), self.variant.generator, torch.zeros(())
        latent = one.expand(latent_len, sizes.latent_dim)
        return TrainingClip(
            str(index), "", None, self.sequence, latent, latent, one.expand(clip_len, sizes.clip_dim),
            one.expand(sync_len, sizes.sync_dim), one.expand(sizes.text_seq_len, sizes.text_dim),
        )


def _make_moments(run: TrainingRun) -> None:
    """Leave the optimiser as the first step does, without the work of a whole step."""
    for parameter in run.parameters:
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _isolated() -> Iterator[None]:
    """Leave nothing behind: no random state, and no table of tensors without numbers."""
    forget_tables()
    try:
        with torch.random.fork_rng(devices=[]), standing_for_gpu():
            yield
    finally:
        forget_tables()


def _allocated_(module: nn.Module) -> Generator:
    """Give the parameters of a module on the meta device memory, as far as the mode that is on does."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            part.register_parameter(name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
    return module
