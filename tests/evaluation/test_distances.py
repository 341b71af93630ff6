"""selva.evaluation.distances against the published programs, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
from golden_case import GoldenCase

from selva.evaluation import distances
from selva.utils.errors import UserError

CLOSE = 1e-10  # relative: both sides are float64 and follow the same formula
SINGULAR = 1e-6  # where a covariance has no inverse, the published matrix root itself is only as good as this


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return GoldenCase("metrics")


@pytest.fixture(scope="module")
def inputs(case) -> dict[str, np.ndarray]:
    found = {name: value.numpy() for name, value in case.inputs().items()}
    found["cosine_b"][0] = 0
    found["fd_ground_truth"] = case.stored["fd_ground_truth"]
    return found


def test_frechet_distances_are_the_published_ones(case, inputs):
    a, b = inputs["fd_generated"], inputs["fd_ground_truth"]

    def with_column(x, column, value):
        x = x.copy()
        x[:, column] = value if np.isscalar(value) else x[:, value[0]]
        return x

    sets = {
        "basic": (a, b, CLOSE),
        "few_samples": (inputs["fd_small_generated"], inputs["fd_small_ground_truth"], SINGULAR),
        "constant_column": (with_column(a, 3, 0.5), with_column(b, 3, 0.5), SINGULAR),
        "constant_column_one_side": (with_column(a, 3, 0.5), b, SINGULAR),
        "duplicate_column": (with_column(a, 5, [4]), with_column(b, 5, [4]), SINGULAR),
        "constant_sets": (np.ones((8, 4), np.float32), np.full((8, 4), 3, np.float32), CLOSE),
        "two_samples": (a[:2], b[:2], SINGULAR),
    }
    for name, (generated, reference, tolerance) in sets.items():
        found = distances.frechet_distance(generated, reference)
        assert found == pytest.approx(case.stored[f"fd/{name}"][0], rel=tolerance), name
        assert distances.frechet_distance(reference, generated) == pytest.approx(found, rel=1e-9)
    assert abs(distances.frechet_distance(a, a)) < 1e-9
    assert distances.frechet_distance(a, a + np.float32(0.5)) == pytest.approx(4, rel=1e-7)


def test_scores_of_logits_are_the_published_ones(case, inputs):
    mean, std = distances.inception_score(inputs["is_logits"])
    assert mean == pytest.approx(case.stored["is/mean"][0], rel=CLOSE)
    assert std == pytest.approx(case.stored["is/std"][0], rel=CLOSE)
    assert distances.inception_score(inputs["is_logits"][:10]) == pytest.approx((1, 0))
    kl = distances.kl_divergences(inputs["kl_ground_truth_logits"], inputs["kl_generated_logits"])
    assert kl.mean() == pytest.approx(case.stored["kl/softmax"][0], rel=1e-6)  # the published one computes in float32
    assert kl.shape == (96,) and np.all(kl > 0)
    assert np.abs(distances.kl_divergences(inputs["is_logits"], inputs["is_logits"])).max() < 1e-12


def test_cosines_are_the_published_ones(case, inputs):
    found = distances.cosines(inputs["cosine_a"], inputs["cosine_b"])
    assert np.abs(found - case.stored["cosine/per_pair"]).max() < 1e-6  # the published ones are float32
    assert found[0] == 0


def test_kernel_distances_are_the_published_ones(case, inputs):
    x, y = inputs["kad_background"], inputs["kad_evaluated"]
    for kernel in ("gaussian", "iq", "imq"):  # the published program computes in float32
        case_value = case.stored[f"kad/{kernel}"][0]
        assert distances.kernel_distance(x, y, kernel) == pytest.approx(case_value, abs=2e-5)
    assert distances.kernel_distance(x, y, bandwidth=2.0) == pytest.approx(
        case.stored["kad/gaussian_bandwidth_2"][0], abs=2e-5)
    assert distances.kernel_distance(y, x) == pytest.approx(case.stored["kad/swapped"][0], abs=2e-5)
    assert distances.kernel_distance(x, x) == pytest.approx(case.stored["kad/identical"][0], abs=2e-5)


def test_items_that_count_several_times_are_rows_that_stand_there_several_times(inputs):
    """Only copies of one item are never compared with each other."""
    x, y = inputs["kad_background"][:6].astype(np.float64), inputs["kad_evaluated"][:5].astype(np.float64)
    terms = distances.kernel_terms(x, y, bandwidth=3.0)
    counts = np.array([2, 1, 0, 1, 1, 1]), np.array([1, 1, 3, 0, 0])
    similarity = distances.KERNELS["gaussian"]
    gamma = 1 / (2 * 3.0**2 + distances.KAD_EPS)
    indices = [np.repeat(np.arange(len(c)), c) for c in counts]

    def mean_of_different(rows, index):
        d2 = distances.squared_distances(rows[index], rows[index])
        return similarity(d2, gamma)[index[:, None] != index[None]].mean()

    between = similarity(distances.squared_distances(x[indices[0]], y[indices[1]]), gamma).mean()
    expected = 100 * (mean_of_different(x, indices[0]) + mean_of_different(y, indices[1]) - 2 * between)
    assert terms.distance(*counts) == pytest.approx(expected, rel=1e-12)


def test_what_has_no_meaning_is_refused(inputs):
    a = inputs["fd_generated"]
    for call in (
        lambda: distances.frechet_distance(a[:1], a),
        lambda: distances.frechet_distance(a, a[:, :8]),
        lambda: distances.kernel_distance(a[:1], a),
        lambda: distances.kernel_distance(a, a, kernel="cosine"),
        lambda: distances.inception_score(a[:9]),
        lambda: distances.kl_divergences(a, a[:5]),
        lambda: distances.frechet_distance(np.where(a == a[3, 2], np.nan, a), a),
    ):
        with pytest.raises(UserError):
            call()
    assert "16 values" in (distances.too_few_for_frechet(a[:16], a) or "")
    assert distances.too_few_for_frechet(a[:17], a) is None
