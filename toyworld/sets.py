"""Data sets of the world for the training of a base model: clips and sounds, and what the extraction makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from selva.extraction.config import ExtractionConfig
from selva.extraction.extract import extract
from selva.media import write_audio
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.progress import Progress
from selva.weights.config import ModelConfig
from toyworld.classes import CLASSES
from toyworld.scene import Scene, make_scene

RATE = 16_000  # samples per second
SOUND_SEC = 8.2  # a little longer than the windows that are cut out of recordings
WINDOW_SEC = 8.1
SOUND_SEED = 500_000  # after those of the clips
SIZE = 224  # pixels per side of a clip


def make_sets(folder: Path, model: ModelConfig, videos: int, sounds: int, *, size: int = SIZE, seed: int = 0,
              lossless: bool = False) -> list[Path]:
    """Make clips of toy things and two data sets of them, video and sound only; return the sets.

    Clips and sounds that exist are not made again, and the extraction does what is missing.

    Args:
        folder: gets clips/, sounds/ and sets/.
        videos, sounds: how many of either; every class of the world in turn, each with one of its wordings.
        size: pixels per side of a clip, even. lossless: sound of the clips as FLAC instead of AAC.
        seed: of the first scene, below 500,000 away from those of other sets.

    Raises:
        UserError: a clip cannot be encoded.
    """
    clips, recordings = folder / "clips", folder / "sounds"
    prompts, windows, captions = [], ["id\tname\tstart_sample\tend_sample"], ["id\tcaption"]
    with Progress(videos + sounds, "making", "clips") as progress:
        for number in range(videos):
            scene, prompt = _scene(seed + number, number, 8.0)
            path = clips / f"clip_{number:05d}.mp4"
            if not path.exists():
                scene.write(path, size, rate=RATE, lossless=lossless)
            prompts.append(f"{path.stem}.npz: {prompt}")
            progress.update(number + 1)
        for number in range(sounds):
            scene, caption = _scene(seed + SOUND_SEED + number, number, SOUND_SEC)
            path = recordings / f"sound_{number:05d}.flac"
            if not path.exists():
                write_audio(path, torch.from_numpy(scene.sound(RATE)), RATE)
            windows.append(f"{path.stem}_0\t{path.stem}\t0\t{int(RATE * WINDOW_SEC)}")
            captions.append(f"{path.stem}\t{caption}")
            progress.update(videos + number + 1)
    for name, lines in (("prompts.txt", prompts), ("windows.tsv", windows), ("captions.tsv", captions)):
        atomic_write_text(folder / name, "\n".join(lines) + "\n")
    video, sound = folder / "sets" / "video", folder / "sets" / "sound"
    failed = extract(ExtractionConfig(
        inputs=[clips], output_dir=video, format="memmap", prompts=folder / "prompts.txt", workers=0, model=model))
    failed |= extract(ExtractionConfig(
        inputs=[folder / "windows.tsv"], output_dir=sound, format="memmap", recordings=recordings,
        captions=folder / "captions.tsv", workers=0, model=model))
    if failed:
        raise UserError(f"{folder}: not every clip could be encoded, see above")
    return [video, sound]


def _scene(seed: int, number: int, duration_sec: float) -> tuple[Scene, str]:
    """Return a scene with one thing, of the classes in turn, and words for it."""
    names = list(CLASSES)
    scene = make_scene(seed, [names[number % len(names)]], duration_sec=duration_sec)
    return scene, scene.prompt(np.random.default_rng([seed, 7]))
