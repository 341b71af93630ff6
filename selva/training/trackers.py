"""Trackers: TensorBoard, Weights & Biases and Trackio get the curves, sounds and pictures of a run, if wanted.

None of them is needed. One that fails in the middle of a run is left out from then on, which is said; the run goes on.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selva.utils.errors import UserError
from selva.utils.files import real_path

log = logging.getLogger(__name__)

PROJECT = "selva-lora"


class Tracker(ABC):
    """One place that gets numbers, sounds and pictures."""

    name = ""

    @abstractmethod
    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""

    @abstractmethod
    def sound(self, name: str, waveform: np.ndarray, rate: int, step: int) -> None:
        """Take a sound (samples,)."""

    @abstractmethod
    def picture(self, name: str, path: Path, step: int) -> None:
        """Take a picture, a PNG file."""

    @abstractmethod
    def close(self) -> None:
        """Have everything written."""


class TensorBoardTracker(Tracker):
    """Event files in ``tensorboard/`` of the output folder."""

    name = "tensorboard"

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(str(folder / "tensorboard"), purge_step=purge_step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def sound(self, name: str, waveform: np.ndarray, rate: int, step: int) -> None:
        self.writer.add_audio(name, waveform[None], step, sample_rate=rate)

    def picture(self, name: str, path: Path, step: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class LoggingTracker(Tracker):
    """Weights & Biases, or Trackio, whose functions have the same names."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self.name, self.module = name, _import(name, name)
        config = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        place = {"dir": str(folder)} if name == "wandb" else {}
        self.module.init(project=PROJECT, name=real_path(folder).name, config=config, **place)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.module.log(dict(values), step=step)

    def sound(self, name: str, waveform: np.ndarray, rate: int, step: int) -> None:
        self.module.log({name: self.module.Audio(waveform, sample_rate=rate)}, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.module.log({name: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.module.finish()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--report_to {package}: {error}; install it with `pip install {package}`") from error


class Trackers:
    """The trackers of a run, as one that never fails.

    Args:
        names: see ``--report_to``. folder: output folder of the run.
        settings: of the run, by the names of the flags.
        purge_step: of a run that is continued; what TensorBoard has from this step on is no longer shown.

    Raises:
        UserError: a package is not installed.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], purge_step: int | None = None
    ) -> None:
        self._open: list[Tracker] = []
        for name in dict.fromkeys(names):
            self._open.append(TensorBoardTracker(folder, purge_step) if name == "tensorboard"
                              else LoggingTracker(name, folder, settings))

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pass on the numbers of rows of metrics, lists as one number per place."""
        for row in rows:
            values = dict(_numbers(row))
            self._each(lambda tracker, values=values, row=row: tracker.numbers(values, row["step"]))

    def sound(self, name: str, waveform: np.ndarray, rate: int, step: int) -> None:
        """Pass on a sound (samples,)."""
        self._each(lambda tracker: tracker.sound(name, waveform, rate, step))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Pass on a picture."""
        self._each(lambda tracker: tracker.picture(name, path, step))

    def close(self) -> None:
        """Have everything written."""
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._open):
            try:
                call(tracker)
            except Exception as error:  # a lost connection, a full disk: the run is worth more
                self._open.remove(tracker)
                log.error("--report_to %s gets no more values after an error: %s",
                          tracker.name, str(error).split("\n")[0])


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if key == "step":
            continue
        if isinstance(value, list):
            yield from ((f"{key}/{i}", float(one)) for i, one in enumerate(value) if isinstance(one, int | float))
        elif isinstance(value, int | float):
            yield key, float(value)
