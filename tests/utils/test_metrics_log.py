"""Logs, metrics and pictures."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from selva.utils.logging import setup_logging
from selva.utils.metrics_log import MetricsFile, smoothed
from selva.utils.plots import plot_losses, plot_spectrograms
from selva.utils.progress import Progress, StageTimes
from selva.utils.text import clock


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1:00 min"), (200, "3:20 min"), (3725, "1:02:05 h")])
def test_clock(seconds, text):
    assert clock(seconds) == text


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


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_loss_curves_are_800_pixels_wide(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append([{"step": i, "loss": 1 / i, "lr": 1e-4} for i in range(1, 50)])
    metrics.append([{"step": 25, "val_loss": 0.5}])
    plot_losses(metrics, tmp_path, "a run")
    assert png_size(tmp_path / "loss_raw.png")[0] == png_size(tmp_path / "loss_smoothed.png")[0] == 800
    assert (tmp_path / "loss_raw.png").read_bytes() != (tmp_path / "loss_smoothed.png").read_bytes()


def test_no_losses_make_no_picture(tmp_path):
    plot_losses(MetricsFile(tmp_path / "metrics.jsonl"), tmp_path, "a run")
    assert not list(tmp_path.iterdir())


def test_spectrograms_of_any_length(tmp_path):
    plot_spectrograms([("tone", np.sin(np.arange(16_000) * 0.3)), ("short", np.zeros(10))], 16_000,
                             tmp_path / "s.png", "two sounds")
    assert png_size(tmp_path / "s.png")[0] == 800


def test_progress_writes_plain_lines_when_nobody_watches(caplog):
    caplog.set_level(logging.INFO, "selva")
    with Progress(10, "work", "clips", interval_sec=0) as progress:
        progress.update(4, "now a.mp4")
    assert "work 4/10 clips" in caplog.text and "a.mp4" in caplog.text


def test_only_rank_zero_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    setup_logging()
    logging.getLogger("selva.x").warning("from rank 1")
    logging.getLogger("selva.x").error("an error of rank 1")
    monkeypatch.setenv("RANK", "0")
    setup_logging()
    logging.getLogger("selva.x").info("from rank 0")
    stderr = capsys.readouterr().err
    assert "from rank 1" not in stderr and "error: an error of rank 1" in stderr and "from rank 0" in stderr


def test_stage_times_add_up_by_name_and_keep_their_order():
    times = StageTimes()
    for name in ("reading", "sampling", "reading"):
        with times.stage(name):
            pass
    times.seconds.update(reading=1.25, sampling=61.0)
    assert str(times) == "reading 1.2 s, sampling 1:01 min"
