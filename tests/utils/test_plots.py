"""Pictures of losses and of sounds."""

from __future__ import annotations

import numpy as np

from selva.utils.metrics_log import MetricsFile
from selva.utils.plots import draw_losses, new_figure, plot_losses, plot_spectrograms


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


def test_raw_losses_do_not_hide_the_curves(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append([{"step": i, "loss": 1 + i % 3, "lr": 1e-4} for i in range(1, 50)])
    axes = new_figure(8, 4).subplots()
    draw_losses(axes, metrics, raw=True)
    pale, smooth = axes.get_lines()
    assert pale.get_alpha() < 0.5 and pale.get_zorder() <= smooth.get_zorder()
    assert smooth.get_label() == "training loss, smoothed" and axes.get_xlabel() and "loss" in axes.get_ylabel()


def test_single_sets_have_curves_of_their_own(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append([{"step": i, "loss": 1.0, "lr": 1e-4} for i in range(1, 9)])
    metrics.append([{"step": 4, "val_loss": 0.5, "val_loss/gong": 0.4, "val_loss/_laser": 0.6}])
    assert metrics.set_losses() == {"gong": ([4], [0.4]), "_laser": ([4], [0.6])}
    axes = new_figure(8, 4).subplots()
    draw_losses(axes, metrics, raw=True)
    of_sets = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()[4:]}
    assert of_sets == {"held out: laser": [0.6], "held out: gong": [0.4]}
    metrics.append([{"step": 6, **{f"val_loss/set {i}": i for i in range(20)}}])
    draw_losses(axes := new_figure(8, 4).subplots(), metrics, raw=True)
    assert len(axes.get_lines()) == 9 and axes.get_lines()[-1].get_label() == "held out: set 15"
