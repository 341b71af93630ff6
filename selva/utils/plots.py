"""Pictures: loss curves and spectrograms, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selva.utils.files import atomic_path
from selva.utils.metrics_log import MetricsFile, smoothed
from selva.utils.spectrogram import LEVEL_LABEL, draw_levels, mel_levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is trained on, what is held out or wrong, what is beside the point, and text: the same in all pictures.
BLUE, RED, GREY, INK = "#2b6cb0", "#b3261e", "#5f6368", "#202124"
OF_SETS = ("#e07b39", "#7b3fa0", "#2e8b57", "#b0892b", "#c2185b")  # single data sets, which are held out too
LEGEND_COLUMNS = 5
MOST_SETS = 5  # whose curves can be told apart, those that end highest

def new_figure(width_in: float, height_in: float) -> Figure:
    """Return a matplotlib figure that needs no display and registers nowhere; 100 dots per inch."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=100, layout="constrained")


def save_figure(figure: Figure, path: Path, comment: str = "") -> None:
    """Write a figure, whole or not at all; ``comment`` is stored in the file (PNG)."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Comment": comment} if comment else None)


def plot_losses(metrics: MetricsFile, folder: Path, title: str) -> None:
    """Write ``loss_raw.png`` and ``loss_smoothed.png``, with validation loss and learning rate drawn in.

    Single losses scatter far more than they fall, so the raw ones are pale, with the smoothed curve in front.
    """
    if not metrics.series("loss")[0]:
        return
    for name, raw in (("loss_raw.png", True), ("loss_smoothed.png", False)):
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        lr_axes = axes.twinx()
        lr_axes.plot(*metrics.series("lr"), color=GREY, linewidth=1, linestyle="--", label="learning rate (right)")
        lr_axes.set_ylabel("learning rate", fontsize=9, color=GREY)
        lr_axes.set_ylim(bottom=0)
        lr_axes.tick_params(labelsize=8)
        draw_losses(axes, metrics, raw=raw)
        handles = [*axes.get_lines(), *lr_axes.get_lines()]
        handles = [handle for handle in handles if not str(handle.get_label()).startswith("_")]
        rows = -(-len(handles) // LEGEND_COLUMNS)
        axes.set_title(title, pad=10 + 14 * rows, fontsize=10, parse_math=False)
        # Above the axes, where no curve can run behind it.
        axes.legend(handles, [str(handle.get_label()) for handle in handles], loc="lower center",
                    bbox_to_anchor=(0.5, 1), ncols=LEGEND_COLUMNS, fontsize=8, frameon=False)
        save_figure(figure, folder / name)


def draw_losses(axes: Any, metrics: MetricsFile, *, raw: bool) -> None:
    """Draw the training loss, smoothed, and the validation loss; ``raw``: the loss of every logged step too, pale."""
    steps, losses = metrics.series("loss")
    mark = "." if len(steps) < 30 else None
    if raw:
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1, label="training loss", marker=mark)
    axes.plot(steps, smoothed(losses), color=BLUE, linewidth=1.8, label="training loss, smoothed",
              marker=None if raw else mark)
    val_steps, val_losses = metrics.series("val_loss")
    if val_steps:
        axes.plot(val_steps, val_losses, color=RED, marker="o", markersize=3, label="loss of held-out clips")
        best = val_steps[min(range(len(val_losses)), key=val_losses.__getitem__)]
        axes.axvline(best, color=RED, linewidth=0.8, linestyle=":", label=f"best: step {best}")
    of_sets = [(name, *series) for name, series in metrics.set_losses().items() if series[1]]
    of_sets.sort(key=lambda one: -one[2][-1])
    for color, (name, steps_of_set, values) in zip(OF_SETS, of_sets[:MOST_SETS], strict=False):
        axes.plot(steps_of_set, values, color=color, linestyle="--", linewidth=1.2, marker="o", markersize=2,
                  label=f"held out: {name.lstrip('_')}")
    axes.set_xlabel("optimiser step", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("loss (mean squared error of the velocity)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


# -- spectrograms ------------------------------------------------------------------------------------------------------


def plot_spectrograms(panels: Sequence[tuple[str, Any]], sampling_rate: int, path: Path, title: str) -> None:
    """Write a PNG of one spectrogram per ``(label, waveform)``, mono (samples,), on common axes and colours."""
    import numpy as np
    import torch

    figure = new_figure(8, 0.6 + 2.2 * len(panels))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    sounds = [np.asarray(waveform, dtype=np.float64) for _, waveform in panels]
    levels = [mel_levels(torch.from_numpy(sound), sampling_rate) for sound in sounds]
    loudest = float(max(level.max() for level in levels))
    images = []
    for axes, (label, _), sound, level in zip(all_axes, panels, sounds, levels, strict=True):
        images.append(draw_levels(axes, level, len(sound) / sampling_rate, sampling_rate, loudest))
        axes.set_title(label, fontsize=9)
        if axes is not all_axes[-1]:
            axes.set_xlabel("")
    all_axes[-1].set_xlim(0, max(len(sound) for sound in sounds) / sampling_rate)
    bar = figure.colorbar(images[-1], ax=list(all_axes))
    bar.set_label(LEVEL_LABEL, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)
