"""The stages of training and sampling that ``run.py`` measures: each sets up one thing and times both ways of it."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import Bench, Result, relative_error, resident_bytes
from plain import (
    plain_conditions,
    plain_sampling,
    plain_training,
    plain_velocity,
    plain_vocoder,
    wrap_plainly_,
)
from torch import Tensor

from selva.data.dataset import ListDataset, TrainingClip
from selva.data.memmap.reader import MemmapDataset
from selva.flow import SamplingConfig
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.merge import Adapter, merge_adapters
from selva.lora.state import adapter_tensors, lora_parameters
from selva.models.config import MelInversionConfig
from selva.models.generator import Generator, cast_frozen_
from selva.models.random_weights import random_state_dict
from selva.models.variants import Variant
from selva.models.vocoder import Vocoder
from selva.models.zoo import build_generator, build_vocoder
from selva.partition.windows import write_table
from selva.sampling import draw_noise, sample_latents
from selva.sequence import sequence_config
from selva.training.config import TrainConfig
from selva.training.run import TrainingRun
from selva.utils.text import counted

RANK, TARGET, STEPS = 16, "attn.qkv", 25
DURATION_SEC = 8.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
NUM_CLIPS = 16
READS = 256  # rows that are read of a memmap, whatever its size
# Of the sampling of batches: on a CPU, 16 sounds of 8 s would take many minutes.
BATCH_SEC = {"cpu": 1.0, "cuda": 8.0, "mps": 8.0}


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure at.

    Attributes:
        batches: batch sizes. durations: seconds of sound. clips: of a data folder. rows: of a memmap.
        selva_dir: weights for starting a training; None for a packaged variant.
    """

    variant: Variant
    batches: list[int]
    durations: list[float]
    clips: list[int]
    rows: list[int]
    selva_dir: Path | None


Stage = Callable[[Bench, Sizes], Iterator[Result]]  # results as they come


# ---------------------------------------------------------------------------------------------------------------
# networks and clips that the stages work on
# ---------------------------------------------------------------------------------------------------------------


def random_generator(variant: Variant) -> Generator:
    with torch.device("meta"):  # without drawing what is overwritten
        generator = build_generator(variant.generator)
    return generator.to_empty(device="cpu").load_published(random_weights(variant)).requires_grad_(False)


@functools.lru_cache(maxsize=1)
def random_weights(variant: Variant) -> dict[str, Tensor]:
    return random_state_dict(build_generator(variant.generator))


def random_clips(variant: Variant, count: int = NUM_CLIPS, seconds: float = DURATION_SEC) -> list[TrainingClip]:
    """Return clips of noise with the shapes and scales of real ones."""
    sequence, config = sequence_config(variant.mode, seconds), variant.generator
    rng = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return [
        TrainingClip(
            id=f"clip{i}", prompt="", audio_path=None, sequence=sequence,
            mean=noise(sequence.latent_seq_len, config.latent_dim), std=torch.full((1,), 0.1).expand(
                sequence.latent_seq_len, config.latent_dim),
            clip_f=F.normalize(noise(sequence.clip_seq_len, config.clip_dim), dim=-1),
            sync_f=noise(sequence.sync_seq_len, config.sync_dim),
            text_f=F.normalize(noise(config.text_seq_len, config.text_dim), dim=-1),
        )
        for i in range(count)
    ]


def plain_clips(clips: list[TrainingClip]) -> list[dict[str, Tensor]]:
    return [{"x1": c.mean, "clip": c.clip_f, "sync": c.sync_f, "text": c.text_f} for c in clips]


def our_run(variant: Variant, bench: Bench, batch_size: int, checkpointing: bool = False) -> TrainingRun:
    generator = random_generator(variant)
    inject_lora(generator, LoRAConfig(rank=RANK, targets=(TARGET,)))
    cast_frozen_(generator, bench.dtype)
    generator.gradient_checkpointing = checkpointing
    generator.to(bench.device).train()
    clips = ListDataset(random_clips(variant))
    config = TrainConfig(steps=10_000, batch_size=batch_size, warmup_steps=0)
    return TrainingRun(generator, clips, clips.subset([]), config, bench.dtype)


