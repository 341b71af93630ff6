"""Distances and scores over sets of features, with the formulas of av-benchmark and kadtk, in NumPy.

    features of two sets -> Fréchet distance, kernel distances
    class logits         -> inception score, Kullback-Leibler divergence
    paired embeddings    -> cosine

Everything but the difference of two means is computed in float64 from float32 features. The formulas are those that
MMAudio's paper reports (arXiv:2412.15322), so that figures can be compared; where the published programs answer with -1
or not-a-number, this module says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from selva.utils.errors import UserError
from selva.utils.text import counted

Array: TypeAlias = NDArray[Any]

IS_PARTS = 10
SHUFFLE_SEED = 2020  # of av-benchmark: the order in which rows are cut into parts
KAD_SCALE = 100.0
KAD_EPS = 1e-8
COSINE_FLOOR = 1e-8  # shorter vectors count as this long

KERNELS: dict[str, Callable[[Array, float], Array]] = {  # squared distance, gamma -> similarity
    "gaussian": lambda d2, gamma: np.exp(-gamma * d2),
    "iq": lambda d2, gamma: 1 / (1 + gamma * d2),
    "imq": lambda d2, gamma: 1 / np.sqrt(1 + gamma * d2),
}


def _rows(features: Array, name: str, least: int) -> Array:
    """Return (n, d) features as they came, checked.

    Raises:
        UserError: not two axes, values that are not finite, or fewer than ``least`` rows.
    """
    if features.ndim != 2:
        raise UserError(f"{name} features are {features.shape}, expected (items, features)")
    if len(features) < least:
        raise UserError(f"{name}: {counted(len(features), 'item')}, expected at least {least}")
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise UserError(f"{name} features of row {bad[0]} are not finite ({counted(len(bad), 'such row')})")
    return features


def _same_width(a: Array, b: Array) -> None:
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of different widths, {a.shape[1]} and {b.shape[1]}; both sets need the same network")


# ---------------------------------------------------------------------------------------------------------------
# distances between two sets
# ---------------------------------------------------------------------------------------------------------------


def frechet_distance(generated: Array, reference: Array) -> float:
    """Return the Fréchet distance of the normal distributions fitted to two sets; symmetric, 0 for equal sets.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) with covariances over n - 1 (Heusel et al., arXiv:1706.08500). The
    last term is the sum of the singular values of A B^T, where A and B are the centred rows over sqrt(n - 1): the same
    number as the matrix root of the published programs, without its failures where a covariance is singular.

    Args:
        generated, reference: (n, d) and (m, d). With n or m at most d the number mostly tells how few items there were;
            :func:`too_few_for_frechet` says so.

    Raises:
        UserError: fewer than two items in a set, other widths, values that are not finite.
    """
    a, b = _rows(generated, "generated", 2), _rows(reference, "reference", 2)
    _same_width(a, b)
    shift = a.mean(axis=0) - b.mean(axis=0)  # in the features' own precision, as the published program has it
    roots = [_root(x.astype(np.float64)) for x in (a, b)]
    spread = sum(float(np.square(root).sum()) for root in roots)
    return float(shift @ shift) + spread - 2 * float(np.linalg.norm(roots[0] @ roots[1].T, "nuc"))


def _root(rows: Array) -> Array:
    """Return a matrix R of at most d rows with R^T R = the covariance of (n, d) rows."""
    centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(rows) > rows.shape[1] else centred


def too_few_for_frechet(generated: Array, reference: Array) -> str | None:
    """Return the reason why a Fréchet distance of these two sets would mislead, or None."""
    fewest, width = min(len(generated), len(reference)), generated.shape[1]
    if fewest > width:
        return None
    return (f"{counted(fewest, 'item')} for features of {counted(width, 'value')}: a covariance needs more items than "
            "values, and the distance of fewer falls with every item that is added; the kernel distance (KD) has no "
            "such bias")


def kernel_distance(
    background: Array, evaluated: Array, kernel: str = "gaussian", bandwidth: float | None = None
) -> float:
    """Return the kernel distance of kadtk (KAD, arXiv:2502.15602): an unbiased squared mean discrepancy, times 100.

    Args:
        background, evaluated: (n, d) and (m, d), recordings and generated sounds. Not symmetric: the bandwidth, unless
            it is given, is the median distance between two items of ``evaluated``.
        kernel: one of ``KERNELS``.

    Returns:
        About 0 for sets of the same distribution, on either side of it.

    Raises:
        UserError: fewer than two items in a set, other widths, an unknown kernel.
    """
    return float(kernel_terms(background, evaluated, kernel, bandwidth).distance())


def kernel_terms(
    background: Array, evaluated: Array, kernel: str = "gaussian", bandwidth: float | None = None
) -> KernelTerms:
    """Return the similarities that :func:`kernel_distance` averages; takes and raises what it does."""
    x, y = (_rows(rows, name, 2).astype(np.float64)
            for rows, name in ((background, "background"), (evaluated, "evaluated")))
    _same_width(x, y)
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}, expected one of {', '.join(KERNELS)}")
    between_y = squared_distances(y, y)
    if bandwidth is None:
        bandwidth = float(np.sqrt(_lower_median(between_y[np.triu_indices(len(y), 1)])))
    gamma = 1 / (2 * bandwidth**2 + KAD_EPS)
    similarity = KERNELS[kernel]
    return KernelTerms(*(similarity(d2, gamma) for d2 in (squared_distances(x, x), between_y, squared_distances(x, y))))


class KernelTerms:
    """Similarities within and between two sets, of which the distance is a weighted mean.

    Attributes:
        xx: (n, n). yy: (m, m). xy: (n, m).
    """

    def __init__(self, xx: Array, yy: Array, xy: Array) -> None:
        self.xx, self.yy, self.xy = xx, yy, xy

    def distance(self, x_counts: Array | None = None, y_counts: Array | None = None) -> float:
        """Return the distance where item i counts ``counts[i]`` times; copies of an item are not compared."""
        x = np.ones(len(self.xx)) if x_counts is None else np.asarray(x_counts, dtype=np.float64)
        y = np.ones(len(self.yy)) if y_counts is None else np.asarray(y_counts, dtype=np.float64)
        between = float(x @ self.xy @ y) / float(x.sum() * y.sum())
        return KAD_SCALE * (_mean_of_pairs(self.xx, x) + _mean_of_pairs(self.yy, y) - 2 * between)


def _mean_of_pairs(similarity: Array, counts: Array) -> float:
    """Return the mean over pairs of different items, each pair as often as its counts say."""
    own = np.diagonal(similarity)
    total = float(counts @ similarity @ counts) - float((counts**2) @ own)
    return total / (float(counts.sum()) ** 2 - float((counts**2).sum()))


def squared_distances(a: Array, b: Array) -> Array:
    """Return the (n, m) squared Euclidean distances of the rows of (n, d) and (m, d), none below 0."""
    d2 = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None] - 2 * (a @ b.T)
    return np.maximum(d2, 0)


def _lower_median(values: Array) -> float:
    """Return the median; of an even number of values the lower of the two in the middle."""
    return float(np.partition(values, (len(values) - 1) // 2)[(len(values) - 1) // 2])


# ---------------------------------------------------------------------------------------------------------------
# class logits
# ---------------------------------------------------------------------------------------------------------------


def inception_score(logits: Array) -> tuple[float, float]:
    """Return the mean and the population deviation of the inception score over 10 parts (arXiv:1606.03498).

    Args:
        logits: (n, classes). The rows are shuffled with the seed of av-benchmark before they are cut into parts; with
            exactly 10 rows every part scores 1.

    Raises:
        UserError: fewer than 10 rows, or values that are not finite.
    """
    rows = _rows(logits, "generated", IS_PARTS).astype(np.float64)
    log_p = _log_softmax(rows[np.random.RandomState(SHUFFLE_SEED).permutation(len(rows))])
    scores = []
    for part in range(IS_PARTS):
        log_q = log_p[part * len(rows) // IS_PARTS : (part + 1) * len(rows) // IS_PARTS]
        p = np.exp(log_q)
        scores.append(np.exp((p * (log_q - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kl_divergences(reference_logits: Array, generated_logits: Array) -> Array:
    """Return (n,) KL(reference || generated) of the softmax of paired (n, classes) logits, summed over classes.

    Raises:
        UserError: other shapes, or values that are not finite.
    """
    reference, generated = (_rows(x, name, 1).astype(np.float64) for x, name in
                            ((reference_logits, "reference"), (generated_logits, "generated")))
    if reference.shape != generated.shape:
        raise UserError(f"logits are {reference.shape} and {generated.shape}, expected pairs")
    log_p, log_q = _log_softmax(reference), _log_softmax(generated)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cosines(a: Array, b: Array) -> Array:
    """Return (n,) cosines of paired (n, d) vectors; a vector of zeros has the cosine 0 with every other.

    Raises:
        UserError: other shapes, or values that are not finite.
    """
    a, b = (_rows(x, name, 1).astype(np.float64) for x, name in ((a, "first"), (b, "second")))
    if a.shape != b.shape:
        raise UserError(f"embeddings are {a.shape} and {b.shape}, expected pairs")
    lengths = [np.maximum(np.linalg.norm(x, axis=1), COSINE_FLOOR) for x in (a, b)]
    return (a * b).sum(axis=1) / (lengths[0] * lengths[1])
