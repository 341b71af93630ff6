"""Rows of metrics, and their moving average."""

from __future__ import annotations

import math

import pytest

from selva.utils.metrics_log import MetricsFile, smoothed


def test_smoothing_is_unbiased_at_its_start():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 3.0], decay=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_metrics_survive_a_kill_and_are_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 2, "val_loss": 1.0}])
    metrics.append([{"step": 3, "loss": 1.5}])
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    again = MetricsFile(path)
    assert again.series("loss") == ([1, 3], [2.0, 1.5]) and again.series("val_loss") == ([2], [1.0])
    again.cut_after(2)
    assert MetricsFile(path).series("loss") == ([1], [2.0])
