"""One training run from its settings to the finished adapter; behind ``train_lora.py``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selva.data.cache import remove_temporary_caches
from selva.models.variants import get_variant
from selva.training.clips import load_split, num_distinct
from selva.training.compiling import prepare_to_compile
from selva.training.config import RunConfig, TrainConfig
from selva.training.loop import fit
from selva.training.memorisation import Watch
from selva.training.outcome import About, decide_on_verdict, missing_outcome, write_outcome
from selva.training.run import TrainingRun
from selva.training.run_folder import BEST, LOCK_FILE, NotSaved, RunFolder, check_disk_space
from selva.training.sample import TrainingSample
from selva.training.sample_prompts import HeldOutEvaluation, SamplePrompts, read_sample_prompts
from selva.training.schedule import schedule_problem
from selva.training.setup import (
    adapter_meta,
    at_its_end,
    build_run,
    check_resumable,
    estimate,
    find_resume,
    finished_adapter,
    load_start,
    patience_has_ended,
)
from selva.training.shared import SharedParts
from selva.training.stopping import StopRequest
from selva.training.trackers import Trackers, check_trackers
from selva.utils.device import begin_peak_memory, peak_memory_bytes, resolve_device, resolve_precision
from selva.utils.distributed import World, join_world
from selva.utils.files import check_can_write
from selva.utils.lock import FolderLock
from selva.utils.metrics_log import MetricsFile
from selva.utils.settings import settings_text, values_of
from selva.utils.text import clock, counted
from selva.utils.torchrun import is_main_process
from selva.utils.watch import watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a run.

    Attributes:
        adapter: the final adapter, in the process that writes files; None after a dry run or a stop.
        signal: that stopped the run before its end; None if none did.
        steps: that the run has, with those before it was resumed.
        val_losses: of the held-out clips, (step, loss) in order; empty without such clips.
        best: the adapter of the lowest of them, if there is one.
    """

    adapter: Path | None = None
    signal: int | None = None
    steps: int = 0
    val_losses: tuple[tuple[int, float], ...] = ()
    best: Path | None = None

    @property
    def verdict(self) -> str:
        """A sentence that says how the run went."""
        done = f"trained to step {self.steps}"
        if not self.val_losses:
            return f"{done}; no clips were held out, so listen to the samples to judge it"
        (_, first), (step, lowest) = self.val_losses[0], min(self.val_losses, key=lambda found: found[1])
        if step == self.val_losses[0][0]:
            return f"{done}; the loss of the held-out clips never fell below the {first:.4f} at step {step}"
        where = "" if self.best is None or step == self.steps else f", kept as {self.best.name}"
        return f"{done}; the loss of the held-out clips fell from {first:.4f} to {lowest:.4f} at step {step}{where}"


def train(
    config: RunConfig,
    settings: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    shared: SharedParts | None = None,
) -> TrainingResult:
    """Train an adapter as ``config`` says, under ``torchrun`` together with the other processes.

    Args:
        settings: for ``config.yaml``, by the names of the flags; those of ``config`` if None.
        should_stop: asked after every step whether to save and stop, as a signal asks; the run can be resumed.
        shared: what earlier runs of this process have loaded, and this one leaves to later ones, until it is cleared.

    Raises:
        UsageError: there is no such device.
        FolderInUse: another process trains into the output folder.
        NotSaved: the run was stopped or is done, and that could not be written.
        ValueError, FileNotFoundError: data or weights cannot be used, the output folder cannot be written to, or a run
            cannot be continued.
    """
    device, asked_precision = resolve_device(config.model.device), config.precision
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, device))
    # Who starts another run from these settings does not mean to continue this one.
    settings = {**(values_of(config) if settings is None else settings), "precision": config.precision, "resume": None}
    check_can_write(config.output_dir)  # before hours of encoding
    if problem := schedule_problem(config.training):
        log.warning("%s", problem)
    training = config.training
    if get_variant(config.model.variant).packaged and training.lr <= TrainConfig.lr and not training.lr_probe:
        log.warning("%s hardly learns at a rate of %g, which is for the published models; configs/tiny_new_sound.yaml "
                    "has settings that teach it a sound", config.model.variant, training.lr)
    if config.adapter_format == "safetensors":
        log.warning("ComfyUI-SelVA does not read .safetensors adapters; --adapter_format both writes .pt files too")
    if config.compile:
        prepare_to_compile(device)
    if config.dry_run and is_main_process():
        from selva.training.memory import log_step_memory  # takes a second to import

        log_step_memory(config, asked_precision, device)
    begin_peak_memory(device)
    not_saved: NotSaved | None = None
    try:
        with join_world(device) as world, watched(world), _locked(config, world):
            try:
                return _train(config, settings, device, world, should_stop, shared)
            except NotSaved as error:  # only rank 0 knows; the others leave as they do after a whole run
                not_saved = error
        raise not_saved
    finally:
        not_saved = None  # or it would be a cycle with its traceback, which holds the run
        if shared is None:
            remove_temporary_caches()


