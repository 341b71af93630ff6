"""Training loop: step, log, validate, save, until the last step, until patience ends or until it is asked to stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset
from selva.models.generator import Generator
from selva.training.schedule import Schedule, learning_rate
from selva.utils.device import peak_memory_bytes
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.metrics_log import SET_LOSS, MetricsFile, smoothed
from selva.utils.progress import Progress
from selva.utils.text import clock, counted

log = logging.getLogger(__name__)

OVERFITTING_AFTER = 3  # validations in a row above the best one, while the training loss falls, before we say so
MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient after which a run cannot be saved


class LoopSettings(Schedule, Protocol):
    """The settings that the loop reads."""

    @property
    def save_every(self) -> int: ...
    @property
    def val_every(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def patience(self) -> int: ...


class Run(Protocol):
    """State of a training that :func:`fit` can drive: that of an adapter, or that of a base model.

    Attributes:
        rows_per_step: every step has a row of metrics; False: the mean of all steps since the last line of the log.
        advice: what to do about overfitting, from the best step on.
    """

    rows_per_step: bool
    advice: str
    step: int
    best_step: int
    best_val_loss: float
    worse_in_a_row: int

    @property
    def config(self) -> LoopSettings: ...
    @property
    def generator(self) -> Generator: ...
    @property
    def val_clips(self) -> ClipDataset: ...
    @property
    def world(self) -> World: ...
    @property
    def device(self) -> torch.device: ...

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do one update and return the loss and the norm of the gradient, scalars on the device."""
        ...

    def validate(self) -> dict[str, Any]:
        """Return the row of metrics of a validation now, and keep track of the best step."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)


def fit(
    run: AnyRun,
    metrics: MetricsFile,
    *,
    on_checkpoint: Callable[[AnyRun], object],
    on_best: Callable[[AnyRun], object],
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[AnyRun], None] = lambda run: None,
    more: Callable[[AnyRun, int, float], dict[str, Any]] = lambda run, steps, seconds: {},
) -> bool:
    """Train until ``config.steps`` or until patience ends, and return True; until ``should_stop()``, and return False.

    Several processes stop one step after the first of them was asked to. Between two rows of metrics nothing is read
    from the device, so that the host is ahead of it. A run whose patience had ended before it was resumed returns True
    at once.

    Args:
        metrics: gets one row per step, and one per validation.
        on_checkpoint: called every ``save_every`` steps, after the last step, and before an early return.
        on_best: called after a validation with the lowest loss so far.
        on_step: called after every step and its validation. more: further numbers for the newest row of metrics, from
            the number of steps since the row before it and the seconds that they took.

    Raises:
        ValueError: the gradient was not finite ``MAX_BAD_STEPS`` times in a row (the last checkpoint is intact), or the
            loss of the held-out clips is not finite before the first step.
    """
    config = run.config
    run.generator.train()
    if len(run.val_clips) and run.step == 0:
        row = run.validate()  # where the base model stands
        metrics.append([row])
        if not math.isfinite(run.best_val_loss):
            raise UserError("the loss of the held-out clips is not finite before the first step; features of another "
                             "model, or values beyond --precision: look at the data summary, or use --precision fp32")
        log.info("step 0: validation loss %.4f%s", run.best_val_loss, _set_losses(row))
    if patience_ended(run):
        return True
    recent: list[tuple[Tensor, Tensor]] = []
    unlogged: list[dict[str, Any]] = []
    bad_steps, since, started_at = 0, time.monotonic(), time.monotonic()
    first_step = run.step
    with (
        Progress(config.steps, "training", "steps", interval_sec=math.inf) as progress,
        run.world.agreement() as any_asks,
    ):
        while run.step < config.steps:
            recent.append(run.train_step())
            stopping, last = any_asks(should_stop()), run.step == config.steps
            logging_now = run.step % config.log_every == 0 or last or stopping
            validating = len(run.val_clips) > 0 and (run.step % config.val_every == 0 or last)
            # Rows are complete at every validation, which compares with them, and at every step file.
            if logging_now or validating or run.step % config.save_every == 0:
                losses, norms = (torch.stack(values).tolist() for values in zip(*recent, strict=True))
                seconds = time.monotonic() - since  # with the wait for the device, which was behind until it was read
                rows = _rows(run, losses, norms, seconds)
                rows[-1] |= more(run, len(recent), seconds)
                metrics.append(rows)
                bad_steps = _count_bad(rows, bad_steps)
                unlogged += rows
                recent, since = [], time.monotonic()
            if logging_now:
                left = (time.monotonic() - started_at) / (run.step - first_step) * (config.steps - run.step)
                progress.update(run.step, f"loss {unlogged[-1]['loss']:.4f}")
                log.info("%s", _log_line(run, metrics, unlogged, left))
                unlogged = []
            if validating:
                row = run.validate()
                metrics.append([row])
                log.info("step %d: validation loss %.4f (best %.4f at step %d)%s", run.step, row["val_loss"],
                         run.best_val_loss, run.best_step, _set_losses(row))
                if run.best_step == run.step:
                    on_best(run)
                since = time.monotonic()
                _warn_of_overfitting(run, metrics)
            on_step(run)
            impatient = patience_ended(run)
            if run.step % config.save_every == 0 or last or stopping or impatient:
                on_checkpoint(run)
                since = time.monotonic()
            if impatient:
                log.info("step %d: no better validation loss for %s, stopping", run.step,
                         counted(config.patience, "validation"))
                return True
            if stopping and not last:
                return False
    return True


def patience_ended(run: Run) -> bool:
    """Return True if ``config.patience`` validations in a row had no better loss than the best one."""
    return 0 < run.config.patience <= run.worse_in_a_row


def _log_line(run: Run, metrics: MetricsFile, rows: Sequence[dict[str, Any]], seconds_left: float) -> str:
    row, losses = rows[-1], metrics.series("loss")[1]
    seconds = sum(row["sec_per_step"] for row in rows) / len(rows)
    average = f", smoothed {smoothed(losses)[-1]:.4f}" if losses else ""
    return (
        f"step {run.step}/{run.config.steps}: loss {row['loss']:.4f}{average}, lr {row['lr']:.2e}, "
        f"grad norm {row['grad_norm']:.3f}, {seconds:.2f} s/step, {clock(seconds_left)} left, "
        f"{peak_memory_bytes(run.device) / 2**30:.2f} GiB"
    )


def _set_losses(row: dict[str, Any]) -> str:
    """Return the losses of each data set in a row of a validation, as the end of a line; "" for a single set."""
    found = [f"{key.removeprefix(SET_LOSS)} {value:.4f}" for key, value in row.items() if key.startswith(SET_LOSS)]
    return f"; {', '.join(found)}" if found else ""


def _warn_of_overfitting(run: Run, metrics: MetricsFile) -> None:
    """Log a warning when held-out clips have got worse for a while although the training loss fell."""
    if run.worse_in_a_row < OVERFITTING_AFTER:
        return
    steps, losses = metrics.series("loss")
    curve = [(step, loss) for step, loss in zip(steps, smoothed(losses), strict=True) if step >= run.best_step]
    if not curve:  # no step since the best one had a finite loss
        return
    (since, then), (_, now) = curve[0], curve[-1]
    if now < then:
        log.warning(
            "overfitting: since step %d the training loss fell from %.4f to %.4f while the validation loss stays above "
            "%.4f; go back to step %d: %s",
            max(run.best_step, since), then, now, run.best_val_loss, run.best_step, run.advice,
        )


def _rows(run: Run, losses: Sequence[float], norms: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """Return the metrics rows of the steps since the last interval, which took ``seconds`` together."""
    first = run.step - len(losses)
    rows = [
        {"step": first + i + 1, "loss": loss, "grad_norm": norm, "lr": learning_rate(first + i, run.config),
         "sec_per_step": seconds / len(losses)}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]
    if run.rows_per_step or not all(map(math.isfinite, norms)):  # those that are skipped are counted one by one
        return rows
    return [{**rows[-1], "loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}]


def _count_bad(rows: Sequence[dict[str, Any]], bad_steps: int) -> int:
    for row in rows:
        if math.isfinite(row["grad_norm"]):
            bad_steps = 0
            continue
        bad_steps += 1
        log.warning("step %d: loss %s, gradient not finite; the update was skipped", row["step"], row["loss"])
        if bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"no finite gradient in {counted(bad_steps, 'step')} up to step {row['step']}; the last checkpoint is "
                "intact. Resume from it with a lower --lr, or with --precision bf16 or fp32"
            )
    return bad_steps
