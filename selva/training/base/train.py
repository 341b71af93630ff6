"""One base training from its settings to the exported generator; behind `scripts/train_base.py`."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selva.data.dataset import ClipDataset
from selva.data.memmap.reader import MemmapDataset
from selva.data.mixture import MixedClips
from selva.models.variants import get_variant
from selva.training.base.checkpoint import FOLDER as CHECKPOINTS
from selva.training.base.checkpoint import Checkpoints, find_checkpoint, load_, read_numbers
from selva.training.base.config import BaseTrainConfig
from selva.training.base.mmaudio_files import write_weights
from selva.training.base.run import BaseRun, described
from selva.training.base.samples import FOLDER as SAMPLES
from selva.training.base.samples import BaseSamples
from selva.training.base.setup import check_resumable, data_state, go_on_from_mmaudio_, load_data, start_generator
from selva.training.base.speed import SpeedMeter
from selva.training.compiling import prepare_to_compile
from selva.training.ema_snapshots import FOLDER as SNAPSHOT_FOLDER
from selva.training.ema_snapshots import (
    interval_of,
    snapshot_interval,
    thin_snapshots,
    write_snapshot,
    write_tracks,
)
from selva.training.loop import fit
from selva.training.schedule import schedule_problem
from selva.training.stopping import StopRequest
from selva.utils.device import dtype_of, peak_memory_bytes, resolve_device, resolve_precision
from selva.utils.distributed import World, join_world
from selva.utils.errors import UsageError
from selva.utils.files import atomic_write_text, check_can_write, next_aside, real_path, why_not_written
from selva.utils.lock import FolderLock
from selva.utils.metrics_log import MetricsFile
from selva.utils.plots import plot_losses
from selva.utils.settings import settings_text, values_of
from selva.utils.text import clock, counted
from selva.utils.watch import watched

log = logging.getLogger(__name__)

LOCK_FILE, METRICS_FILE, CONFIG_FILE, EXPORT_FOLDER = "run.lock", "metrics.jsonl", "config.yaml", "export"


@dataclass(frozen=True)
class BaseResult:
    """Outcome of a run.

    Attributes:
        exports: the files of the finished weights, in the process that writes files; none after a dry run or a stop.
        signal: that stopped the run before its end; None if none did.
    """

    exports: tuple[Path, ...] = ()
    signal: int | None = None


def train_base(config: BaseTrainConfig, settings: Mapping[str, Any] | None = None) -> BaseResult:
    """Train a generator as ``config`` says, under ``torchrun`` together with the other processes.

    Args:
        settings: for ``config.yaml``, by the names of the flags; those of ``config`` if None.

    Raises:
        UsageError: there is no such device.
        FolderInUse: another process trains into the output folder.
        UserError, FileNotFoundError: data or weights cannot be used, or a run cannot be continued.
    """
    device = resolve_device(config.model.device)
    precision = resolve_precision(config.precision, device)
    if precision == "fp16":
        raise UsageError("a base model is trained in bf16 or fp32, and this GPU has no bf16; give --precision fp32")
    config = dataclasses.replace(config, precision=precision)
    # Who starts another run from these settings does not mean to continue this one.
    settings = {**(values_of(config) if settings is None else settings), "precision": precision, "resume": None}
    check_can_write(config.output_dir)
    if problem := schedule_problem(config):
        log.warning("%s", problem)
    if config.compile:
        prepare_to_compile(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the published models were trained
    with join_world(device) as world, watched(world), _locked(config, world):
        return _train(config, settings, device, world)


def _locked(config: BaseTrainConfig, world: World) -> AbstractContextManager[object]:
    """Return the lock of the output folder, for the process that writes there."""
    if not world.is_main or config.dry_run:
        return nullcontext()
    return FolderLock(config.output_dir / LOCK_FILE, "trains")


def _train(config: BaseTrainConfig, settings: Mapping[str, Any], device: torch.device, world: World) -> BaseResult:
    # 1. the data and the old state, before the model is made
    clips, val_clips, sets = load_data(config)
    saved = find_checkpoint(config.resume, config.output_dir)
    of_mmaudio = saved is not None and saved.is_file()
    if saved is not None and not of_mmaudio:
        check_resumable(saved, read_numbers(saved), config, clips)

    # 2. the model and everything that trains it
    run = build_run(config, clips, val_clips, sets, device, world)
    if saved is not None and of_mmaudio:
        go_on_from_mmaudio_(run, saved)
    elif saved is not None:
        load_(run, saved)
    if config.dry_run:
        _estimate(run)
        return BaseResult()
    in_place = saved is not None and real_path(saved).parent == real_path(config.output_dir / CHECKPOINTS)
    return _Training(run, settings).go(resumed=in_place)


def build_run(
    config: BaseTrainConfig, clips: MixedClips, val_clips: ClipDataset, sets: list[MemmapDataset], device: torch.device,
    world: World,
) -> BaseRun:
    """Return the state of a fresh run."""
    generator = start_generator(config, sets, device, world)
    run = BaseRun(generator, clips, val_clips, config, dtype_of(config.precision), world)
    trained, total = (sum(p.numel() for p in group.values()) for group in (run.trained, run.parameters))
    log.info("%s: %s of %s parameters are trained; %s with %s of %d each, in %s%s",
             config.model.variant, f"{trained:,}", f"{total:,}", counted(world.size, "process", "processes"),
             counted(run.stream.parts[-1].stop - run.stream.parts[0].start, "row"), config.batch_size,
             counted(len(run.stream.parts), "forward pass", "forward passes"),
             ", which share the model" if run.objective.is_sharded else "")
    return run


def _estimate(run: BaseRun) -> None:
    """Try two steps and log the time and memory that the whole run will need; nothing is written."""
    float(run.train_step()[0])  # the first one allocates; a device is waited for where a number is read
    started = time.monotonic()
    float(run.train_step()[0])
    seconds = time.monotonic() - started
    run.stream.close()
    checkpoint = sum(x.numel() * x.element_size() for x in run.tensors().values())
    log.info("dry run: %.2f s/step, about %s for %s; peak memory %.2f GiB in each process; a checkpoint takes "
             "%.2f GiB; nothing was written", seconds, clock(seconds * run.config.steps),
             counted(run.config.steps, "step"),
             peak_memory_bytes(run.device) / 2**30, checkpoint / 2**30)


class _Training:
    """One run with its output folder."""

    def __init__(self, run: BaseRun, settings: Mapping[str, Any]) -> None:
        self.run, self.config, self.world, self.folder = run, run.config, run.world, run.config.output_dir
        self.settings, self.metrics = settings, MetricsFile()
        about = {"objective": described(self.config), "data": data_state(run.clips), "settings": {
            name: str(value) for name, value in settings.items()}}
        self.checkpoints = Checkpoints(self.folder, self.world, self.config.keep_last, about)
        self.snapshot_every = self.config.ema_every or snapshot_interval(self.config.steps)
        self.samples: BaseSamples | None = None

    def go(self, resumed: bool) -> BaseResult:
        """Train to the end, or until a signal comes.

        Args:
            resumed: from a checkpoint of the output folder.
        """
        run, config = self.run, self.config
        if resumed:
            self.checkpoints.newest = run.step
        if self.world.is_main:
            self._open(resumed)
        self._agree_on_snapshots()
        if len(run.val_clips) and config.sample_every:
            self.samples = BaseSamples(run.val_clips, config.samples, get_variant(config.model.variant),
                                       config.model.selva_dir, self.folder)
        meter, started = SpeedMeter(run, self.world), time.monotonic()
        with StopRequest() as stop:
            finished = fit(run, self.metrics, on_checkpoint=self._save, on_best=lambda run: None, should_stop=stop,
                           on_step=self._after_step, more=meter.numbers)
        self.checkpoints.wait()
        run.stream.close()
        if not finished:
            if self.world.is_main:
                log.warning("stopped at step %d of %d; continue with --resume auto", run.step, config.steps)
            return BaseResult(signal=stop.signal)
        exports = self._export()
        if self.world.is_main:
            log.info("trained to step %d in %s, peak memory %.2f GiB", run.step, clock(time.monotonic() - started),
                     peak_memory_bytes(run.device) / 2**30)
        return BaseResult(tuple(exports))

    def _open(self, resumed: bool) -> None:
        """Make the output folder ready, in the process that writes there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints.clean()
        _move_aside(self.folder, after=self.run.step if resumed else None)
        self.metrics = MetricsFile(self.folder / METRICS_FILE)
        self.metrics.cut_after(self.run.step)
        if self.config.tensorboard:
            self.metrics.mirror_to_tensorboard(self.folder / "tensorboard", self.run.step + 1 if resumed else None)
        atomic_write_text(self.folder / CONFIG_FILE, settings_text(self.settings))

    def _agree_on_snapshots(self) -> None:
        """Keep the distance of the snapshots that are there, in all processes: only one of them may see the folder."""
        wanted = self.snapshot_every
        if self.world.is_main and any((self.folder / SNAPSHOT_FOLDER).glob("*.pt")):
            self.snapshot_every = interval_of(self.folder)
        every = torch.tensor(self.snapshot_every if self.world.is_main else 0, device=self.run.device)
        self.snapshot_every = int(self.world.sum_(every))
        if self.world.is_main and self.snapshot_every != wanted:
            log.warning("snapshots of the averages go on at every %s, as this run began, not at every %d: at other "
                        "steps the earlier ones could not stay", counted(self.snapshot_every, "step"), wanted)

    def _save(self, run: BaseRun) -> None:
        """Begin a checkpoint and draw the curves."""
        self.checkpoints.save(run)
        if not self.world.is_main:
            return
        self.metrics.flush()
        try:
            plot_losses(self.metrics, self.folder, f"{self.config.model.variant}: {self.folder}")
        except OSError as error:
            log.error("%s: no curves, %s", self.folder, why_not_written(error))

    def _after_step(self, run: BaseRun) -> None:
        last = run.step == self.config.steps
        if run.step % self.snapshot_every == 0 or last:
            self._snapshot(run)
        if (self.samples is not None and (run.step % self.config.sample_every == 0 or last)
                and (row := self.samples.write(run))):
            self.metrics.append([row])

    def _snapshot(self, run: BaseRun) -> None:
        """Write the averages as they stand, from which other widths are made. All processes come here together."""
        folder, step, writes = self.folder / SNAPSHOT_FOLDER, run.step, self.world.is_main
        last = len(run.average.tracks) - 1
        for track in range(last + 1):
            values = run.weights(track)  # the processes gather every track together, whatever becomes of its file
            try:
                if writes:
                    write_snapshot(folder, track, step, values)
                if writes and track == last:
                    write_tracks(folder, run.average.sigma_rels)
                    thin_snapshots(folder, self.snapshot_every)
            except OSError as error:
                log.error("%s: no snapshot of step %d, %s", folder, step, why_not_written(error))
                writes = False

    def _export(self) -> list[Path]:
        """Write the finished weights and their first average, and return the paths; those of the average first."""
        paths = []
        for name, track in (("ema", 0), ("last", None)):
            weights = self.run.weights(track)
            for suffix in (".pth", ".safetensors") if self.world.is_main else ():
                paths.append(self.folder / EXPORT_FOLDER / f"{self.config.model.variant}_{name}{suffix}")
                write_weights(paths[-1], weights)
        return paths


