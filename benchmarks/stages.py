"""The stages that ``run.py`` measures: each sets up one thing, checks that both ways agree, and times them."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import Bench, Result, relative_error, resident_bytes
from plain import (
    plain_conditions,
    plain_sampling,
    plain_sync_features,
    plain_training,
    plain_velocity,
    plain_vocoder,
    wrap_plainly_,
)
from torch import Tensor

from selva.adapter import Adapter, merge_adapters
from selva.lora import LoRAConfig, adapter_tensors, inject_lora, lora_parameters
from selva.memmap.reader import MemmapSet
from selva.models.generator import Generator, cast_frozen_
from selva.models.random_weights import random_state_dict
from selva.models.zoo import Variant, build_generator, build_video_encoder, build_vocoder
from selva.sampling import SamplingConfig, draw_noise, sample_latents
from selva.sequence import sequence_config
from selva.training import TrainConfig, TrainingRun
from selva.training_set import InMemorySet, TrainingClip

RANK, TARGET, STEPS = 16, "attn.qkv", 25
DURATION_SEC = 8.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
NUM_CLIPS = 16

Stage = Callable[[Bench, Variant, "list[int]"], Iterator[Result]]


# ---------------------------------------------------------------------------------------------------------------
# what the stages work on
# ---------------------------------------------------------------------------------------------------------------


def random_generator(variant: Variant) -> Generator:
    generator = build_generator(variant.generator)
    generator.load_published(random_state_dict(generator))
    return generator.requires_grad_(False)


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
    clips = InMemorySet(random_clips(variant))
    config = TrainConfig(steps=10_000, batch_size=batch_size, warmup_steps=0)
    return TrainingRun(generator, clips, clips.subset([]), config, bench.dtype)


def plain_run(variant: Variant, bench: Bench, batch_size: int) -> Iterator[float]:
    generator = random_generator(variant)
    set_lengths(generator, variant)
    generator.to(bench.device, bench.dtype)
    parameters = wrap_plainly_(generator, TARGET, RANK)
    return plain_training(generator, parameters, plain_clips(random_clips(variant)), batch_size, lr=1e-4)


def set_lengths(generator: Generator, variant: Variant) -> None:
    sequence = sequence_config(variant.mode, DURATION_SEC)
    generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)


def features_of(clips: list[TrainingClip], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.stack([getattr(c, f) for c in clips]).to(device) for f in ("clip_f", "sync_f", "text_f"))


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


def training_step(bench: Bench, variant: Variant, batches: list[int]) -> Iterator[Result]:
    """One optimiser update: our loop against the plain one."""
    error = velocities_differ(variant, bench)
    for batch in batches:
        run, plain = our_run(variant, bench, batch), plain_run(variant, bench, batch)
        yield bench.compare(
            "training step", f"batch {batch}", lambda plain=plain: next(plain),
            lambda run=run: [x.item() for x in run.train_step()],
            error=error, tolerance=TOLERANCE[bench.dtype], memory=True,
        )


def checkpointed_step(bench: Bench, variant: Variant, batches: list[int]) -> Iterator[Result]:
    """The same with gradient checkpointing: less memory for more time."""
    for batch in batches:
        run, plain = our_run(variant, bench, batch, checkpointing=True), plain_run(variant, bench, batch)
        yield bench.compare(
            "step, checkpointed", f"batch {batch}", lambda plain=plain: next(plain),
            lambda run=run: [x.item() for x in run.train_step()], memory=True,
        )


def sampling(bench: Bench, variant: Variant, batches: list[int]) -> Iterator[Result]:
    """25 guided Euler steps of an adapted model: merged and batched against two passes of an unmerged one."""
    for batch in batches:
        features = features_of(random_clips(variant, batch), bench.device)
        ours = random_generator(variant)
        set_lengths(ours, variant)
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

        def run_ours(ours=ours, features=features, seeds=seeds, config=config) -> Tensor:
            return sample_latents(ours, *features, seeds, config, precision=bench.dtype)

        def run_plain(theirs=theirs, features=features, noise=noise, config=config) -> Tensor:
            return plain_sampling(theirs, features, noise, config.num_steps, config.cfg_strength)

        # Guidance multiplies rounding: in half precision the two sounds are compared loosely.
        yield bench.compare(
            f"sampling, {STEPS} steps", f"batch {batch}", run_plain, run_ours,
            error=relative_error(run_ours(), run_plain()), tolerance=5 * TOLERANCE[bench.dtype], memory=True,
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


def video_encoder(bench: Bench, variant: Variant, batches: list[int]) -> Iterator[Result]:
    """Sync features of one clip in float32, as extraction makes them."""
    from selva.extraction.extractor import SEGMENTS_PER_PASS

    encoder = build_video_encoder(variant.name)
    encoder.load_published(random_state_dict(encoder))
    encoder.to(bench.device).eval().requires_grad_(False)
    frames_per_clip = 56 if bench.device.type == "cpu" else 200  # 6 segments, or all 24 of 8 s
    size, text_dim = variant.sync_image_size, encoder.config.text_dim
    rng = torch.Generator().manual_seed(0)
    frames = (torch.rand(1, frames_per_clip, 3, size, size, generator=rng) * 2 - 1).to(bench.device)
    text, mask = torch.randn(1, 6, text_dim, generator=rng).to(bench.device), torch.ones(1, 6, dtype=torch.bool)
    mask = mask.to(bench.device)
    passes = SEGMENTS_PER_PASS[bench.device.type]

    @torch.no_grad()
    def ours() -> Tensor:
        return encoder.encode(frames, text, mask, segment_batch=passes)

    def plain() -> Tensor:
        return plain_sync_features(encoder, frames, text, mask)

    yield bench.compare(
        "video encoder, fp32", f"{frames_per_clip} frames", plain, ours, error=relative_error(ours(), plain()),
        tolerance=TOLERANCE[torch.float32], dtype=torch.float32, memory=True,
    )


def vocoder(bench: Bench, variant: Variant, batches: list[int]) -> Iterator[Result]:
    """Mel to waveform in float32, as inference does it."""
    network = build_vocoder(variant.vocoder)
    network.load_published(random_state_dict(network))
    network.to(bench.device).eval().requires_grad_(False)
    for seconds in (2.0, 8.0):
        frames = 2 * sequence_config(variant.mode, seconds).latent_seq_len
        mel = torch.randn(1, variant.vocoder.num_mels, frames, generator=torch.Generator().manual_seed(0))
        mel = mel.to(bench.device)

        @torch.no_grad()
        def ours(mel=mel) -> Tensor:
            return network(mel)

        def plain(mel=mel) -> Tensor:
            return plain_vocoder(network, mel)

        yield bench.compare(
            "vocoder, fp32", f"{seconds:g} s", plain, ours, error=relative_error(ours(), plain()),
            tolerance=TOLERANCE[torch.float32], dtype=torch.float32, memory=True,
        )


def memmap_reading(bench: Bench, variant: Variant, batches: list[int]) -> Iterator[Result]:
    """Rows of a memmap in random order, and how many of them a training step eats."""
    from selva.memmap.writer import MemmapWriter

    rows, clip = 256, random_clips(variant, 1)[0]
    with tempfile.TemporaryDirectory() as folder:
        values = {"mean": clip.mean, "std": clip.std.contiguous(), "text_features": clip.text_f,
                  "clip_features": clip.clip_f, "sync_features": clip.sync_f}
        target = Path(folder) / "set"
        with MemmapWriter(target, variant, [(f"c{i}", "") for i in range(rows)], video=True) as writer:
            for row in range(rows):
                writer.write(row, values, "digest")
            assert writer.publish_if_complete()
        clips = MemmapSet(target, variant)
        order = np.random.default_rng(0).permutation(rows).tolist()
        before = resident_bytes()
        start = time.perf_counter()
        for index in order:
            clips.clip(index)
        per_row = (time.perf_counter() - start) / rows
        rise = (resident_bytes() - before) / 2**20
    run = our_run(variant, bench, 4)
    run.train_step()
    step = bench.seconds(lambda: run.train_step()) / 4
    yield Result(
        "memmap row", "random order", None, per_row,
        note=f"{1 / per_row:.0f} rows/s, {step / per_row:.0f} times what a step at batch 4 eats; "
             f"memory rose by {rise:.0f} MiB (the operating system may take it back)",
    )


STAGES: dict[str, Stage] = {
    "train": training_step,
    "checkpoint": checkpointed_step,
    "sample": sampling,
    "video": video_encoder,
    "vocoder": vocoder,
    "memmap": memmap_reading,
}
