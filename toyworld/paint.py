"""Anti-aliased shapes on a square picture, in NumPy.

The picture is the unit square: x to the right, y downwards, both in [0, 1]; sizes are shares of its side. Every shape
is given by its signed distance (negative inside), and only the pixels around it are touched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

Colour = tuple[float, float, float]  # red, green and blue in [0, 255]


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour that is ``share`` of the way from ``a`` to ``b``."""
    red, green, blue = (x + share * (y - x) for x, y in zip(a, b, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float = 0.3) -> Colour:
    """Return ``colour`` moved towards black by ``share``."""
    return mixed(colour, (0, 0, 0), share)


class Canvas:
    """A picture that shapes are painted on, (size, size, 3) float32 in [0, 255].

    Args:
        pixels: the picture to begin with; it is copied.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels.astype(np.float32)
        self.size = pixels.shape[0]
        self._centres = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size

    def _paint(
        self,
        bounds: tuple[float, float, float, float],
        distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
        colour: Colour,
        alpha: float,
        shade: float,
    ) -> None:
        """Blend ``colour`` where ``distance(x, y)`` is negative; ``bounds`` (x0, y0, x1, y1) hold the whole shape."""
        margin, size = 1.0 / self.size, self.size
        x0, x1 = (min(max(int(v * size), 0), size) for v in (bounds[0] - margin, bounds[2] + margin + 1 / size))
        y0, y1 = (min(max(int(v * size), 0), size) for v in (bounds[1] - margin, bounds[3] + margin + 1 / size))
        if x0 >= x1 or y0 >= y1 or alpha <= 0:
            return
        x, y = self._centres[None, x0:x1], self._centres[y0:y1, None]
        cover = alpha * np.clip(0.5 - distance(x, y) * size, 0, 1)  # (h, w)
        paint = np.asarray(colour, dtype=np.float32)
        if shade:  # light comes from above, a little from the left
            down = (y - bounds[1]) / (bounds[3] - bounds[1]) + 0.4 * (x - bounds[0]) / (bounds[2] - bounds[0]) - 0.7
            paint = paint * (1 - shade * down)[..., None]  # (h, w, 3)
        area = self.pixels[y0:y1, x0:x1]
        area += cover[..., None] * (paint - area)

    def disc(
        self, x: float, y: float, rx: float, ry: float | None = None, colour: Colour = (0, 0, 0), angle: float = 0.0,
        alpha: float = 1.0, shade: float = 0.35,
    ) -> None:
        """Paint an ellipse of half axes ``rx`` and ``ry`` (a disc without ``ry``), turned clockwise by ``angle``."""
        ry = rx if ry is None else ry
        rx, ry = max(rx, 1e-4), max(ry, 1e-4)
        cos, sin = math.cos(angle), math.sin(angle)
        half_w, half_h = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)

        def distance(px: np.ndarray, py: np.ndarray) -> np.ndarray:
            u, v = (px - x) * cos + (py - y) * sin, (py - y) * cos - (px - x) * sin
            k = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
            return k * (k - 1) / (np.sqrt((u / rx**2) ** 2 + (v / ry**2) ** 2) + 1e-6)

        self._paint((x - half_w, y - half_h, x + half_w, y + half_h), distance, colour, alpha, shade)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, colour: Colour, alpha: float = 1.0) -> None:
        """Paint the outline of an upright ellipse, ``width`` thick."""

        def distance(px: np.ndarray, py: np.ndarray) -> np.ndarray:
            u, v = px - x, py - y
            k = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
            return np.abs(k * (k - 1) / (np.sqrt((u / rx**2) ** 2 + (v / ry**2) ** 2) + 1e-6)) - width / 2

        out = width / 2
        self._paint((x - rx - out, y - ry - out, x + rx + out, y + ry + out), distance, colour, alpha, 0.0)

    def line(
        self, x0: float, y0: float, x1: float, y1: float, width: float, colour: Colour, alpha: float = 1.0,
        shade: float = 0.0,
    ) -> None:
        """Paint a line ``width`` thick with round ends."""
        dx, dy = x1 - x0, y1 - y0
        length_squared = max(dx * dx + dy * dy, 1e-9)

        def distance(px: np.ndarray, py: np.ndarray) -> np.ndarray:
            along = np.clip(((px - x0) * dx + (py - y0) * dy) / length_squared, 0, 1)
            return np.sqrt((px - x0 - along * dx) ** 2 + (py - y0 - along * dy) ** 2) - width / 2

        out = width / 2
        bounds = (min(x0, x1) - out, min(y0, y1) - out, max(x0, x1) + out, max(y0, y1) + out)
        self._paint(bounds, distance, colour, alpha, shade)

    def box(
        self, x: float, y: float, half_w: float, half_h: float, colour: Colour, radius: float = 0.012,
        alpha: float = 1.0, shade: float = 0.35,
    ) -> None:
        """Paint an upright rectangle around (x, y) with round corners."""
        radius = min(radius, half_w, half_h)

        def distance(px: np.ndarray, py: np.ndarray) -> np.ndarray:
            u, v = np.abs(px - x) - half_w + radius, np.abs(py - y) - half_h + radius
            return np.sqrt(np.maximum(u, 0) ** 2 + np.maximum(v, 0) ** 2) + np.minimum(np.maximum(u, v), 0) - radius

        self._paint((x - half_w, y - half_h, x + half_w, y + half_h), distance, colour, alpha, shade)

    def polygon(
        self, points: Sequence[tuple[float, float]], colour: Colour, alpha: float = 1.0, shade: float = 0.35
    ) -> None:
        """Paint a convex polygon, its corners clockwise as seen on the picture."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]

        def distance(px: np.ndarray, py: np.ndarray) -> np.ndarray:
            distances = []
            for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
                length = math.hypot(bx - ax, by - ay) + 1e-9
                distances.append(((px - ax) * (by - ay) - (py - ay) * (bx - ax)) / length)
            return functools.reduce(np.maximum, distances)

        self._paint((min(xs), min(ys), max(xs), max(ys)), distance, colour, alpha, shade)
