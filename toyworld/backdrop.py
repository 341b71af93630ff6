"""The background of a scene: a wall and a floor, plain or with clutter; and the noise of the camera."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from toyworld.paint import Canvas, Colour, darker, mixed

HORIZON = 0.72
_WALLS: tuple[Colour, ...] = (
    (176, 186, 196), (196, 188, 172), (164, 178, 162), (186, 172, 184), (120, 132, 148), (206, 204, 198),
    (92, 100, 116),
)
_FLOORS: tuple[Colour, ...] = ((124, 104, 86), (98, 104, 110), (142, 130, 116), (86, 82, 90))
_NOISE_TILE = 509  # a prime, so that shifts do not repeat soon


@dataclass(frozen=True)
class Backdrop:
    """Colours of wall and floor, and the clutter: (x, y, half width, half height, colour, is a disc) each."""

    wall: Colour
    floor: Colour
    clutter: tuple[tuple[float, float, float, float, Colour, bool], ...]

    def paint(self, size: int) -> Canvas:
        """Return a new picture of it."""
        y = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]  # (size, 1)
        x = y.T
        wall = np.asarray(self.wall, np.float32) * (1.08 - 0.16 * y - 0.05 * x)[..., None]
        floor = np.asarray(self.floor, np.float32) * (0.78 + 0.3 * y + 0 * x)[..., None]
        share = np.clip((y - HORIZON) * size + 0.5, 0, 1)[..., None]
        canvas = Canvas(wall + share * (floor - wall))
        for cx, cy, half_w, half_h, colour, is_disc in self.clutter:
            if is_disc:
                canvas.disc(cx, cy, half_w, half_h, colour=colour, shade=0.15)
            else:
                canvas.box(cx, cy, half_w, half_h, colour, shade=0.15)
        return canvas


def draw_backdrop(rng: np.random.Generator, cluttered: bool) -> Backdrop:
    """Return a random backdrop. Clutter is muted, so that the things stay what can be seen best."""
    wall, floor = _WALLS[rng.integers(len(_WALLS))], _FLOORS[rng.integers(len(_FLOORS))]
    clutter = []
    for _ in range(rng.integers(5, 11) if cluttered else 0):
        on_wall = rng.random() < 0.75
        base = wall if on_wall else floor
        red, green, blue = rng.uniform(40, 225, 3).tolist()
        colour = mixed(base, (red, green, blue), float(rng.uniform(0.15, 0.4)))
        y = rng.uniform(0.05, HORIZON - 0.06) if on_wall else rng.uniform(HORIZON + 0.03, 0.98)
        half = rng.uniform(0.03, 0.13, 2) * (1.0, 1.0 if on_wall else 0.35)
        clutter.append((float(rng.random()), float(y), float(half[0]), float(half[1]), darker(colour, 0.08),
                        bool(rng.random() < 0.4)))
    return Backdrop(wall, floor, tuple(clutter))


@functools.lru_cache(maxsize=1)
def _noise_tile() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_NOISE_TILE, _NOISE_TILE, 3)).astype(np.float32)


def camera_noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """Return (size, size, 3) noise of that standard deviation; cut at random out of one tile, which is much faster."""
    tile = _noise_tile()
    if size > _NOISE_TILE:
        return sigma * rng.standard_normal((size, size, 3), dtype=np.float32)
    row, column = rng.integers(0, _NOISE_TILE - size + 1, 2)
    return sigma * tile[row : row + size, column : column + size]
