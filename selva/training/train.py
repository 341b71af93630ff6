"""One training run from its settings to the finished adapter; behind ``train_lora.py``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selva.models.variants import get_variant
from selva.training.compiling import prepare_to_compile
from selva.training.config import RunConfig
from selva.training.loop import fit
from selva.training.run import TrainingRun
from selva.training.run_folder import RunFolder, check_disk_space
from selva.training.sample import TrainingSample
from selva.training.setup import adapter_meta, build_run, check_resumable, estimate, find_resume, load_split, load_start
from selva.training.stopping import StopRequest
from selva.utils.device import peak_memory_bytes, resolve_device, resolve_precision
from selva.utils.distributed import World, join_world
from selva.utils.files import atomic_write_text
from selva.utils.metrics_log import MetricsFile
from selva.utils.settings import settings_text, values_of
from selva.utils.text import clock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a run.

    Attributes:
        adapter: the final adapter, in the process that writes files; None after a dry run or a stop.
        signal: that stopped the run before its end; None if none did.
    """

    adapter: Path | None = None
    signal: int | None = None


def train(config: RunConfig, settings: Mapping[str, Any] | None = None) -> TrainingResult:
    """Train an adapter as ``config`` says, under ``torchrun`` together with the other processes.

    Args:
        settings: for ``config.yaml``, by the names of the flags; those of ``config`` if None.

    Raises:
        UsageError: there is no such device.
        ValueError, FileNotFoundError: data or weights cannot be used, or a run cannot be continued.
    """
    device = resolve_device(config.model.device)
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, device))
    settings = {**(values_of(config) if settings is None else settings), "precision": config.precision}
    if config.compile:
        prepare_to_compile(device)
    with join_world(device) as world:
        return _train(config, settings, device, world)


def _train(config: RunConfig, settings: Mapping[str, Any], device: torch.device, world: World) -> TrainingResult:
    training, output_dir = config.training, config.output_dir
    # 1. the old state and the data, before the base model is read
    saved = find_resume(config)
    if saved is not None:
        check_resumable(saved, config)
        if (before := saved.meta.get("precision", config.precision)) != config.precision:
            log.warning("%s: was trained in %s so far and goes on in %s", saved.path, before, config.precision)
    start = load_start(config) if saved is None else None
    clips, val_clips = load_split(config, device, world, saved)

    # 2. the model, and everything with a state; then the old state
    run = build_run(config, (clips, val_clips), device, world)
    if saved is not None:
        run.restore(saved)
    if start is not None:
        run.start_from(start)
    if config.dry_run:
        estimate(run)
        return TrainingResult()

    # 3. the output folder
    meta = adapter_meta(config, len(clips))
    folder = RunFolder(output_dir, meta, config.keep_last,
                       f"{config.model.variant}, {len(clips)} clips, rank {config.lora.rank}")
    metrics, sample = MetricsFile(), None
    if world.is_main:
        num_checkpoints = min(-(-training.steps // training.save_every), config.keep_last or training.steps)
        check_disk_space(output_dir, run.checkpoint_bytes(), num_checkpoints)
        metrics = folder.open(saved.step if saved else None)
        if config.tensorboard:
            metrics.mirror_to_tensorboard(output_dir / "tensorboard")
        atomic_write_text(output_dir / "config.yaml", settings_text(settings))
        if config.preview:
            shown = val_clips if len(val_clips) else clips
            sample = TrainingSample(shown.clip(0), bool(len(val_clips)), get_variant(config.model.variant),
                                    config.model.selva_dir, config.normalize_audio, training.seed)

    # 4. train
    def on_checkpoint(run: TrainingRun) -> None:
        if not world.is_main:
            return
        folder.save_step(run, metrics)
        if sample is not None and not stop():
            try:
                with run.evaluated():
                    sample.write(run, output_dir)
            except (ValueError, OSError) as error:  # a sample that cannot be made must not end a run
                log.warning("no sample at step %d: %s", run.step, error)

    def on_best(run: TrainingRun) -> None:
        if world.is_main:
            folder.save_best(run)

    started = time.monotonic()
    with StopRequest() as stop:
        finished = fit(run, metrics, on_checkpoint=on_checkpoint, on_best=on_best, should_stop=stop)
    if not finished:
        log.warning("stopped at step %d of %d; continue with --resume auto", run.step, training.steps)
        return TrainingResult(signal=stop.signal)
    if not world.is_main:
        return TrainingResult()

    # 5. the result
    log.info("trained to step %d in %s, peak memory %.2f GiB", run.step, clock(time.monotonic() - started),
             peak_memory_bytes(device) / 2**30)
    if len(val_clips) and run.best_step < run.step:
        log.info("validation was best at step %d (%.4f): adapter_best.pt", run.best_step, run.best_val_loss)
    return TrainingResult(folder.save_final(run))