def _locked(config: RunConfig, world: World) -> AbstractContextManager[object]:
    """Return the lock of the output folder, for the process that writes there."""
    if not world.is_main or config.dry_run:
        return nullcontext()
    return FolderLock(config.output_dir / LOCK_FILE, "trains")


def _train(
    config: RunConfig, settings: Mapping[str, Any], device: torch.device, world: World,
    should_stop: Callable[[], bool], shared: SharedParts | None,
) -> TrainingResult:
    training, output_dir = config.training, config.output_dir
    # 1. the old state and the data, before the base model is read
    if world.is_main:
        check_trackers(config.report_to)
    saved, done = find_resume(config), None  # done: the final adapter of a run without steps to do
    if saved is not None:
        check_resumable(saved, config, world.size)
        if patience_has_ended(saved, config) or saved.step == training.steps:
            done = finished_adapter(saved, output_dir)
        if done and not config.dry_run and not missing_outcome(done, saved.step, config.verdict):
            return TrainingResult(done if world.is_main else None, steps=saved.step)  # its patience has ended
        if (before := saved.meta.get("precision", config.precision)) != config.precision:
            log.warning("%s: was trained in %s so far and goes on in %s", saved.path, before, config.precision)
        if (before := saved.meta.get("base_dtype", "auto")) != config.base_dtype:
            log.warning("%s: was trained with --base_dtype %s so far and goes on with %s", saved.path, before,
                        config.base_dtype)
    start = load_start(config) if saved is None else None
    asked, pictures = [], {}
    if config.sample_prompts:
        asked = read_sample_prompts(config.sample_prompts, training.seed, output_dir)
        videos = {one.name: (one.video, one.prompt) for one in asked if one.video is not None}
        if videos and world.is_main and not config.dry_run:
            from selva.training.sample_videos import video_features  # brings the encoders, which training does not need

            pictures = video_features(videos, config.model, config.duration, config.sample_prompts, device)
    told: list[str] = []
    clips, val_clips = load_split(config, device, world, saved, told, shared)
    plan = decide_on_verdict(config, len(val_clips) or len(clips))
    if saved is not None and done and not config.dry_run:
        missing = missing_outcome(done, saved.step, plan is not None)
        if not missing and saved.step == training.steps:
            raise at_its_end(saved, config)
        if not missing:
            return TrainingResult(done if world.is_main else None, steps=saved.step)
        log.warning("%s: all steps are done; made now: %s", output_dir, ", ".join(missing))

    # 2. the model, and everything with a state; then the old state
    if saved is not None and training.lr_probe:
        rate = saved.meta.get("train_config", {}).get("lr", training.lr)
        log.info("learning rate %.2e, as it was chosen when the run began (--lr_probe)", rate)
        config = dataclasses.replace(config, training=dataclasses.replace(training, lr=rate))
    run = build_run(config, (clips, val_clips), device, world, shared, saved)
    if training.lr_probe:
        config, settings = dataclasses.replace(config, training=run.config), {**settings, "lr": run.config.lr}
        training = run.config
    if saved is not None:
        run.restore(saved)
    if start is not None:
        run.start_from(start)
    if config.dry_run:
        estimate(run)
        return TrainingResult()

    # 3. the output folder
    num_clips = num_distinct(clips)
    meta = adapter_meta(config, num_clips, world.size, saved)
    folder = RunFolder(output_dir, meta, config.keep_last,
                       f"{config.model.variant}, {counted(num_clips, 'clip')}, rank {config.lora.rank}",
                       config.adapter_format)
    metrics, sample, trackers, heard, evaluation = MetricsFile(), None, None, None, None
    if world.is_main:
        num_checkpoints = min(-(-training.steps // training.save_every), config.keep_last or training.steps)
        check_disk_space(output_dir, run.checkpoint_bytes(), num_checkpoints, run.averages_bytes())
        metrics = folder.open(saved)
        if saved is not None:
            folder.restore_best(run, saved)
        trackers = Trackers(config.report_to, output_dir, settings, run.step + 1 if saved else None)
        metrics.listener = trackers.rows
        if config.tensorboard and "tensorboard" not in config.report_to:
            metrics.mirror_to_tensorboard(output_dir / "tensorboard", run.step + 1 if saved else None)
        folder.write_settings(settings_text(settings))
        if len(val_clips):
            run.watch = Watch(run.generator, clips, val_clips, training, run.precision, world)
        if config.preview:
            shown = val_clips if len(val_clips) else clips
            sample = TrainingSample(shown.clip(0), bool(len(val_clips)), get_variant(config.model.variant),
                                    config.model.selva_dir, config.normalize_audio, training.seed)

        if asked:
            heard = SamplePrompts(asked, pictures, config, run, get_variant(config.model.variant), trackers.sound)
        if config.eval_every and len(val_clips):
            evaluation = HeldOutEvaluation(val_clips, config, run, get_variant(config.model.variant))

    # 4. train
    def on_checkpoint(run: TrainingRun) -> None:
        if not world.is_main:
            return
        folder.save_step(run, metrics)
        written = sample is not None and not stop() and sample.try_write(run, output_dir)
        if written and trackers is not None:
            trackers.picture("sample", output_dir / f"sample_step{run.step:05d}.png", run.step)
        if heard is not None and not stop():
            heard.write(output_dir)

    def on_best(run: TrainingRun) -> None:
        if world.is_main:
            folder.save_best(run)

    def on_step(run: TrainingRun) -> None:
        if world.is_main:
            folder.save_averages(run)
        if evaluation is not None and run.step % config.eval_every == 0 and (row := evaluation.row()):
            metrics.append([row])

    started = time.monotonic()
    with StopRequest(should_stop) as stop:
        due = saved is not None and (run.step % training.save_every == 0 or run.step == training.steps)
        if sample is not None and due and not sample.is_there(run.step, output_dir):
            sample.try_write(run, output_dir)  # killed between its step file and this
        if heard is not None and (run.step == 0 or (due and not heard.are_there(run.step, output_dir))):
            heard.write(output_dir)
        finished = fit(run, metrics, on_checkpoint=on_checkpoint, on_best=on_best, should_stop=stop, on_step=on_step)
    if trackers is not None:
        trackers.close()
    if not finished:
        if world.is_main:
            folder.stopped(run, training.steps)
        return TrainingResult(signal=stop.signal, steps=run.step)
    if not world.is_main:
        return TrainingResult()

    # 5. the result
    log.info("trained to step %d in %s, peak memory %.2f GiB", run.step, clock(time.monotonic() - started),
             peak_memory_bytes(device) / 2**30)
    final = folder.save_final(run, metrics)
    if len(val_clips) and run.best_step < run.step:
        log.info("validation was best at step %d (%.4f)%s", run.best_step, run.best_val_loss,
                 f": {BEST}{folder.suffixes[0]}" if folder.best_is_there(run) else "")
    write_outcome(run, clips, config, metrics, plan, About(final, told, settings_text(settings)))
    has_best = len(val_clips) and run.best_step and folder.best_is_there(run)
    losses = zip(*metrics.series("val_loss"), strict=True)
    return TrainingResult(final, None, run.step, tuple((int(step), loss) for step, loss in losses),
                          output_dir / f"{BEST}{folder.suffixes[0]}" if has_best else None)
