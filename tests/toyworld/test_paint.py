"""Shapes: as large as asked for, and without stairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from toyworld.paint import Canvas

WHITE = (255, 255, 255)


def area(paint, size: int = 200) -> float:
    """Return the share of the picture that ``paint(canvas)`` covers."""
    canvas = Canvas(np.zeros((size, size, 3)))
    paint(canvas)
    return float(canvas.pixels.mean() / 255)


@pytest.mark.parametrize(
    ("paint", "expected"),
    [
        (lambda c: c.disc(0.5, 0.5, 0.2, colour=WHITE, shade=0), math.pi * 0.04),
        (lambda c: c.disc(0.5, 0.5, 0.3, 0.1, colour=WHITE, angle=0.7, shade=0), math.pi * 0.03),
        (lambda c: c.box(0.4, 0.6, 0.2, 0.1, WHITE, radius=0.0, shade=0), 0.08),
        (lambda c: c.line(0.2, 0.2, 0.8, 0.2, 0.1, WHITE), 0.06 + math.pi * 0.0025),
        (lambda c: c.ring(0.5, 0.5, 0.3, 0.3, 0.02, WHITE), 2 * math.pi * 0.3 * 0.02),
        (lambda c: c.polygon([(0.2, 0.2), (0.8, 0.2), (0.8, 0.6), (0.2, 0.6)], WHITE, shade=0), 0.24),
        (lambda c: c.disc(0.0, 0.5, 0.2, colour=WHITE, shade=0), math.pi * 0.02),  # half of it outside
    ],
)
def test_shapes_cover_their_area(paint, expected):
    assert area(paint) == pytest.approx(expected, rel=0.02)
    assert area(paint, 40) == pytest.approx(expected, rel=0.05)  # also where pixels are large


def test_edges_are_smooth():
    canvas = Canvas(np.zeros((32, 32, 3)))
    canvas.disc(0.5, 0.5, 0.3, colour=WHITE, shade=0)
    values = canvas.pixels[..., 0]
    assert ((values > 10) & (values < 245)).sum() > 20


def test_what_lies_outside_is_left_alone():
    start = np.full((16, 16, 3), 7.0)
    canvas = Canvas(start)
    canvas.disc(2.0, 2.0, 0.2, colour=WHITE)
    canvas.line(-1, -1, -0.5, -0.5, 0.1, WHITE)
    np.testing.assert_array_equal(canvas.pixels, start)
