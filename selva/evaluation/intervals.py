"""Error bars: 95 % intervals by the bootstrap, so that a figure of a few clips does not pass for more than it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from selva.evaluation.distances import Array, KernelTerms, frechet_distance

LEVEL = 0.95
RESAMPLES = 2000
RESAMPLES_OF_SETS = 200  # of distances between sets, each of which costs as much as the figure itself
SEED = 0


@dataclass(frozen=True)
class Figure:
    """A figure with its interval.

    Attributes:
        value: the figure. low, high: bounds of its 95 % interval; None with fewer than two items.
        items: number of clips (or pairs) that it covers.
    """

    value: float
    low: float | None
    high: float | None
    items: int


def mean_figure(values: Array) -> Figure:
    """Return the mean of (n,) values with its percentile bootstrap interval (Efron, 1979); NaN is left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Figure(float("nan"), None, None, 0)
    if len(values) == 1:
        return Figure(float(values[0]), None, None, 1)
    rng = np.random.default_rng(SEED)
    means = np.concatenate([  # in blocks, so that memory does not grow with the number of clips times resamples
        values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in _blocks(len(values))
    ])
    low, high = _bounds(means)
    return Figure(float(values.mean()), low, high, len(values))


def _blocks(items: int) -> list[int]:
    """Return the sizes of blocks of resamples, each of at most about a million draws."""
    most = max(1, 1_000_000 // items)
    return [min(most, RESAMPLES - done) for done in range(0, RESAMPLES, most)]


def kernel_figure(terms: KernelTerms, *, paired: bool) -> Figure:
    """Return the kernel distance of two sets with its interval.

    Args:
        paired: item i of both sets is the same clip, so both are resampled together.
    """
    n, m = len(terms.xx), len(terms.yy)
    return _set_figure(lambda x, y: terms.distance(x, y), terms.distance(), n, m, paired)


def frechet_figure(generated: Array, reference: Array, *, paired: bool) -> Figure:
    """Return the Fréchet distance of two sets with its interval, see :func:`kernel_figure`."""
    def resampled(x: Array, y: Array) -> float:
        return frechet_distance(np.repeat(generated, x, axis=0), np.repeat(reference, y, axis=0))

    return _set_figure(resampled, frechet_distance(generated, reference), len(generated), len(reference), paired)


def _set_figure(resampled: Callable[[Array, Array], float], value: float, n: int, m: int, paired: bool) -> Figure:
    """Return the figure with the spread of its resamples laid around it.

    Drawing with replacement repeats items, which moves a distance between sets away from 0; only the spread of the
    resamples is used, not where they lie.
    """
    if min(n, m) < 3:
        return Figure(value, None, None, min(n, m))
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(RESAMPLES_OF_SETS):
        x = rng.multinomial(n, np.full(n, 1 / n))
        y = x if paired and n == m else rng.multinomial(m, np.full(m, 1 / m))
        if np.count_nonzero(x) > 1 and np.count_nonzero(y) > 1:
            found.append(resampled(x, y))
    low, high = _bounds(np.asarray(found) - np.mean(found) + value)
    return Figure(value, low, high, min(n, m))


def _bounds(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
