"""Scenes rendered once and kept on disk, so that every later use costs a read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from selva.sequence import SYNC_FPS
from selva.utils.files import atomic_path
from selva.utils.progress import Progress
from toyworld import CLASSES, Scene, make_scene
from toyworld.motion import gate


@dataclass(frozen=True)
class PoolConfig:
    """A choice of scenes: ``count`` of them from seed ``first_seed`` on, every second one with two objects."""

    first_seed: int
    count: int
    duration_sec: float
    size: int  # pixels per side
    fps: float = SYNC_FPS
    classes: tuple[str, ...] | None = None  # None: those that the model is trained on

    def scene(self, index: int) -> Scene:
        classes = tuple(CLASSES) if self.classes is None else self.classes
        objects = 2 if index % 2 and len(classes) > 1 else 1
        return make_scene(self.first_seed + index, classes, objects, self.duration_sec)


class ScenePool:
    """The pictures (count, frames, size, size, 3) uint8 of many scenes, in a file that is made when it is missing."""

    def __init__(self, config: PoolConfig, folder: Path) -> None:
        self.config = config
        self.scenes = [config.scene(i) for i in range(config.count)]
        path, note = folder / "frames.npy", folder / "pool.json"
        wanted = json.dumps(asdict(config))
        if not (path.is_file() and note.is_file() and note.read_text(encoding="utf-8") == wanted):
            self._render(path)
            note.write_text(wanted, encoding="utf-8")
        self.frames = np.load(path, mmap_mode="r")

    def _render(self, path: Path) -> None:
        size = self.config.size
        shape = (self.config.count, int(self.config.duration_sec * self.config.fps), size, size, 3)
        with atomic_path(path) as temporary, Progress(len(self.scenes), "render", "scenes") as progress:
            file = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            for index, scene in enumerate(self.scenes):
                file[index] = scene.frames(self.config.fps, size)
                progress.update(index + 1)
            file.flush()


def onset_map(scene: Scene, objects: Sequence[int], times: np.ndarray, width_sec: float) -> tuple[np.ndarray, ...]:
    """Return nearness and strength of the events of some objects, and the level of running sources, at ``times``.

    Three float32 arrays of the shape of ``times``: a Gaussian of deviation ``width_sec`` around every event, the same
    multiplied by its strength, and the level of running sources.
    """
    near, strong, running = (np.zeros(times.shape) for _ in range(3))
    for index in objects:
        thing = scene.objects[index]
        for event in thing.events:
            bump = np.exp(-0.5 * ((times - event.time_sec) / width_sec) ** 2)
            near, strong = np.maximum(near, bump), np.maximum(strong, event.strength * bump)
        if thing.kind.running:
            running += gate(times.ravel(), thing.events).reshape(times.shape)
    return near.astype(np.float32), strong.astype(np.float32), running.astype(np.float32)