_STEP_NAMES = re.compile(r"step_?(\d+)(?:_\d+)?(?:\.\w+)?|\d+\.(\d+)\.pt")  # of checkpoints, samples and snapshots


def _move_aside(folder: Path, after: int | None) -> None:
    """Move the files of an earlier run aside, so that a fresh start overwrites nothing.

    Args:
        after: the step from which that run goes on: only what is later is moved, so that the next ``--resume auto``
            does not go on from there; None for a fresh start.
    """
    names = (CHECKPOINTS, SNAPSHOT_FOLDER, SAMPLES, EXPORT_FOLDER, "tensorboard", METRICS_FILE, CONFIG_FILE,
             "loss_raw.png", "loss_smoothed.png")
    old = [folder / name for name in names if (folder / name).exists()]
    if after is not None:
        kept = (path for name in (CHECKPOINTS, SNAPSHOT_FOLDER, SAMPLES) for path in (folder / name).glob("*"))
        steps = ((path, _STEP_NAMES.fullmatch(path.name)) for path in kept)
        old = sorted(path for path, found in steps if found and int(found[1] or found[2]) > after)
    if not old:
        return
    aside = next_aside(folder)
    for path in old:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    if after is None:
        log.warning("%s held an earlier run; its files are now in %s (--resume auto continues a run that has saved "
                    "a step)", folder, aside)
    else:
        log.warning("%s: going on from step %d; what was later (%s and folders) is now in %s", folder, after,
                    counted(len(old), "file"), aside)
