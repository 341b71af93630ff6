"""Trackers: TensorBoard, Weights & Biases and Trackio get the curves, sounds and pictures of a run, if wanted.

None of them is needed. One that fails in the middle of a run is left out from then on, which is said; the run goes on.
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
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


class TrackioTracker(Tracker):
    """Trackio, and what Weights & Biases has in common with it: functions of the same names."""

    name = "trackio"
    place = ""  # the argument of ``init`` for the folder, if there is one
    advice = "see its own settings"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.module = _import(self.name, self.name)
        config = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        place = {self.place: str(folder)} if self.place else {}
        try:
            with _stdout_kept():
                self.module.init(project=PROJECT, name=real_path(folder).name, config=config, **place)
        except Exception as error:  # not logged in, no network, a folder that cannot be written to
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            raise UserError(f"--report_to {self.name}: {reason}; {self.advice}, or leave it out") from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Hand values over as those of a step, in any order of the steps."""
        self.module.log(dict(values), step=step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.log(values, step)

    def sound(self, name: str, waveform: np.ndarray, rate: int, step: int) -> None:
        # As integers: Trackio brings floats to full scale, so that a silent sound would become loud noise.
        samples = np.rint(np.clip(waveform, -1, 1) * np.iinfo(np.int16).max).astype(np.int16)
        self.log({name: self.module.Audio(samples, sample_rate=rate)}, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.log({name: self.module.Image(str(path))}, step)

    def close(self) -> None:
        self.module.finish()


class WandbTracker(TrackioTracker):
    """Weights & Biases, with its files in the folder of the run."""

    name = "wandb"
    place = "dir"
    advice = "`wandb login` keeps a key, WANDB_MODE=offline in the environment needs none"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, settings)
        # It drops what belongs to an earlier step than the last one it got, and rows of steps are written in blocks,
        # after figures and sounds of steps among them. So the step is a value like others, and the axis of all of them.
        self.module.define_metric("step")
        self.module.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.module.log({**values, "step": step})


def _stdout_kept() -> AbstractContextManager[object]:
    """Return a context in which what a tracker prints goes to stderr: stdout holds the results of a script alone."""
    return redirect_stdout(sys.stderr)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--report_to {package}: {error}; install it with `pip install {package}`") from error


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        UserError: one is not; says how to install it.
    """
    for name in names:
        _import({"tensorboard": "torch.utils.tensorboard"}.get(name, name), name)


class Trackers:
    """The trackers of a run, as one that never fails.

    Args:
        names: see ``--report_to``. folder: output folder of the run.
        settings: of the run, by the names of the flags.
        purge_step: of a run that is continued; what TensorBoard has from this step on is no longer shown.

    Raises:
        UserError: a package is not installed, or does not begin, as one that wants a login.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], purge_step: int | None = None
    ) -> None:
        self._open: list[Tracker] = []
        for name in dict.fromkeys(names):
            if name == "tensorboard":
                self._open.append(TensorBoardTracker(folder, purge_step))
            else:
                self._open.append({"wandb": WandbTracker, "trackio": TrackioTracker}[name](folder, settings))

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
                with _stdout_kept():
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
