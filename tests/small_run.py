"""A small generator, made-up clips and a run of a few steps, for tests of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from selva.data.dataset import ListDataset, TrainingClip
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models.config import GeneratorConfig
from selva.models.generator import Generator, cast_frozen_
from selva.sequence import sequence_config
from selva.training.config import TrainConfig
from selva.training.run import TrainingRun

SMALL = GeneratorConfig(
    latent_dim=4, hidden_dim=32, depth=3, fused_depth=1, num_heads=2, clip_dim=10, sync_dim=12, text_dim=14,
    text_seq_len=7,
)
CONFIG = TrainConfig(steps=6, batch_size=2, warmup_steps=2, lr=1e-2, save_every=3, val_every=3, log_every=2)


def make_clips(count: int = 5, seconds: float = 1.0) -> list[TrainingClip]:
    sequence = sequence_config("16k", seconds)
    rng = torch.Generator().manual_seed(int(seconds * 100))

    def noise(*shape):
        return torch.randn(*shape, generator=rng)

    return [
        TrainingClip(
            id=f"clip{i}_{seconds}", prompt="", audio_path=Path("none"), sequence=sequence,
            mean=noise(sequence.latent_seq_len, 4), std=noise(sequence.latent_seq_len, 4).abs(),
            clip_f=noise(sequence.clip_seq_len, 10), sync_f=noise(sequence.sync_seq_len, 12), text_f=noise(7, 14),
        )
        for i in range(count)
    ]


def make_base() -> Generator:
    """Return a small generator with seeded weights, of which none is zero."""
    torch.manual_seed(1)
    model = Generator(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        model.latent_std.fill_(1.5)
    return model


def make_generator(lora: LoRAConfig | None = None, dtype: torch.dtype = torch.float32) -> Generator:
    """Return the small generator with an adapter."""
    model = make_base()
    cast_frozen_(model, dtype)
    inject_lora(model, lora or LoRAConfig(rank=2, dropout=0.1), torch.Generator().manual_seed(0))
    return model


def make_run(config: TrainConfig = CONFIG, val: int = 1, dtype: torch.dtype = torch.float32) -> TrainingRun:
    torch.manual_seed(config.seed)
    clips = make_clips() + make_clips(3, 1.5)
    return TrainingRun(make_generator(dtype=dtype), ListDataset(clips[val:]), ListDataset(clips[:val]), config, dtype)


def spoil_latents(run: TrainingRun) -> None:
    """Make every latent of a run NaN from now on."""
    load = run.condition_cache.load

    def spoilt(windows):
        batch = load(windows)
        return dataclasses.replace(batch, mean=torch.full_like(batch.mean, float("nan")))

    run.condition_cache.load = spoilt