def plain_run(variant: Variant, bench: Bench, batch_size: int) -> Iterator[float]:
    generator = random_generator(variant)
    set_lengths(generator, variant)
    generator.to(bench.device, bench.dtype)
    parameters = wrap_plainly_(generator, TARGET, RANK)
    return plain_training(generator, parameters, plain_clips(random_clips(variant)), batch_size, lr=1e-4)


def set_lengths(generator: Generator, variant: Variant, seconds: float = DURATION_SEC) -> None:
    sequence = sequence_config(variant.mode, seconds)
    generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)


def features_of(clips: list[TrainingClip], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    names = ("clip_f", "sync_f", "text_f")
    clip_f, sync_f, text_f = (torch.stack([getattr(clip, name) for clip in clips]).to(device) for name in names)
    return clip_f, sync_f, text_f


def velocities_differ(variant: Variant, bench: Bench) -> float:
    """Return the relative difference of the two velocities for the same weights, noise, time and conditions."""
    ours = random_generator(variant)
    set_lengths(ours, variant)
    theirs = copy.deepcopy(ours).to(bench.device, bench.dtype)
    cast_frozen_(ours, bench.dtype)
    ours.to(bench.device)
    features = features_of(random_clips(variant, 2), bench.device)
    latent, t = draw_noise(ours, [0, 1]).to(bench.device), torch.tensor([0.3, 0.7], device=bench.device)
    half = bench.dtype != torch.float32
    with torch.no_grad():
        plain = plain_velocity(theirs, latent, t, plain_conditions(theirs, *features))
        with torch.autocast(bench.device.type, dtype=bench.dtype, enabled=half):
            found = ours.predict_flow(latent, t, ours.preprocess_conditions(*features))
    return relative_error(found, plain)


# ---------------------------------------------------------------------------------------------------------------
# stages
# ---------------------------------------------------------------------------------------------------------------


def training_step(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure one optimiser update: our loop against the plain one."""
    yield from _steps(bench, sizes, "training step", checkpointing=False)


def checkpointed_step(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure the same with gradient checkpointing, less memory for more time, against the plain one without."""
    yield from _steps(bench, sizes, "step, checkpointed", checkpointing=True)


def _steps(bench: Bench, sizes: Sizes, stage: str, checkpointing: bool) -> Iterator[Result]:
    error = velocities_differ(sizes.variant, bench)
    for batch in sizes.batches:
        run = our_run(sizes.variant, bench, batch, checkpointing)
        plain = plain_run(sizes.variant, bench, batch)
        yield bench.compare(
            stage, f"batch {batch}", lambda plain=plain: next(plain),
            lambda run=run: [x.item() for x in run.train_step()],
            error=error, tolerance=TOLERANCE[bench.dtype], amount=batch, unit="clips", tensors=True,
        )


def sampling(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure 25 guided Euler steps of an adapted model: merged and batched against two passes of an unmerged one."""
    for seconds in sizes.durations:
        yield _sampling_row(bench, sizes.variant, 1, seconds, "one sound", seconds, "s")
    seconds = BATCH_SEC[bench.device.type]
    for batch in sizes.batches:
        yield _sampling_row(bench, sizes.variant, batch, seconds, f"{seconds:g} s each", batch, "sounds")


def _sampling_row(
    bench: Bench, variant: Variant, batch: int, seconds: float, what: str, amount: float, unit: str
) -> Result:
    features = features_of(random_clips(variant, batch, seconds), bench.device)
    ours = random_generator(variant)
    set_lengths(ours, variant, seconds)
    theirs = copy.deepcopy(ours).to(bench.device, bench.dtype)
    parameters = wrap_plainly_(theirs, TARGET, RANK)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)
    merge_adapters(ours, [(as_adapter(theirs), 1.0)])
    cast_frozen_(ours, bench.dtype)
    ours.to(bench.device)
    seeds = list(range(batch))
    noise = draw_noise(ours, seeds).to(bench.device)
    config = SamplingConfig(num_steps=STEPS)
    # Guidance multiplies rounding: in half precision the two sounds are compared loosely.
    return bench.compare(
        f"sampling, {STEPS} steps, {what}", f"{amount:g} {unit}",
        lambda: plain_sampling(theirs, features, noise, config.num_steps, config.cfg_strength),
        lambda: sample_latents(ours, *features, seeds, config, precision=bench.dtype),
        tolerance=5 * TOLERANCE[bench.dtype], amount=amount, unit=unit,
    )


def as_adapter(model: Generator) -> Adapter:
    """Return the adapter of a plainly wrapped model, in our format."""
    twin = random_generator_like(model)
    inject_lora(twin, LoRAConfig(rank=RANK, targets=(TARGET,)))
    theirs = {name: p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in theirs:
                parameter.copy_(theirs[name].float().cpu())
    assert len(lora_parameters(twin)) == len(theirs)
    return Adapter(adapter_tensors(twin), {"rank": RANK, "alpha": float(RANK), "target": [TARGET]})


def random_generator_like(model: Generator) -> Generator:
    return build_generator(model.config).requires_grad_(False)


def vocoder(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure mel to waveform in float32, as inference does it."""
    variant = sizes.variant
    if isinstance(variant.vocoder, MelInversionConfig):
        return  # the stand-in of tiny_16k, which has no plain counterpart
    network = build_vocoder(variant.vocoder)
    assert isinstance(network, Vocoder)
    network.load_published(random_state_dict(network))
    network.to(bench.device).eval().requires_grad_(False)
    for seconds in sizes.durations:
        frames = 2 * sequence_config(variant.mode, seconds).latent_seq_len
        mel = torch.randn(1, variant.vocoder.num_mels, frames, generator=torch.Generator().manual_seed(0))
        mel = mel.to(bench.device)

        @torch.no_grad()
        def ours(mel=mel) -> Tensor:
            return network(mel)

        def plain(mel=mel) -> Tensor:
            return plain_vocoder(network, mel)

        yield bench.compare(
            "vocoder, fp32", f"{seconds:g} s", plain, ours, tolerance=TOLERANCE[torch.float32], dtype=torch.float32,
            amount=seconds, unit="s",
        )


def memmap_reading(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure rows of a memmap in random order, from sets of several sizes: neither time nor memory may grow."""
    clip = random_clips(sizes.variant, 1)[0]
    for rows in sizes.rows:
        with tempfile.TemporaryDirectory() as folder:
            clips = write_memmap(Path(folder) / "set", sizes.variant, clip, rows)
            order = np.random.default_rng(0).permutation(rows)[:READS].tolist()
            before = resident_bytes()
            seconds = bench.seconds(lambda clips=clips, order=order: [clips.clip(index) for index in order][:0])
            rise = (resident_bytes() - before) / 2**20
            error = relative_error(clips.clip(order[-1]).sync_f, clip.sync_f)
            del clips
        yield Result(
            "memmap row", f"of {counted(rows, 'row')}", None, seconds / len(order), ours_mib=rise, error=error,
            tolerance=0.0,
            note=f"{counted(len(order), 'row')} in random order, {len(order) / seconds:.0f} rows/s; the memory is the "
                 "system's cache, which it may take back", amount=rows, unit="rows",
        )


def write_memmap(target: Path, variant: Variant, clip: TrainingClip, rows: int) -> MemmapDataset:
    """Write the same clip to every row of a memmap, in one go: the writer of extractions would take minutes."""
    from tensordict import TensorDict

    values = {"mean": clip.mean, "std": clip.std, "text_features": clip.text_f, "clip_features": clip.clip_f,
              "sync_features": clip.sync_f}
    TensorDict({name: x.expand(rows, *x.shape) for name, x in values.items()}, batch_size=[]).memmap_(target)
    write_table(target.with_name(f"{target.name}.tsv"), ("id", "label"), [(f"clip{i}", "") for i in range(rows)])
    return MemmapDataset(target, variant)
