"""The stages of start-up and extraction that ``run.py`` measures."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Bench, Result, clock, relative_error
from plain import (
    plain_clip_features,
    plain_frames,
    plain_latents,
    plain_sync_features,
    plain_text_features,
)
from stages import DURATION_SEC, TOLERANCE, Sizes, random_clips
from torch import Tensor, nn

from selva.data.cache import CACHE_FOLDER
from selva.data.latents import encode_latents
from selva.extraction.extractor import FRAMES_PER_PASS, SEGMENTS_PER_PASS, TextCache
from selva.features import FeatureBundle, save_features
from selva.media import read_video, write_audio
from selva.models.clip_t5 import ClipImage, ClipText, build_clip
from selva.models.random_weights import random_state_dict
from selva.models.textsynch import TextSynch
from selva.models.variants import Variant
from selva.models.zoo import build_mel, build_vae, build_video_encoder
from selva.utils.errors import UserError
from selva.utils.text import counted
from selva.weights.find import find_weights
from toyworld import CLASSES, make_scene

ROOT = Path(__file__).resolve().parents[1]
START_REPEATS = 3  # of each start; a plain one takes a minute at full size
PROMPTS = ("a bell that is struck", "rain on a roof")  # of which every clip has one
SCENE_SIZE = 360  # pixels per side of the video that is read
# What a CPU gets through in seconds at full size: 2 of the 24 segments, and 1 of the 64 frames, of 8 s.
SYNC_FRAMES = {"cpu": 24, "cuda": 200, "mps": 200}
CLIP_FRAMES = {"cpu": 1, "cuda": 64, "mps": 64}


# ---------------------------------------------------------------------------------------------------------------
# start-up
# ---------------------------------------------------------------------------------------------------------------


def startup(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure starts up to the first step, in processes of their own; ours without and with the cache of another."""
    parts = ("generator", "clip_text", "vae")
    if not sizes.variant.packaged:
        for path in {path for paths in find_weights(sizes.variant, sizes.selva_dir, parts).values() for path in paths}:
            read_through(path)  # so that neither way waits for the disk
    for count in sizes.clips:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder / "data", sizes.variant, count)
            starts: dict[str, list[dict[str, Any]]] = {"plain": [], "cold": [], "warm": []}
            for _ in range(min(bench.repeats, START_REPEATS)):
                starts["plain"].append(start("plain", bench, sizes, folder))
                shutil.rmtree(folder / "data" / CACHE_FOLDER, ignore_errors=True)
                starts["cold"].append(start("ours", bench, sizes, folder))
                starts["warm"].append(start("ours", bench, sizes, folder))
            found, expected = (torch.load(folder / f"{way}.pt", weights_only=True) for way in ("ours", "plain"))
        error = max(relative_error(found[key], expected[key]) for key in expected)
        plain_sec = median(starts["plain"], "total")
        for cache in ("cold", "warm"):
            ours_sec = median(starts[cache], "total")
            note = (
                f"plain: {stages_text(starts['plain'])}; ours: {stages_text(starts[cache])}; not counted: imports, "
                f"{clock(median(starts['plain'], 'imports'))} and {clock(median(starts[cache], 'imports'))}"
            )
            yield Result(
                f"start-up, {cache} cache", counted(count, "clip"), plain_sec, ours_sec, ours_sec / plain_sec,
                plain_mib=median(starts["plain"], "mib"), ours_mib=median(starts[cache], "mib"), error=error,
                tolerance=TOLERANCE[bench.dtype], note=note, amount=count, unit="clips",
            )


