"""Files of a run that another one would overwrite or mix with its own: moved to ``previous_001`` (002, ...)."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from selva.checkpoint import load_adapter
from selva.training.ema_snapshots import FOLDER as SNAPSHOT_FOLDER
from selva.training.ema_snapshots import SNAPSHOT_FILE
from selva.utils.files import atomic_path, next_aside
from selva.utils.metrics_log import MetricsFile
from selva.utils.text import counted

log = logging.getLogger(__name__)

RUN_FILES = ("adapter_*", "sample_*", "loss_*.png", "metrics.jsonl", "meta.json", "config.yaml", "tensorboard",
             SNAPSHOT_FOLDER, "report.html", "verdict.json", "README.md",
             "model_card.md", "sample_prompts")
CARD_MARK = "<!-- written by train_lora.py, and anew with every final adapter of this folder -->"
FINAL_FILES = "adapter_final*.*"
_STEP = re.compile(r"(?:adapter|sample)_step(\d+)\.\w+")


def move_old_run_aside(folder: Path) -> None:
    """Move the files of an earlier run aside, so that a fresh start overwrites nothing."""
    old = _run_files(folder)
    if old:
        aside = _move(folder, old)
        log.warning("%s held an earlier run; now in %s: its %s (--resume auto continues a run that has saved "
                    "a step)", folder, aside, counted(len(old), "file"))


def move_later_aside(folder: Path, step: int) -> None:
    """Move aside what a run wrote after ``step``, from which it is continued, with a copy of its metrics.

    Without it, the next ``--resume auto`` would go on from the abandoned steps. Final adapters stay: nothing overwrites
    them. Step files go last and in their order: a process that is killed in between leaves the newest step of the old
    branch.
    """
    metrics = MetricsFile(folder / "metrics.jsonl")
    later = [path for path in _run_files(folder) if (_step_of(path) or 0) > step]
    averages = [path for path in (folder / SNAPSHOT_FOLDER).glob("*.pt")
                if (match := SNAPSHOT_FILE.fullmatch(path.name)) and int(match[2]) > step]
    if not later and not any((step_in_adapter(path) or 0) > step for path in folder.glob(FINAL_FILES)):
        if metrics.last_step > step:
            log.info("%s: steps %d to %d, which no step file holds, are done again", metrics.path, step + 1,
                     metrics.last_step)
        for path in averages:  # of steps that are done again
            path.unlink()
        return
    later.sort(key=lambda path: (path.name.startswith("adapter_step"), _step_of(path) or 0, path.name))
    curves = sorted(folder.glob("loss_*.png")) if metrics.last_step > step else []  # the next step file draws them anew
    copies = [metrics.path] if metrics.path and metrics.path.exists() else []
    aside = _move(folder, [*curves, *averages, *later], copies)
    log.warning("%s: going on from step %d; what was later (%s) is now in %s, with a copy of the metrics", folder, step,
                ", ".join(path.name for path in later) or "rows of metrics", aside)


def final_of(step_file: Path, folder: Path) -> Path | None:
    """Return the final adapter in ``folder`` that was written after this step file; None if there is none.

    The same step of an abandoned branch is another adapter.
    """
    if not step_file.exists():
        return None
    adapter = load_adapter(step_file)
    for path in sorted(folder.glob(FINAL_FILES), reverse=True):
        if step_in_adapter(path) != adapter.meta.get("step"):
            continue
        tensors = load_adapter(path).tensors
        if tensors.keys() == adapter.tensors.keys() and all(
            torch.equal(value, tensors[key]) for key, value in adapter.tensors.items()
        ):
            return path
    return None


def step_in_adapter(path: Path) -> int | None:
    """Return the step that an adapter file is of; None if there is none, or if it cannot be read."""
    try:
        meta = load_adapter(path).meta
    except (ValueError, OSError):
        return None
    step = meta.get("step", meta.get("steps"))
    return step if isinstance(step, int) else None


def _run_files(folder: Path) -> list[Path]:
    found = {path for pattern in RUN_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.suffix != ".md" or is_model_card(path))


def is_model_card(path: Path) -> bool:
    """Return True if a README.md was written by a run, not by the user."""
    try:
        return CARD_MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _step_of(path: Path) -> int | None:
    """Return the step after which a file was written that a run replaces; None for others."""
    if match := _STEP.fullmatch(path.name):
        return int(match[1])
    return step_in_adapter(path) if path.match("adapter_best.*") else None


def _move(folder: Path, files: list[Path], copies: list[Path] | None = None) -> Path:
    aside = next_aside(folder)
    aside.mkdir()
    for path in copies or []:
        with atomic_path(aside / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())
    for path in files:
        place = aside / path.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    return aside
