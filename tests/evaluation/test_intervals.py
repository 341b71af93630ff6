"""selva.evaluation.intervals: intervals cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from selva.evaluation import intervals
from selva.evaluation.distances import kernel_terms


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        figure = intervals.mean_figure(rng.normal(3.0, 2.0, size=40))
        assert figure.low is not None and figure.high is not None
        assert figure.low < figure.value < figure.high and figure.items == 40
        covered.append(figure.low <= 3.0 <= figure.high)
    assert 0.88 <= np.mean(covered) <= 0.99  # 95 %, where 200 draws of it have a deviation of 1.5 %


def test_values_without_a_meaning_are_left_out():
    assert intervals.mean_figure(np.array([1.0, np.nan, 3.0])).items == 2
    assert intervals.mean_figure(np.array([2.0])) == intervals.Figure(2.0, None, None, 1)
    empty = intervals.mean_figure(np.array([np.nan]))
    assert np.isnan(empty.value) and empty.items == 0


def test_memory_of_many_items_is_bounded():
    assert sum(intervals._blocks(300)) == sum(intervals._blocks(10_000_000)) == intervals.RESAMPLES
    assert max(intervals._blocks(10_000_000)) == 1


@pytest.mark.parametrize("paired", [False, True])
def test_the_intervals_of_distances_between_sets_hold_the_truth(paired):
    rng = np.random.default_rng(2)
    covered = {"kernel": 0, "frechet": 0}
    for _ in range(20):
        a, b = (rng.normal(size=(60, 4)) for _ in range(2))
        kernel = intervals.kernel_figure(kernel_terms(a, b), paired=paired)
        assert kernel.low is not None and kernel.high is not None and kernel.low < kernel.value < kernel.high
        covered["kernel"] += kernel.low <= 0 <= kernel.high  # both sets are of one distribution
        shifted = intervals.frechet_figure(a, b + 1.0, paired=paired)
        assert shifted.low is not None and shifted.high is not None
        covered["frechet"] += shifted.low <= 4.0 + 0.3 <= shifted.high  # 4, and what 60 items add to it
    assert covered["kernel"] >= 15 and covered["frechet"] >= 15
