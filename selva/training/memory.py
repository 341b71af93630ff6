"""Memory that a training step takes on a GPU, found without one: a real step on tensors that have no numbers.

Under PyTorch's ``FakeTensorMode`` tensors have sizes only, so that a :class:`TrainingRun` of any size does a step in
seconds, while :class:`LiveStorages` adds up what is alive. No weight is read.

The fake tensors say that they are on the CPU, because PyTorch's autograd refuses to go back through CUDA tensors where
there is no CUDA device; :func:`selva.utils.device.standing_for_gpu` has the networks compute as they do on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selva.data.dataset import ClipDataset, Lengths, TrainingClip
from selva.data.memmap.reader import MemmapDataset, is_memmap
from selva.data.mixture import repeats_of, visits_of_sets
from selva.data.order import ClipWindow
from selva.features import load_duration
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models.blocks import forget_tables
from selva.models.generator import Generator, cast_frozen_
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_generator
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.training.condition_cache import cache_bytes
from selva.training.config import RunConfig, TrainConfig
from selva.training.objective import held_out_losses
from selva.training.prior_preservation import mixture
from selva.training.run import TrainingRun
from selva.utils.device import dtype_of, standing_for_gpu, stored_dtype
from selva.utils.errors import UserError
from selva.utils.torchrun import world_size

log = logging.getLogger(__name__)

BLOCK = 512  # bytes to which the allocator of CUDA rounds every request
CARDS_GB = (8, 12, 16, 24)
# What is left to others on a card: CUDA itself and what draws the screen; workspaces of kernels, gaps between blocks.
# Assumed, not measured.
OTHERS_BYTES, GAPS_SHARE = 2**30, 0.1
LONG_BATCH, MOST_CLIPS = 32, 256  # a batch at which memory is measured; no larger one than this is recommended


@dataclass(frozen=True)
class StepMemory:
    """Bytes that are allocated on the device in a step, at most at one time, and what they are made of.

    Attributes:
        peak: all of it. weights: the base model with its adapter. resident: what else stays between two steps: the
            optimiser's moments, averages, conditions of the data set.
    """

    peak: int
    weights: int
    resident: int

    @property
    def of_step(self) -> int:
        """Bytes that a step takes beside what is there before and after it: activations, gradients, its scratch."""
        return self.peak - self.weights - self.resident


class LiveStorages(TorchDispatchMode):
    """Adds up the storages of all tensors made within the block, each as long as something refers to it.

    Attributes:
        total: bytes now. peak: highest total so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = -(-storage.nbytes() // BLOCK) * BLOCK
        weakref.finalize(storage, self._forget, key).atexit = False
        self.total += self._live[key]
        self.peak = max(self.peak, self.total)

    def _forget(self, key: int) -> None:
        self.total -= self._live.pop(key)


def step_memory(
    variant: str,
    lora: LoRAConfig,
    training: TrainConfig,
    precision: torch.dtype,
    *,
    stored: torch.dtype | None = None,
    duration_sec: float = DEFAULT_DURATION_SEC,
    checkpoint_blocks: bool | int = False,
    num_clips: int = 1,
    validates: bool = True,
    graphs: bool = False,
    several_lengths: bool = False,
) -> StepMemory:
    """Return the memory of a training step, and of a validation, on an NVIDIA GPU.

    Args:
        precision: of autocast. stored: of the frozen matrices, if they are in another type.
        duration_sec: length of every clip. num_clips: in the data set; their conditions stay on the device as far as
            the cache takes them.
        checkpoint_blocks: :attr:`Generator.gradient_checkpointing`.
        validates: False for a run without held-out clips.
        graphs: steps are recorded as CUDA graphs, which keep the memory of a step for themselves: a validation takes
            its own beside it, and so does a step of another length before it is recorded.
        several_lengths: there are such steps; they are taken to be as long.

    Raises:
        ValueError: the adapter does not fit the model, or the clips are too short.
    """
    live = LiveStorages()
    with torch.device("meta"):
        without_numbers = build_generator(variant)
    cast_frozen_(without_numbers, stored or precision)
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
        run.content = {}  # the hashes of the clips are on the host
        run.batches.draw = lambda: windows  # the order is random numbers, which there are none of
        generator.train()
        _make_moments(run)
        run.train_step()
        kept = live.peak - live.total if graphs else 0
        live.total += kept
        if several_lengths:
            live.peak = max(live.peak, live.total + kept)
        # A larger step takes more than that, unless its memory is kept.
        if validates and (graphs or training.batch_size < training.validation_times):
            with run.evaluated():
                held_out_losses(generator, run.val_clips, training, precision)
        live.total -= kept
        # Every clip that is not in the batch will be in the cache too, sooner or later.
        others = clips.subset(range(min(training.batch_size, num_clips), num_clips))
        later = cache_bytes(generator, others, precision) if run.condition_cache is not None else 0
        return StepMemory(live.peak + later, weights, live.total - weights + later)


def _num_clips(folder: Path, variant: Variant) -> int:
    """Return the number of clips of a data set without reading them."""
    if is_memmap(folder):
        return len(MemmapDataset(folder, variant))
    return sum(path.suffix == ".npz" for path in folder.iterdir())


def has_several_lengths(durations: Iterable[float], variant: Variant, longest_sec: float) -> bool:
    """Return True if clips of these seconds are trained on at several lengths; longer ones are cut into windows."""
    found: set[Lengths] = set()
    for duration_sec in durations:
        with suppress(ValueError):  # such a clip is refused by name later
            sequence = sequence_config(variant.mode, min(duration_sec, longest_sec))
            found.add((sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len))
        if len(found) > 1:
            return True
    return False


def _durations(folder: Path) -> Iterator[float]:
    """Yield the seconds of every clip of a data set whose file can be read."""
    if is_memmap(folder):
        yield DEFAULT_DURATION_SEC
        return
    for path in sorted(folder.glob("*.npz")):
        with suppress(UserError):
            yield load_duration(path)


def log_step_memory(config: RunConfig, asked_precision: str, device: torch.device) -> None:
    """Log what a step of a run takes on a GPU, and the largest batch that fits the card, or cards of usual sizes.

    Nothing but the number of clips and their seconds is read. Clips are taken to be as long as the longest may be.

    Args:
        config: with the precision of ``device``. asked_precision: as the user gave it; "auto" is bf16 on a GPU of 2020
            or later, whatever it is here.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    on_gpu, variant = device.type == "cuda", get_variant(config.model.variant)
    precision = "bf16" if asked_precision == "auto" and not on_gpu else config.precision
    sizes, weights = zip(*((max(1, _num_clips(one.path, variant)), one.weight) for one in config.sources), strict=True)
    times = visits_of_sets(sizes, weights) if config.balance == "sets" else repeats_of(weights)
    num_clips = sum(size * count for size, count in zip(sizes, times, strict=True))
    if config.preserve:
        repeats, preserved = mixture(num_clips, len(config.preserve), config.preserve_share)
        num_clips = repeats * num_clips + preserved

    checkpoint_blocks = config.checkpoint_blocks or config.grad_checkpointing
    # See selva.training.run.graph_problem.
    graphs = config.cuda_graph != "off" and world_size() == 1 and not (checkpoint_blocks and config.lora.dropout)
    durations = itertools.chain.from_iterable(_durations(one.path) for one in config.sources)
    several_lengths = graphs and has_several_lengths(durations, variant, config.duration)

    def measure(batch_size: int) -> StepMemory:
        return step_memory(
            variant.name, config.lora, dataclasses.replace(config.training, batch_size=batch_size), dtype_of(precision),
            stored=stored_dtype(config.base_dtype, precision), duration_sec=config.duration, num_clips=num_clips,
            checkpoint_blocks=checkpoint_blocks, validates=config.val_fraction > 0, graphs=graphs,
            several_lengths=several_lengths,
        )

    own = config.training.batch_size
    sizes = {batch_size: measure(batch_size) for batch_size in sorted({1, own, LONG_BATCH})}
    log.info("a step on an NVIDIA GPU in %s takes %.2f GiB with --batch_size %d and clips of %g s: model %.2f, kept "
             "between steps %.2f, step %.2f; beside that CUDA itself, workspaces and gaps take some", precision,
             sizes[own].peak / 2**30, own, config.duration, sizes[own].weights / 2**30, sizes[own].resident / 2**30,
             sizes[own].of_step / 2**30)
    if several_lengths:
        log.info("of that, the step counts twice: CUDA graphs keep the memory of one clip length while a step of "
                 "another is computed; --cuda_graph off needs less")
    peaks = {batch_size: size.peak for batch_size, size in sizes.items()}
    if not on_gpu:
        fits = {gb: largest_batch(peaks, usable_bytes(gb * 2**30 - OTHERS_BYTES)) for gb in CARDS_GB}
        log.info("largest --batch_size for a card of %s; --grad_checkpointing allows larger ones",
                 ", ".join(f"{gb} GB: {count or 'none'}" for gb, count in fits.items()))
        return
    free, total = torch.cuda.mem_get_info(device)
    most = largest_batch(peaks, usable_bytes(free))
    log.log(logging.INFO if own <= most else logging.WARNING,
            "largest --batch_size for this card, of whose %.1f GiB %.1f are free: %s; --grad_checkpointing allows "
            "larger ones", total / 2**30, free / 2**30, most or "none")


def usable_bytes(free: int) -> float:
    """Return the part of free memory that a step may take, beside workspaces of kernels and gaps between blocks."""
    return (1 - GAPS_SHARE) * free


def largest_batch(peaks: Mapping[int, int], available: float) -> int:
    """Return the most clips per batch, up to ``MOST_CLIPS``, whose step takes no more than ``available`` bytes.

    Args:
        peaks: bytes by batch size, of at least two. Between them memory is at most on the straight line, as it is the
            largest of several sums that each grow evenly.
    """
    known = sorted(peaks)
    for count in range(MOST_CLIPS, 0, -1):
        low = max((size for size in known[:-1] if size <= count), default=known[0])
        high = known[known.index(low) + 1]
        peak = peaks[low] + (peaks[high] - peaks[low]) * (count - low) / (high - low)
        if peak <= available:
            return count
    return 0


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


def _allocated_(generator: Generator) -> Generator:
    """Give the parameters of a generator on the meta device memory, as far as the mode that is on does."""
    for part in generator.modules():
        for name, parameter in part.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            part.register_parameter(name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
    return generator
