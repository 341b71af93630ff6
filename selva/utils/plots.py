"""Pictures: loss curves and spectrograms, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selva.utils.files import atomic_path
from selva.utils.metrics_log import MetricsFile, smoothed

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor



def new_figure(width_in: float, height_in: float) -> Figure:
    """Return a matplotlib figure that needs no display and registers nowhere; 100 dots per inch."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=100, layout="constrained")


def save_figure(figure: Figure, path: Path, comment: str = "") -> None:
    """Write a figure, whole or not at all; ``comment`` is stored in the file (PNG)."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Comment": comment} if comment else None)


def plot_losses(metrics: MetricsFile, folder: Path, title: str) -> None:
    """Write ``loss_raw.png`` and ``loss_smoothed.png``, with validation loss and learning rate drawn in."""
    steps, losses = metrics.series("loss")
    if not steps:
        return

    for name, values, label in (
        ("loss_raw.png", losses, "training loss"),
        ("loss_smoothed.png", smoothed(losses), "training loss, smoothed"),
    ):
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        axes.plot(steps, values, color="tab:blue", linewidth=1, label=label, marker="." if len(steps) < 30 else None)
        val_steps, val_losses = metrics.series("val_loss")
        if val_steps:
            axes.plot(val_steps, val_losses, color="tab:red", marker="o", markersize=3, label="validation loss")
            best = val_steps[min(range(len(val_losses)), key=val_losses.__getitem__)]
            axes.axvline(best, color="tab:red", linewidth=0.8, linestyle=":", label=f"best: step {best}")
        lr_axes = axes.twinx()
        lr_axes.plot(*metrics.series("lr"), color="tab:gray", linewidth=1, linestyle="--", label="learning rate")
        lr_axes.set_ylabel("learning rate")
        lr_axes.set_ylim(bottom=0)
        axes.set_title(title, pad=24)
        axes.set_xlabel("optimiser step")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("mean squared error of the velocity")
        axes.grid(alpha=0.3)
        handles = [*axes.get_lines(), *lr_axes.get_lines()]
        labels = [str(h.get_label()) for h in handles]
        # Above the axes, where no curve can run behind it.
        axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, frameon=False)
        save_figure(figure, folder / name)


# -- spectrograms ------------------------------------------------------------------------------------------------------


def power_spectrogram(samples: Tensor, window: Tensor, hop: int) -> Tensor:
    """Return the power (bins, frames) of mono sound (samples,), where a sine at full scale has 1.

    Args:
        window: (size,) of every frame, in the type of the samples, in which everything is computed.
        hop: samples from one frame to the next; the first begins with the sound, and only full frames count.
    """
    import torch

    spectrum = torch.stft(samples, len(window), hop, window=window, center=False, return_complex=True)
    return (spectrum.abs() * 2 / window.sum()).square()


def draw_spectrogram(
    axes: Any, level: np.ndarray, size: tuple[float, float], limits: tuple[float, float], **options: Any
) -> Any:
    """Draw a level in dB, (rows, frames), with the first row at the bottom; return the image.

    Args:
        size: width and height in the units of the axes. limits: levels of the darkest and of the brightest colour.
        options: ``cmap`` and ``interpolation`` of :meth:`matplotlib.axes.Axes.imshow`.
    """
    (width, height), (darkest, brightest) = size, limits
    return axes.imshow(level, origin="lower", aspect="auto", extent=(0, width, 0, height), vmin=darkest, vmax=brightest,
                       **options)


def plot_spectrograms(panels: Sequence[tuple[str, Any]], sampling_rate: int, path: Path, title: str) -> None:
    """Write a PNG of one spectrogram per ``(label, waveform)``, mono (samples,), on common axes in dB."""
    import numpy as np
    import torch

    figure = new_figure(8, 0.6 + 2.2 * len(panels))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    size = 1024
    window = torch.hann_window(size, periodic=False, dtype=torch.float64)
    images = []
    for axes, (label, waveform) in zip(all_axes, panels, strict=True):
        samples = np.pad(np.asarray(waveform, dtype=np.float64), (0, max(0, size - len(waveform))))
        power = power_spectrogram(torch.from_numpy(samples), window, size // 4)
        level = 20 * torch.log10(power.sqrt() + 1e-6)  # dB of full scale
        seconds, highest_khz = len(samples) / sampling_rate, sampling_rate / 2000
        images.append(draw_spectrogram(axes, level.numpy(), (seconds, highest_khz), (-100, 0)))
        axes.set_title(label, fontsize=9)
        axes.set_ylabel("kHz")
    all_axes[-1].set_xlabel("seconds")
    figure.colorbar(images[-1], ax=list(all_axes), label="dB of full scale")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
