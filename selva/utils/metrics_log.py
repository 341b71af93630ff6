"""What people look at: log lines, progress, ``metrics.jsonl``, loss curves and spectrograms."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selva.utils.files import atomic_path, atomic_write_text

log = logging.getLogger(__name__)

COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}


def is_main_process() -> bool:
    """Return whether this process speaks for all: rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class LineFormatter(logging.Formatter):
    """``message`` for news, ``warning: message`` for trouble; coloured on a terminal unless NO_COLOR is set."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        text = f"{record.levelname.lower()}: {text}"
        if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            return f"{COLOURS.get(record.levelno, '')}{text}\033[0m"
        return text


def setup_logging(debug: bool = False) -> None:
    """Send the package's log to stderr; processes other than rank 0 only report errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h.formatter, LineFormatter)] + [handler]
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if debug else logging.INFO
    logging.getLogger("selva").setLevel(level if is_main_process() else logging.ERROR)


class Progress:
    """Progress of ``total`` items on stderr: a bar on a terminal, else a plain line every ``interval_sec`` seconds."""

    def __init__(self, total: int, what: str, unit: str = "it", interval_sec: float = 10.0) -> None:
        self.total, self.what, self.unit, self.interval_sec = total, what, unit, interval_sec
        self.done, self.start = 0, time.monotonic()
        self._last_line = self.start
        self._bar = None
        if sys.stderr.isatty() and is_main_process():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True)

    def update(self, done: int, note: str = "") -> None:
        """Set the number of finished items; ``note`` stands behind the bar or the line."""
        step, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(step)
        elif time.monotonic() - self._last_line >= self.interval_sec and is_main_process():
            self._last_line = time.monotonic()
            seconds = self._last_line - self.start
            eta = seconds / max(done, 1) * (self.total - done)
            log.info("%s %d/%d %s, %.2g %s/s, %s left %s", self.what, done, self.total, self.unit, done / seconds,
                     self.unit, clock(eta), note)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def clock(seconds: float) -> str:
    """Return a duration as people read it: "48 s", "3:20 min", "1:02:05 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


class StageTimes:
    """Seconds spent in each named stage, in the order in which they were first entered; ``str()`` lists them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for ``name``; blocks may repeat, but not nest."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {f'{s:.1f} s' if s < 60 else clock(s)}" for name, s in self.seconds.items())


def peak_memory_bytes(device: Any) -> int:
    """Return the highest memory use so far: the allocator's on CUDA, else the resident set of this process."""
    if getattr(device, "type", device) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------------------
# metrics
# ---------------------------------------------------------------------------------------------------------------


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with a ``step``; appended to, and cut back when resuming.

    Args:
        path: the file; None keeps the rows in memory only (processes other than rank 0).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._tensorboard = None
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    log.warning("%s: dropped an unfinished line", path)  # the process was killed while writing it

    def cut_after(self, step: int) -> None:
        """Forget the rows of steps after ``step``, which a resumed run will write again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        assert self.path is not None
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows.extend(rows)
        if self._tensorboard is not None:
            for row in rows:
                for key, value in row.items():
                    if isinstance(value, float):
                        self._tensorboard.add_scalar(key, value, row["step"])
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def mirror_to_tensorboard(self, folder: Path) -> None:
        """Write every number that is appended from now on to event files in ``folder`` too.

        Raises:
            ValueError: the package ``tensorboard`` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"--tensorboard: {error}; install it with `pip install tensorboard`") from error
        self._tensorboard = SummaryWriter(str(folder))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of the rows that have a finite ``key``."""
        rows = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        return [row["step"] for row in rows], [row[key] for row in rows]


def smoothed(values: Sequence[float], decay: float = 0.98) -> list[float]:
    """Return the exponential moving average, corrected for its start so that the first value is not overweighted."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(average / weight)
    return result


# ---------------------------------------------------------------------------------------------------------------
# pictures
# ---------------------------------------------------------------------------------------------------------------


def new_figure(width_in: float, height_in: float):
    """Return a matplotlib figure that needs no display and registers nowhere; 100 dots per inch."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=100, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


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
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("mean squared error of the velocity")
        axes.grid(alpha=0.3)
        handles = [*axes.get_lines(), *lr_axes.get_lines()]
        labels = [str(h.get_label()) for h in handles]
        # Above the axes, where no curve can run behind it.
        axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, frameon=False)
        save_figure(figure, folder / name)


def plot_spectrograms(panels: Sequence[tuple[str, Any]], sampling_rate: int, path: Path, title: str) -> None:
    """Write a PNG of one spectrogram per ``(label, waveform)``, mono (samples,), on common axes in dB."""
    import numpy as np

    figure = new_figure(8, 0.6 + 2.2 * len(panels))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    size = 1024
    window = np.hanning(size)
    image = None
    for axes, (label, waveform) in zip(all_axes, panels, strict=True):
        samples = np.pad(np.asarray(waveform, dtype=np.float64), (0, max(0, size - len(waveform))))
        frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 4]
        level = 20 * np.log10(np.abs(np.fft.rfft(frames * window)) * 2 / window.sum() + 1e-6)  # dB of full scale
        extent = (0, len(samples) / sampling_rate, 0, sampling_rate / 2000)  # seconds, kHz
        image = axes.imshow(level.T, origin="lower", aspect="auto", extent=extent, vmin=-100, vmax=0)
        axes.set_title(label, fontsize=9)
        axes.set_ylabel("kHz")
    all_axes[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=list(all_axes), label="dB of full scale")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
