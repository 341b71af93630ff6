"""Output folder of a training run: its files, the limit on step files, and older runs, which are moved aside."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selva.checkpoint import STEP_FILE, readable_meta, save_adapter, save_checkpoint, step_file_name
from selva.training.run import TrainingRun
from selva.utils.files import atomic_write_text
from selva.utils.metrics_log import MetricsFile
from selva.utils.plots import plot_losses

log = logging.getLogger(__name__)

RUN_FILES = ("adapter_*", "sample_*", "loss_*.png", "metrics.jsonl", "meta.json", "config.yaml", "tensorboard")
SAMPLE_BYTES = 2 << 20  # a sample and its picture, generously


class RunFolder:
    """Writes the files of one run.

    Args:
        path: the folder. meta: what every adapter of the run stores.
        keep_last: how many step files to keep, 0 for all. title: stands above the loss curves.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], keep_last: int = 0, title: str = "") -> None:
        self.path, self.meta, self.keep_last, self.title = path, dict(meta), keep_last, title

    def open(self, resumed_at: int | None) -> MetricsFile:
        """Make the folder ready and return its metrics, cut back to ``resumed_at``; None moves an old run aside."""
        self.path.mkdir(parents=True, exist_ok=True)
        if resumed_at is None:
            move_old_run_aside(self.path)
        metrics = MetricsFile(self.path / "metrics.jsonl")
        metrics.cut_after(resumed_at or 0)
        return metrics

    def save_step(self, run: TrainingRun, metrics: MetricsFile) -> Path | None:
        """Write the step file and the curves, and delete step files beyond ``keep_last``; return the path.

        A full disk is reported and survived: the step file is missing then, older ones are intact, and None is
        returned. Any other failure is raised.
        """
        path = self.path / step_file_name(run.step)
        try:
            save_checkpoint(
                path, run.generator, {**self.meta, "step": run.step}, step=run.step,
                optimizer=run.optimizer.state_dict(), extra=run.extra_state(),
                state=run.ema.average if run.ema else None,
            )
            plot_losses(metrics, self.path, self.title)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.error("%s: not saved, the disk is full; older files are intact and the training goes on. "
                      "Make room, or use --keep_last", path)
            return None
        log.info("saved %s", path)
        self._prune()
        return path

    def _prune(self) -> None:
        if not self.keep_last:
            return
        steps = sorted(int(match[1]) for p in self.path.iterdir() if (match := STEP_FILE.fullmatch(p.name)))
        for step in steps[: -self.keep_last]:
            (self.path / step_file_name(step)).unlink()

    def save_best(self, run: TrainingRun) -> None:
        """Write ``adapter_best.pt``."""
        with run.evaluated():
            meta = {**self.meta, "step": run.step, "val_loss": run.best_val_loss}
            save_adapter(self.path / "adapter_best.pt", run.generator, meta)

    def save_final(self, run: TrainingRun) -> Path:
        """Write ``adapter_final.pt`` (the next free number if there is one) and ``meta.json``; return the path."""
        path, number = self.path / "adapter_final.pt", 0
        while path.exists():
            number += 1
            path = self.path / f"adapter_final_{number:03d}.pt"
        with run.evaluated():
            written = save_adapter(path, run.generator, {**self.meta, "step": run.step})
        atomic_write_text(self.path / "meta.json", json.dumps(readable_meta(written), indent=2) + "\n")
        return path


def move_old_run_aside(folder: Path) -> None:
    """Move the files of an earlier run into ``previous_001`` (002, ...), so that a fresh start overwrites nothing."""
    old = sorted({path for pattern in RUN_FILES for path in folder.glob(pattern)})
    if not old:
        return
    number = 1
    while (aside := folder / f"previous_{number:03d}").exists():
        number += 1
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    log.warning("%s held an earlier run; its %d files are now in %s (use --resume auto to continue a run)",
                folder, len(old), aside)


def check_disk_space(folder: Path, checkpoint_bytes: int, num_checkpoints: int) -> None:
    """Warn if the disk of ``folder`` cannot hold the run; raise if it cannot hold even one checkpoint.

    Raises:
        ValueError: there is less room than one checkpoint needs.
    """
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free, each = shutil.disk_usage(existing).free, checkpoint_bytes + SAMPLE_BYTES
    if free < each:
        raise ValueError(f"{folder}: {free / 2**20:.0f} MiB are free, one checkpoint needs {each / 2**20:.0f} MiB; "
                         "make room or choose another --output_dir")
    if free < each * num_checkpoints:
        log.warning("%s: %.1f GiB are free, the %d checkpoints of this run need %.1f GiB; --keep_last keeps fewer",
                    folder, free / 2**30, num_checkpoints, each * num_checkpoints / 2**30)