def start(way: str, bench: Bench, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Run startup.py once and return its figures."""
    out = folder / f"{way}.json"
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[bench.dtype]
    command = [sys.executable, Path(__file__).with_name("startup.py"), way, "--variant", sizes.variant.name,
               "--data_dir", folder / "data", "--out", out, "--device", bench.device, "--precision", precision]
    command += ["--selva_dir", sizes.selva_dir] if sizes.selva_dir else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # train_lora.py lies at the root
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command += ["--began", time.monotonic()]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"startup.py {way} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def write_data(folder: Path, variant: Variant, count: int) -> None:
    """Write a data folder of features and sounds of noise, with two prompts and without their features."""
    folder.mkdir()
    rng, rate = torch.Generator().manual_seed(0), 44_100 if variant.mode == "44k" else 16_000
    for number, clip in enumerate(random_clips(variant, count)):
        path = folder / f"clip_{number:03d}.npz"
        save_features(path, FeatureBundle(
            clip_features=clip.clip_f[None], sync_features=clip.sync_f[None], duration=DURATION_SEC,
            prompt=PROMPTS[number % len(PROMPTS)], variant=variant.name,
        ))
        sound = 0.1 * torch.randn(round((DURATION_SEC + 0.1) * rate), generator=rng)
        write_audio(path.with_suffix(".flac"), sound, rate)


def read_through(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def median(starts: list[dict[str, Any]], name: str) -> float:
    return statistics.median(figures[name] for figures in starts)


def stages_text(starts: list[dict[str, Any]]) -> str:
    """Return the median of every stage."""
    stages = starts[0]["stages"]
    return ", ".join(f"{name} {clock(median([f['stages'] for f in starts], name))}" for name in stages)


# ---------------------------------------------------------------------------------------------------------------
# extraction, stage by stage
# ---------------------------------------------------------------------------------------------------------------


def extraction(bench: Bench, sizes: Sizes) -> Iterator[Result]:
    """Measure the work for a clip: reading its video, its prompt, CLIP, video encoder, sound; networks in float32."""
    yield reading(bench, sizes.variant)
    clip = build_clip(sizes.variant.clip).eval().requires_grad_(False).to(bench.device)
    yield texts(bench, sizes.variant, clip)
    yield clip_frames(bench, sizes.variant, clip)
    del clip
    yield video_encoder(bench, sizes.variant)
    yield sound_encoder(bench, sizes.variant)


def reading(bench: Bench, variant: Variant) -> Result:
    """Measure the frames of a video at both rates: chosen while decoding, against decoding all of it first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.mp4"
        make_scene(0, [next(iter(CLASSES))], 1, DURATION_SEC).write(path, SCENE_SIZE)
        sizes = variant.clip_image_size, variant.sync_image_size

        def ours() -> Tensor:
            frames = read_video(path, DURATION_SEC, clip_size=sizes[0], sync_size=sizes[1])
            return torch.cat([frames.clip_frames.flatten(), frames.sync_frames.flatten()])

        def plain() -> Tensor:
            clip, sync = plain_frames(path, *sizes)
            covered = read.duration_sec
            clip, sync = clip[: int(8 * covered)], sync[: int(25 * covered)]
            return torch.cat([clip.flatten(), sync.flatten()])

        read = read_video(path, DURATION_SEC, clip_size=sizes[0], sync_size=sizes[1])
        return bench.compare("extraction: reading", f"{DURATION_SEC:g} s, {SCENE_SIZE}²", plain, ours, tolerance=0.0)


def texts(bench: Bench, variant: Variant, clip: nn.Module) -> Result:
    """Measure the prompts of some clips: each different one once, against every clip's."""
    encoder = ClipText(variant.clip).load_published(clip.state_dict()).to(bench.device)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(4 * len(PROMPTS))]

    def ours() -> Tensor:
        cache = TextCache(lambda: encoder, lambda encoder, prompt: encoder.encode([prompt]).cpu())
        return torch.cat([cache[prompt] for prompt in prompts])

    def plain() -> Tensor:
        tokens = (encoder.tokenize([prompt]).to(bench.device) for prompt in prompts)
        return torch.cat([plain_text_features(clip, row).cpu() for row in tokens])

    return bench.compare(
        "extraction: text", f"{counted(len(prompts), 'clip')}, {counted(len(PROMPTS), 'prompt')}", plain, ours,
        tolerance=TOLERANCE[torch.float32], dtype=torch.float32,
    )


def clip_frames(bench: Bench, variant: Variant, clip: nn.Module) -> Result:
    """Measure CLIP frames by the same network, in passes of a fixed number against all at once."""
    passes = FRAMES_PER_PASS[bench.device.type]
    encoder = ClipImage(variant.clip, passes).load_published(clip.state_dict()).to(bench.device)
    count, size = CLIP_FRAMES[bench.device.type], variant.clip_image_size
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    return bench.compare(
        "extraction: CLIP", f"{count} of 64 frames", lambda: plain_clip_features(clip, frames.to(bench.device)),
        lambda: encoder.encode(frames), tolerance=TOLERANCE[torch.float32], dtype=torch.float32,
        note="one network; ours multiplies through oneDNN where that is faster",
    )


def video_encoder(bench: Bench, variant: Variant) -> Result:
    """Measure the sync features of one clip."""
    encoder = build_video_encoder(variant.name)
    assert isinstance(encoder, TextSynch)
    encoder.load_published(random_state_dict(encoder))
    encoder.to(bench.device).eval().requires_grad_(False)
    count, size, text_dim = SYNC_FRAMES[bench.device.type], variant.sync_image_size, variant.video_encoder.text_dim
    rng = torch.Generator().manual_seed(0)
    frames = (torch.rand(1, count, 3, size, size, generator=rng) * 2 - 1).to(bench.device)
    text = torch.randn(1, 6, text_dim, generator=rng).to(bench.device)
    mask = torch.ones(1, 6, dtype=torch.bool, device=bench.device)
    passes = SEGMENTS_PER_PASS[bench.device.type]

    @torch.no_grad()
    def ours() -> Tensor:
        return encoder.encode(frames, text, mask, segment_batch=passes)

    return bench.compare(
        "extraction: video encoder", f"{count} of 200 frames", lambda: plain_sync_features(encoder, frames, text, mask),
        ours, tolerance=TOLERANCE[torch.float32], dtype=torch.float32,
    )


def sound_encoder(bench: Bench, variant: Variant) -> Result:
    """Measure mel and VAE of one clip."""
    vae, mel = build_vae(variant.vae), build_mel(variant.mode).to(bench.device)
    vae.load_published(random_state_dict(vae))
    vae.to(bench.device).eval().requires_grad_(False)
    waveform = 0.1 * torch.randn(1, round(DURATION_SEC * mel.config.sampling_rate))
    waveform = waveform.to(bench.device)
    return bench.compare(
        "extraction: VAE", f"{DURATION_SEC:g} s", lambda: plain_latents(vae, mel(waveform))[0],
        lambda: encode_latents(waveform, mel, vae)[0], tolerance=TOLERANCE[torch.float32], dtype=torch.float32,
    )
