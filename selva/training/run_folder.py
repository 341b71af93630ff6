"""Output folder of a training run: its files, the limit on step files, and what a full disk leaves out."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from selva.checkpoint import (
    STEP_FILE,
    TrainingState,
    load_adapter,
    readable_meta,
    save_adapter,
    save_checkpoint,
    step_file_name,
)
from selva.lora.state import lora_state_dict
from selva.training.config import ADAPTER_FORMATS
from selva.training.ema_snapshots import FOLDER, snapshot_interval, snapshot_path, write_tracks
from selva.training.power_ema import PowerEMA
from selva.training.run import TrainingRun
from selva.training.set_aside import final_of, move_later_aside, move_old_run_aside, step_in_adapter
from selva.utils.errors import UserError
from selva.utils.files import PARTIAL_PREFIX, atomic_write_text, real_path, why_not_written
from selva.utils.metrics_log import MetricsFile
from selva.utils.plots import plot_losses
from selva.utils.text import counted

log = logging.getLogger(__name__)

SAMPLE_BYTES = 2 << 20  # a sample and its picture, generously
BEST, FINAL, LOCK_FILE = "adapter_best", "adapter_final", "run.lock"


class NotSaved(UserError):
    """A result that the run is for could not be written."""


class RunFolder:
    """Writes the files of one run.

    A file that cannot be written, on a full disk for example, is reported and survived; older ones stay intact. The
    best adapter is kept in memory and in step files too, so that it is written as soon as there is room.

    Args:
        path: the folder. meta: what every adapter of the run stores.
        keep_last: how many step files to keep, 0 for all. title: stands above the loss curves.
        adapter_format: of the best and the final adapter, one of ``ADAPTER_FORMATS``. Step files are always ``.pt``.
    """

    def __init__(
        self, path: Path, meta: Mapping[str, Any], keep_last: int = 0, title: str = "", adapter_format: str = "pt"
    ) -> None:
        self.path, self.meta, self.keep_last, self.title = path, dict(meta), keep_last, title
        self.suffixes = ADAPTER_FORMATS[adapter_format]
        self.newest_saved: Path | None = None  # step file that --resume auto would find
        self._opened_at: int | None = None  # step of the step file of this folder that the run was resumed from
        self._best: dict[str, Any] | None = None  # "state" (factors) and "meta" of the best adapter
        self._best_written = True

    def open(self, saved: TrainingState | None) -> MetricsFile:
        """Make the folder ready and return its metrics.

        Without ``saved``, an old run is moved aside; with a step file of this folder, what is later than its step; with
        one of another folder, again all of an old run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for remains in self.path.glob(f"{PARTIAL_PREFIX}*"):  # of a killed run; the lock says that none is alive
            shutil.rmtree(remains, ignore_errors=True)
        resumed = saved is not None and real_path(saved.path).parent == real_path(self.path)
        if saved is not None and resumed:
            move_later_aside(self.path, saved.step)
            self.newest_saved, self._opened_at = saved.path, saved.step
        else:
            move_old_run_aside(self.path)
        metrics = MetricsFile(self.path / "metrics.jsonl")
        metrics.cut_after(saved.step if saved is not None and resumed else 0)
        return metrics

    def restore_best(self, run: TrainingRun, saved: TrainingState) -> None:
        """Put back the best adapter as it was when the step file was written."""
        if not run.best_step:
            return
        best = saved.extra.get("best_adapter")
        if best is None and run.best_step == saved.step:
            with run.evaluated():
                best = self._best_now(run)
        if best is not None:
            self._best = {"state": dict(best["state"]), "meta": dict(best["meta"])}
            if not self.best_is_there(run):
                self._write_best(run)
            return
        if self.best_is_there(run):
            return
        # A step file of an earlier version: the adapter may be in files beside it.
        for name in (f"{BEST}.pt", f"{BEST}.safetensors", step_file_name(run.best_step)):
            if step_in_adapter(saved.path.parent / name) == run.best_step:
                adapter = load_adapter(saved.path.parent / name)
                for path in self._best_files():
                    self._try(path, lambda path=path, it=adapter: save_adapter(path, it.tensors, it.meta))
                return
        log.warning("%s: the best adapter so far, of step %d (%.4f), is missing; the next better one is written again",
                    self._best_files()[0], run.best_step, run.best_val_loss)

    def write_settings(self, text: str) -> None:
        """Write ``config.yaml``."""
        path = self.path / "config.yaml"
        self._try(path, lambda: atomic_write_text(path, text))

    def save_step(self, run: TrainingRun, metrics: MetricsFile) -> Path | None:
        """Write the step file and the curves, and delete step files beyond ``keep_last``; return the path.

        A full disk is reported and survived: the step file is missing then, older ones are intact, and None is
        returned.
        """
        path = self.path / step_file_name(run.step)
        metrics.flush()
        if not self._best_written and run.best_step != run.step:  # else it was tried a moment ago
            self._write_best(run)
        written = self._try(path, lambda: self._write_step(run, path),
                            "the training goes on. Make room, or use --keep_last")
        if written:
            self.newest_saved = path
            log.info("saved %s", path)
            self._prune(run.step)
        self._try(self.path / "loss_raw.png", lambda: plot_losses(metrics, self.path, self.title))
        return path if written else None

    def _write_step(self, run: TrainingRun, path: Path) -> None:
        extra = {**run.extra_state(), "best_adapter": self._best if run.best_step != run.step else None}
        save_checkpoint(
            path, run.generator, {**self.meta, "step": run.step}, step=run.step, optimizer=run.optimizer_state(),
            extra=extra, state=run.ema.average if run.ema else None,
        )

    def save_averages(self, run: TrainingRun) -> None:
        """Write the averages of ``--ema power``, at even distances and at the last step: an adapter for each width."""
        average, steps = run.ema, run.config.steps
        if not isinstance(average, PowerEMA) or (run.step % snapshot_interval(steps) and run.step != steps):
            return
        folder = self.path / FOLDER

        def write() -> None:
            write_tracks(folder, average.sigma_rels)
            for number, (width, track) in enumerate(zip(average.sigma_rels, average.tracks, strict=True)):
                save_adapter(snapshot_path(folder, number, run.step), run.generator,
                             {**self.meta, "step": run.step, "sigma_rel": width}, state=track)

        self._try(snapshot_path(folder, 0, run.step), write, "averages of other widths will be less exact")

    def _prune(self, newest: int) -> None:
        if not self.keep_last:
            return
        steps = sorted(int(match[1]) for p in self.path.iterdir() if (match := STEP_FILE.fullmatch(p.name)))
        for step in steps[: -self.keep_last]:
            if step != newest:
                _delete(self.path / step_file_name(step), "it is tried again at the next step file")

    def save_best(self, run: TrainingRun) -> None:
        """Write the best adapter."""
        with run.evaluated():
            self._best = self._best_now(run)
        self._write_best(run)

    def _best_now(self, run: TrainingRun) -> dict[str, Any]:
        state: dict[str, Tensor] = lora_state_dict(run.generator)
        return {"state": state, "meta": {**self.meta, "step": run.step, "val_loss": run.best_val_loss}}

    def _best_files(self) -> list[Path]:
        return [self.path / f"{BEST}{suffix}" for suffix in self.suffixes]

    def _write_best(self, run: TrainingRun) -> None:
        assert self._best is not None
        best = self._best
        self._best_written = all([
            self._try(path, lambda path=path: save_adapter(path, run.generator, best["meta"], state=best["state"]),
                      "it is kept in memory and tried again at every step file")
            for path in self._best_files()
        ])
        if self._best_written:  # never an older best one beside it, of a part of the run with another format
            for path in self.path.glob(f"{BEST}.*"):
                if path.suffix not in self.suffixes and _delete(path, "it is of an older step"):
                    log.info("%s was an older best adapter and is replaced by %s", path, self._best_files()[0].name)

    def best_is_there(self, run: TrainingRun) -> bool:
        """Return True if the file of the best adapter holds the best step."""
        return all(step_in_adapter(path) == run.best_step for path in self._best_files())

    def save_final(self, run: TrainingRun, metrics: MetricsFile) -> Path:
        """Write ``adapter_final`` (the next free number if there is one) and ``meta.json``; return the adapter's path.

        What a full disk left out before is tried again.

        Raises:
            NotSaved: the final adapter, or something else that the run promised, could not be written; says what.
        """
        stem, number = FINAL, 0
        nothing_trained = self._opened_at == run.step
        if nothing_trained and (final := final_of(self.path / step_file_name(run.step), self.path)):
            stem = final.stem  # the run was killed after it, before meta.json
        else:
            while any(self.path.glob(f"{stem}.*")):
                number += 1
                stem = f"{FINAL}_{number:03d}"
        meta: dict[str, Any] = {}

        def write(path: Path) -> None:
            with run.evaluated():
                meta.update(save_adapter(path, run.generator, {**self.meta, "step": run.step}))

        paths = [self.path / f"{stem}{suffix}" for suffix in self.suffixes]
        missing = [path.name for path in paths
                   if not self._try(path, lambda path=path: write(path), "the adapter is put elsewhere if possible")]
        rescued = _rescue(missing[0], write) if missing else ""
        text = json.dumps(readable_meta(meta), indent=2) + "\n"
        meta_path = self.path / "meta.json"
        if meta and not self._try(meta_path, lambda: atomic_write_text(meta_path, text)):
            missing.append(meta_path.name)
        if not self._best_written:
            self._write_best(run)
        missing += [] if self._best_written else [path.name for path in self._best_files()]
        missing += [] if metrics.flush() else ["metrics.jsonl"]
        if missing:
            raise NotSaved(f"{self.path}: the training is done, but {', '.join(missing)} could not be written. "
                           f"{rescued}Make room{self._how_to_go_on()}")
        return paths[0]

    def stopped(self, run: TrainingRun, steps: int) -> None:
        """Say how a run that was stopped can be continued.

        Raises:
            NotSaved: the step at which it was stopped could not be written.
        """
        if self.newest_saved is not None and self.newest_saved.name == step_file_name(run.step):
            log.warning("stopped at step %d of %d; continue with --resume auto", run.step, steps)
            return
        rescued = _rescue(step_file_name(run.step), lambda path: self._write_step(run, path))
        raise NotSaved(f"{self.path}: stopped at step {run.step} of {steps}, which was not saved there. {rescued}Make "
                       f"room{self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        if self.newest_saved is None:
            return "; no step of this run was saved, so it has to start again"
        return f" and use --resume auto: it goes on from {self.newest_saved.name}, the newest that was saved"

    def _try(self, path: Path, write: Callable[[], object], then: str = "the training goes on") -> bool:
        """Call ``write``; report an error of the disk and return False."""
        try:
            write()
        except OSError as error:
            log.error("%s: not saved, %s; older files are intact and %s", path, why_not_written(error), then)
            return False
        return True


def _delete(path: Path, then: str) -> bool:
    """Delete a file, or say why not and return False: Windows keeps one that another program reads."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: not deleted, %s; %s", path, why_not_written(error), then)
        return False
    return True


def _rescue(name: str, write: Callable[[Path], object]) -> str:
    """Write a file to a temporary folder, which may be on another disk; return a sentence that says where, or ""."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="selva_rescued_"))
        try:
            write(folder / name)
        except OSError:
            shutil.rmtree(folder)
            raise
    except OSError:
        return ""
    return f"{folder / name} holds it; move it there. "


def check_disk_space(folder: Path, checkpoint_bytes: int, num_checkpoints: int, others_bytes: int = 0) -> None:
    """Warn if the disk of ``folder`` cannot hold the run; raise if it cannot hold even one checkpoint.

    Raises:
        ValueError: there is less room than one checkpoint needs.
    """
    existing = next(p for p in (folder, *real_path(folder).parents) if p.exists())
    free, each = shutil.disk_usage(existing).free, checkpoint_bytes + SAMPLE_BYTES
    if free < each:
        raise UserError(f"{folder}: {free / 2**20:.0f} MiB are free, one checkpoint needs {each / 2**20:.0f} MiB; "
                         "make room or choose another --output_dir")
    if free < (needed := each * num_checkpoints + others_bytes):
        log.warning("%s: %.1f GiB are free, the %s of this run%s need %.1f GiB; --keep_last keeps fewer",
                    folder, free / 2**30, counted(num_checkpoints, "checkpoint"),
                    " and its averages" if others_bytes else "", needed / 2**30)
