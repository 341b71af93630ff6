"""Inputs of `soundbench.py`, made once in a work folder and shared by all its processes: clips, and encoded scenes."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from sound_plan import SCENE_SETS, SEED_OFFSETS, Cell

from selva.features import NO_PICTURES, FeatureBundle, load_features, save_features
from selva.media import write_audio
from selva.utils.files import atomic_path
from selva.utils.lock import FolderLock
from selva.utils.torch_files import write_torch
from toyworld import CLASSES, UNSEEN
from toyworld.judging import RATE
from toyworld.measure import Case, EncodedCases, ToyGenerator, single_cases
from toyworld.scene import Scene, make_scene

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

    def clips(self, cell: Cell, wordings: int = 1, pictures: bool = True) -> Path:
        """Return the feature folder that a cell trains on; fewer clips are the first ones of more.

        Args:
            wordings: prompts of every clip; what the features were made with is one of them.
            pictures: False for clips of sound alone.
        """
        name = f"clips_{WORLD}/{cell.sound}-{cell.seed + SEED_OFFSETS[cell.scenes]}-{cell.clips}"
        folder = self._features(name, cell.sound, clip_seeds(cell))
        if wordings > 1:
            folder = self._with_wordings(folder, cell, wordings)
        return folder if pictures else self._without_pictures(folder)

    def _with_wordings(self, clips: Path, cell: Cell, count: int) -> Path:
        folder = clips.with_name(f"{clips.name}-{count}_wordings")

        def make() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            for number, prompts in enumerate(clip_prompts(cell, count, self.duration_sec)):
                name = clip_name(cell.sound, number)
                for suffix in (".npz", ".flac"):
                    shutil.copyfile(clips / f"{name}{suffix}", folder / f"{name}{suffix}")
                lines += [f"{name}.npz: {prompt}" for prompt in prompts]
            (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (folder / DONE_FILE).touch()

        _once(folder / DONE_FILE, make)
        return folder

    def _without_pictures(self, clips: Path) -> Path:
        folder = clips.with_name(f"{clips.name}-sound_only")

        def make() -> None:
            shutil.copytree(clips, folder, ignore=shutil.ignore_patterns(DONE_FILE, ".*"), dirs_exist_ok=True)
            for path in folder.glob("*.npz"):
                save_features(path, dataclasses.replace(load_features(path), settings=NO_PICTURES))
            (folder / DONE_FILE).touch()

        _once(folder / DONE_FILE, make)
        return folder

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
                write_torch({field: torch.cat([getattr(one, field).cpu() for one in encoded]) for field in fields},
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
                case = Case(scene, 0, scene.prompt(_prompt_rng(scene)))
                (encoded,) = self.maker.encode([case])
                path = folder / f"{clip_name(sound, number)}.npz"
                save_features(path, FeatureBundle(
                    encoded.clip_f, encoded.sync_f, self.duration_sec, case.prompt, self.maker.variant.name,
                    text_features=encoded.text_f))
                write_audio(path.with_suffix(".flac"), torch.from_numpy(scene.sound(RATE)), RATE)
            (folder / DONE_FILE).touch()

        _once(folder / DONE_FILE, make)
        return folder


def clip_seeds(cell: Cell) -> list[int]:
    """Return the seeds of the scenes that a cell trains on."""
    rng = np.random.default_rng([cell.seed + SEED_OFFSETS[cell.scenes], zlib.crc32(cell.sound.encode())])
    return [int(rng.integers(2**32, 2**40)) for _ in range(cell.clips)]


def clip_name(sound: str, number: int) -> str:
    return f"{sound}_{number:03d}"


def clip_prompts(cell: Cell, count: int = 1, duration_sec: float = 8.0) -> list[list[str]]:
    """Return ``count`` prompts of every clip that a cell trains on, the one of its features last."""
    scenes = (make_scene(seed, [cell.sound], duration_sec=duration_sec) for seed in clip_seeds(cell))
    return [scene.prompts(_prompt_rng(scene), count) for scene in scenes]


def _prompt_rng(scene: Scene) -> np.random.Generator:
    return np.random.default_rng([scene.seed, 7])


def trained_wordings(cell: Cell, count: int = 1, scenes: int = NEW_SCENES) -> list[bool]:
    """Return, for every new scene that judges a cell, whether a clip has its wording; colours make no difference."""
    colours = UNSEEN[cell.sound].colours
    trained = {_wording(prompt, colours) for prompts in clip_prompts(cell, count) for prompt in prompts}
    cases = single_cases([cell.sound], scenes, _first_seed(cell.scenes, cell.sound))
    return [_wording(case.prompt, colours) in trained for case in cases]


def _wording(prompt: str, colours: Iterable[str]) -> str:
    return " ".join("{colour}" if word in colours else word for word in prompt.split())


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
