"""Small training data for tests: folders of features and sounds for tiny_16k, and memmaps as MMAudio writes them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import soundfile
import torch

from selva.features import FeatureBundle, save_features
from selva.models.variants import get_variant
from selva.sequence import sequence_config

TINY = get_variant("tiny_16k")
LONG_AGO = 10**18  # nanoseconds


def noise(seconds: float, rate: int = 16_000, seed: int = 0, level: float = 0.1) -> np.ndarray:
    """Return (samples,) float32 whose level slowly changes, so that no two stretches sound the same."""
    samples = round(seconds * rate)
    swell = np.sin(np.arange(samples) / rate * 1.7 + seed) + 1.2
    return (np.random.default_rng(seed).standard_normal(samples) * swell * level / 3).astype(np.float32)


def put_clip(
    folder: Path, stem: str, seconds: float = 1.0, prompt: str = "a knock", sound=None, rate: int = 16_000,
    text: bool = False, seed: int = 0,
) -> None:
    """Write a clip whose CLIP frame t and sync token s are the numbers t + seed and s + seed, and a sound."""
    lengths, config = sequence_config("16k", seconds), TINY.generator
    folder.mkdir(exist_ok=True)
    save_features(folder / f"{stem}.npz", FeatureBundle(
        clip_features=(torch.arange(lengths.clip_seq_len) + seed)[None, :, None].expand(1, -1, config.clip_dim),
        sync_features=(torch.arange(lengths.sync_seq_len) + seed)[None, :, None].expand(1, -1, config.sync_dim),
        duration=seconds, prompt=prompt,
        text_features=torch.full((1, config.text_seq_len, config.text_dim), 0.5) if text else None,
    ))
    put_sound(folder / f"{stem}.wav", noise(seconds + 0.1, rate, seed) if sound is None else sound, rate)


def put_sound(path: Path, sound: np.ndarray, rate: int = 16_000) -> None:
    """Write a float WAV that looks as if it had been there for long."""
    soundfile.write(path, sound, rate, subtype="FLOAT")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


def put_memmap(folder: Path, rows: int = 5, video: bool = True, variant=TINY, column: str | None = None) -> dict:
    """Write a memmap of random values with tensordict, and its table; return the tensors."""
    from tensordict import TensorDict

    config, lengths = variant.generator, sequence_config(variant.mode)
    rng = torch.Generator().manual_seed(1)
    shapes = {
        "mean": (lengths.latent_seq_len, config.latent_dim), "std": (lengths.latent_seq_len, config.latent_dim),
        "text_features": (config.text_seq_len, config.text_dim),
    }
    if video:
        shapes["clip_features"] = (lengths.clip_seq_len, config.clip_dim)
        shapes["sync_features"] = (lengths.sync_seq_len, config.sync_dim)
    tensors = {key: torch.rand((rows, *shape), generator=rng) for key, shape in shapes.items()}
    TensorDict(tensors, batch_size=[]).memmap_(folder)
    with open(folder.with_name(f"{folder.name}.tsv"), "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["id", column or ("label" if video else "caption")])
        table.writerows([f"id_{i}", f'says "{i}"'] for i in range(rows))
    return tensors
