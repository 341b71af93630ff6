"""Inputs of `soundbench.py`, made once in a work folder and shared by all its processes: clips, and encoded scenes."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from sound_plan import SCENE_SETS, SEED_OFFSETS, Cell

from selva.features import FeatureBundle, save_features
from selva.media import write_audio
from selva.utils.files import atomic_path
from selva.utils.lock import FolderLock
from toyworld import CLASSES, UNSEEN
from toyworld.judging import RATE
from toyworld.measure import Case, EncodedCases, ToyGenerator, single_cases
from toyworld.scene import make_scene

log = logging.getLogger("selva.soundbench")

T = TypeVar("T")

KNOWN = "known"  # name of the set of scenes of the ten trained classes
NEW_SCENES, KNOWN_SCENES = 24, 6  # of a new sound; of each of the ten known ones
HELD_OUT_CLIPS = 12  # whose loss is measured; nothing is trained on them
DONE_FILE = "complete"
WORLD = 2  # of the world's sounds, in the names of folders: clips of an earlier one in a work folder are not used


class Inputs:
    """Clips of new sounds as feature folders, and scenes with the features that judge a model.

    Args:
        folder: where everything is kept. maker: the networks.
        duration_sec: of clips and scenes. new_scenes, known_scenes, held_out_clips: how many of each.
    """

    def __init__(
        self, folder: Path, maker: ToyGenerator, duration_sec: float = 8.0, new_scenes: int = NEW_SCENES,
        known_scenes: int = KNOWN_SCENES, held_out_clips: int = HELD_OUT_CLIPS,
    ) -> None:
        self.folder, self.maker, self.duration_sec = folder, maker, duration_sec
        self.new_scenes, self.known_scenes, self.held_out_clips = new_scenes, known_scenes, held_out_clips

    def clips(self, cell: Cell) -> Path:
        """Return the feature folder that a cell trains on; fewer clips are the first ones of more."""
        seed = cell.seed + SEED_OFFSETS[cell.scenes]
        rng = np.random.default_rng([seed, zlib.crc32(cell.sound.encode())])
        seeds = [int(rng.integers(2**32, 2**40)) for _ in range(cell.clips)]
        return self._features(f"clips_{WORLD}/{cell.sound}-{seed}-{cell.clips}", cell.sound, seeds)

    def held_out(self, cell: Cell) -> Path:
        """Return the feature folder of the clips whose loss is measured, the same for all seeds."""
        first = _first_seed(cell.scenes, cell.sound) + 5000
        return self._features(f"held_out_{WORLD}/{cell.scenes}-{cell.sound}", cell.sound,
                              range(first, first + self.held_out_clips))

    def scenes(self, scenes: str, name: str) -> tuple[list[Case], list[EncodedCases]]:
        """Return the scenes of a new sound, or of all known ones in turn, and their features."""
        names, count = (list(CLASSES), self.known_scenes) if name == KNOWN else ([name], self.new_scenes)
        cases = single_cases(names, count, _first_seed(scenes, name), self.duration_sec)
        path = self.folder / "scenes" / f"{scenes}-{name}-{len(cases)}.pt"
        fields = [field.name for field in dataclasses.fields(EncodedCases)]

        def make() -> None:
            log.info("encoding scenes (%d): %s", len(cases), name)
            encoded = self.maker.encode(cases)
            with atomic_path(path) as temporary:
                torch.save({field: torch.cat([getattr(one, field).cpu() for one in encoded]) for field in fields},
                           temporary)

        _once(path, make)
        stored = torch.load(path, weights_only=True)
        rows = zip(*(stored[field].split(1) for field in fields), strict=True)
        return cases, [EncodedCases(*row) for row in rows]

    def _features(self, name: str, sound: str, seeds: Sequence[int]) -> Path:
        folder = self.folder / name

        def make() -> None:
            log.info("making clips (%d): %s", len(seeds), name)
            for number, seed in enumerate(seeds):
                scene = make_scene(seed, [sound], duration_sec=self.duration_sec)
                case = Case(scene, 0, scene.prompt(np.random.default_rng([seed, 7])))
                (encoded,) = self.maker.encode([case])
                path = folder / f"{sound}_{number:03d}.npz"
                save_features(path, FeatureBundle(
                    encoded.clip_f, encoded.sync_f, self.duration_sec, case.prompt, self.maker.variant.name,
                    text_features=encoded.text_f))
                write_audio(path.with_suffix(".flac"), torch.from_numpy(scene.sound(RATE)), RATE)
            (folder / DONE_FILE).touch()

        _once(folder / DONE_FILE, make)
        return folder


def _first_seed(scenes: str, name: str) -> int:
    """Return the first of ten thousand seeds that a set of scenes has for itself."""
    return SCENE_SETS[scenes] + 10_000 * [KNOWN, *UNSEEN].index(name)


def _once(path: Path, make: Callable[[], None]) -> None:
    """Call ``make``, which leaves ``path``, unless it is there; another process that makes it is waited for."""
    if path.exists():
        return
    with FolderLock(path.parent / f".{path.name}.lock", "prepares", wait=True):
        if not path.exists():
            make()
