"""A picture of the world: every thing of it at a moment when it sounds, and a scene of two things."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from selva.utils.plots import INK, RED, new_figure, save_figure
from toyworld.classes import CLASSES, UNSEEN
from toyworld.scene import Scene, make_scene

SEED, SECONDS, FPS, PIXELS = 3, 4.0, 25, 192
COLUMNS, LETTERS = 8, 26  # of a title in one line
TWO = ("bell", "drum")


def write_overview(path: Path) -> None:
    """Write the picture as a PNG; the same on every call."""
    shown = list(_shown())
    rows = -(-len(shown) // COLUMNS)
    figure = new_figure(2 * COLUMNS, 2.35 * rows + 0.4)
    figure.suptitle(f"What the toy world shows: {len(CLASSES)} things that tiny_16k knows, {len(UNSEEN)} that it does "
                    "not (red), and a scene of two", fontsize=13, color=INK)
    places = list(figure.subplots(rows, COLUMNS).flat)
    for axes in places:
        axes.set_axis_off()
    for axes, (title, colour, picture) in zip(places, shown, strict=False):  # the last row need not be full
        axes.imshow(picture)
        axes.set_title(textwrap.fill(title, LETTERS), fontsize=9, color=colour)
    save_figure(figure, path)


def _shown() -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (title, colour of the title, (PIXELS, PIXELS, 3) uint8)."""
    for index, (name, kind) in enumerate({**CLASSES, **UNSEEN}.items()):
        yield kind.description, RED if name in UNSEEN else INK, _moment(make_scene(SEED + index, [name], 1, SECONDS))
    yield "two things at once", INK, _moment(make_scene(SEED, TWO, len(TWO), SECONDS))


def _moment(scene: Scene) -> np.ndarray:
    """Return the picture shortly after something has begun, or in what runs, without noise."""
    scene = dataclasses.replace(scene, noise_sigma=0.0)  # which would make a large file
    after_sec = 0.8 if any(thing.kind.running for thing in scene.objects) else 1 / FPS
    frames = scene.frames(FPS, PIXELS)
    return frames[min(len(frames) - 1, round((scene.events()[0] + after_sec) * FPS))]
