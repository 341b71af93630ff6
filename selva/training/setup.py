"""Preparation of a run: the state to resume from, the clips, the base model with its adapter."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selva.checkpoint import (
    Adapter,
    TrainingState,
    check_same_settings,
    load_adapter,
    load_checkpoint,
    load_newest_checkpoint,
)
from selva.data.dataset import (
    ClipDataset,
    ConcatDataset,
    PrefixedDataset,
    Subset,
    origin_groups,
    split_validation,
)
from selva.data.folder_dataset import FolderDataset, open_clip_dataset
from selva.data.memmap.reader import MemmapDataset
from selva.data.mixture import repeats_of
from selva.data.source import DataSource
from selva.data.summary import memmap_lines, summarise
from selva.lora.inject import check_ranks, inject_lora
from selva.models.generator import Generator, cast_frozen_
from selva.models.variants import get_variant
from selva.training.compiling import compile_blocks_
from selva.training.config import RunConfig
from selva.training.outcome import missing_outcome
from selva.training.prior_preservation import with_preserved
from selva.training.run import TrainingRun, divided_by_clip, graph_problem
from selva.training.set_aside import final_of
from selva.training.shared import SharedParts
from selva.utils.device import dtype_of, peak_memory_bytes, stored_dtype
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.graph import graphed_calls
from selva.utils.text import clock, counted, listed
from selva.weights.find import generator_change, generator_mark
from selva.weights.load import load_clip_text, load_generator

log = logging.getLogger(__name__)

NAMED = 5  # clips in a message


def adapter_meta(config: RunConfig, num_clips: int, num_processes: int = 1) -> dict[str, Any]:
    """Return the metadata of every adapter of the run: the published keys, and ours that others ignore."""
    training = config.training
    return {
        "variant": config.model.variant,
        "steps": training.steps,
        "timestep_mode": training.timestep_mode,
        "logit_normal_sigma": training.logit_normal_sigma,
        "curriculum_switch": training.curriculum_switch,
        "lora_plus_ratio": training.lora_plus_ratio,
        "clip_features": training.clip_features,
        "num_clips": num_clips,
        "train_config": {name: list(value) if isinstance(value, tuple) else value
                         for name, value in dataclasses.asdict(training).items()},
        "normalize_audio": config.normalize_audio,
        "precision": config.precision,
        **({"base_dtype": config.base_dtype} if config.base_dtype != "auto" else {}),
        "preserve": list(config.preserve),
        "preserve_share": config.preserve_share,
        "generator": generator_mark(config.model.generator),
        **({"init_from": config.init_from.name} if config.init_from else {}),
        **({"processes": num_processes} if num_processes > 1 else {}),
    }


# -- resuming ----------------------------------------------------------------------------------------------------------


def find_resume(config: RunConfig) -> TrainingState | None:
    """Return the state that ``--resume`` names; None for a fresh start.

    Raises:
        ValueError: the file cannot be read, or the settings of the adapter are none to start with.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        return load_checkpoint(config.resume)
    saved = load_newest_checkpoint(config.output_dir)
    if saved is None and (problem := config.lora.start_problem()):
        raise UserError(problem)
    log.info("resuming from %s", saved.path) if saved else log.info("nothing to resume in %s", config.output_dir)
    return saved


# Settings of TrainConfig that change what is learned; the others may change when a run is continued.
FIXED_SETTINGS = ("clip_features", "latent", "null_prob", "padded_loss", "timestep_mode", "logit_normal_sigma", "seed")


def finished_adapter(saved: TrainingState, output_dir: Path) -> Path | None:
    """Return the final adapter of the step of ``saved`` if the run wrote all of its end; None if it has to be written.

    A run may have been killed between its last step file and its final adapter, or between that and ``meta.json``. Of
    an adapter in both formats, the ``.pt`` is returned.
    """
    final = final_of(saved.path, output_dir)
    try:
        meta = json.loads((output_dir / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    written = final is not None and meta == json.loads(json.dumps(load_adapter(final).meta))
    if not written:
        return None
    assert final is not None
    return next(path for path in (final.with_suffix(".pt"), final) if path.exists())


def at_its_end(saved: TrainingState, config: RunConfig) -> UserError:
    """Return the error of continuing a run that has done all its steps."""
    return UserError(f"{saved.path}: is at step {saved.step} and --steps is {config.training.steps}; give a larger "
                     "--steps")


def patience_has_ended(saved: TrainingState, config: RunConfig) -> bool:
    """Return True, and say so, if the run had already stopped because its patience had ended."""
    best, patience = saved.extra.get("best", {}), config.training.patience
    if not 0 < patience <= best.get("worse_in_a_row", 0) or saved.step >= config.training.steps:
        return False
    log.warning("%s: the run stopped here, after %d validations without a better one than step %d (--patience %d); "
                "nothing is trained. To go on, use --patience 0 or a larger one", saved.path, best["worse_in_a_row"],
                best["step"], patience)
    return True


def load_start(config: RunConfig) -> Adapter | None:
    """Return the adapter that ``--init_from`` names, which has to be one of this variant; None without it.

    Raises:
        ValueError: the file is no adapter, or one of another variant.
    """
    if config.init_from is None:
        return None
    adapter = load_adapter(config.init_from)
    variant = adapter.meta.get("variant", config.model.variant)
    if variant != config.model.variant:
        raise UserError(f"--init_from {config.init_from}: is an adapter of {variant}, expected one of "
                         f"{config.model.variant}; give --variant {variant}, or another adapter")
    if change := generator_change(adapter.meta, config.model.generator):
        log.warning("%s was trained on %s, this run has %s (--generator)", config.init_from, *change)
    used = adapter.meta.get("clip_features", config.training.clip_features)
    if used != config.training.clip_features:
        log.warning("%s was trained with --clip_features %s, this run has %s", config.init_from, used,
                    config.training.clip_features)
    return adapter


def check_resumable(saved: TrainingState, config: RunConfig, num_processes: int = 1) -> None:
    """Raise a ValueError if the run is at its end, or if continuing would mix two different trainings.

    An update of another number of clips is allowed, and said.

    A run that was stopped between its last step and its final adapter, or before all of its verdict, its page and its
    model card were written, is not at its end.
    """
    training = config.training
    final = finished_adapter(saved, config.output_dir) if saved.step == training.steps else None
    if saved.step > training.steps or (final and not missing_outcome(final, saved.step, config.verdict)):
        raise at_its_end(saved, config)
    check_same_settings(saved, config.lora)
    before = saved.meta.get("train_config", {})
    pairs = {name: (before[name], getattr(training, name)) for name in FIXED_SETTINGS if name in before}
    for name, now in (("variant", config.model.variant), ("normalize_audio", config.normalize_audio),
                      ("preserve", list(config.preserve)), ("preserve_share", config.preserve_share)):
        pairs[name] = (saved.meta.get(name, now), now)
    if change := generator_change(saved.meta, config.model.generator):
        pairs["generator"] = change
    different = [f"{name} was {was!r} and is {now!r} now" for name, (was, now) in pairs.items() if was != now]
    if different:
        raise UserError(f"{saved.path}: continuing with other settings would mix two trainings: "
                         f"{'; '.join(different)}. Use the same settings, or start a new run")
    was = [saved.meta.get("processes", 1), *(before.get(name) for name in ("batch_size", "grad_accum"))]
    now = [num_processes, training.batch_size, training.grad_accum]
    if None not in was and math.prod(was) != math.prod(now):
        log.warning("%s: an update was of %s so far and is of %d from here on (%s), so the run goes on otherwise than "
                    "it would have", saved.path, counted(math.prod(was), "clip"), math.prod(now), "; ".join(
                        f"{name} was {old} and is {new}" for name, old, new in zip(
                            ("number of processes", "--batch_size", "--grad_accum"), was, now, strict=True)
                        if old != new))


# -- data --------------------------------------------------------------------------------------------------------------


def load_clips(
    config: RunConfig, data_dir: Path, device: torch.device, world: World, told: list[str] | None = None,
    shared: SharedParts | None = None,
) -> ClipDataset:
    """Return the clips of a data folder, encoded; every clip that cannot be used is named.

    Args:
        told: gets the lines about the data that the log gets; not those of clips that are shared.
        shared: of earlier runs, whose clips are taken if they are the same.

    Raises:
        ValueError: no clip can be used, or some cannot and ``--skip_invalid`` is not given.
    """
    key = (real_path(data_dir), config.model, config.duration, config.normalize_audio, config.skip_invalid)
    if shared is not None:
        return shared.clips(key, lambda: load_clips(config, data_dir, device, world, told))
    with world.main_first(f"reading {data_dir}"):  # rank 0 has noted all hashes when the others look
        clips, problems = open_clip_dataset(
            data_dir, get_variant(config.model.variant), config.model.selva_dir,
            max_duration_sec=config.duration, normalize_audio=config.normalize_audio, use_cache=not config.dry_run,
        )
    if isinstance(clips, FolderDataset):
        if world.size > 1:
            with world.at_once(f"encoding {data_dir}"):
                clips.encode_share(world.rank, world.size, device)
        with world.main_first(f"encoding {data_dir}"):  # what is left: texts, and what cannot be encoded
            problems += clips.prepare(device)
    for path, reason in problems:
        log.error("%s", reason if str(path) in reason else f"{path}: {reason}")
    if world.is_main and isinstance(clips, FolderDataset) and len(clips):
        summary = summarise(clips, problems)
        for line in summary.lines():
            log.info("%s", line)
        for line in summary.warnings():
            log.warning("%s", line)
        if told is not None:
            told += [str(data_dir), *summary.lines(), *(f"warning: {line}" for line in summary.warnings())]
    if world.is_main and isinstance(clips, MemmapDataset) and len(clips):
        lines = memmap_lines(clips)
        for line in lines:
            log.info("%s", line)
        if told is not None:
            told += [str(data_dir), *lines]
    if not len(clips):
        raise UserError(f"{data_dir}: no clip can be trained on; extract_features.py makes .npz + sound pairs")
    if problems and not config.skip_invalid:
        raise UserError(f"{data_dir}: {counted(len(problems), 'file')} cannot be used, see above; repair or remove "
                        "what is named there, or give --skip_invalid to train without it")
    return clips


def load_split(
    config: RunConfig, device: torch.device, world: World, saved: TrainingState | None = None,
    told: list[str] | None = None,
    shared: SharedParts | None = None,
) -> tuple[ClipDataset, ClipDataset]:
    """Return (training, held-out) clips, as ``--val_dir`` or ``--val_fraction`` divides them.

    Of more than ``--val_clips`` held-out clips a seeded choice is returned, the same in every run on the same data.

    Args:
        saved: the state that is continued; the clips of a run that version 0.1.0 began are divided as it did.
        told: gets the lines about the data that the log gets.
        shared: see :func:`load_clips`.
    """
    sources = config.sources
    sets = [load_clips(config, source.path, device, world, told, shared) for source in sources]
    if len(sets) > 1:  # the same name may be in several
        sets = [PrefixedDataset(one, f"{source.path.name}/") for one, source in zip(sets, sources, strict=True)]
    clips = functools.reduce(ConcatDataset, sets)
    set_of = [number for number, one in enumerate(sets) for _ in range(len(one))]
    as_before = saved is not None and divided_by_clip(saved)
    if config.val_dir is None:
        clips, val_clips = split_validation(clips, config.val_fraction, config.training.seed, by_origin=not as_before)
    else:
        val_clips = load_clips(config, config.val_dir, device, world, told, shared)
    log.info("%s to train on, %d held out%s", counted(len(clips), "clip"), len(val_clips),
             "" if len(val_clips) else ": overfitting will not be seen")
    _report_origins(config, clips, val_clips)
    most = config.val_clips
    if most and len(val_clips) > most and not as_before:
        order: list[int] = torch.randperm(
            len(val_clips), generator=torch.Generator().manual_seed(config.training.seed)).tolist()
        log.info("validation is on %d of the %d held-out clips, always the same; --val_clips 0 takes all",
                 most, len(val_clips))
        val_clips = val_clips.subset(sorted(order[:most]))
    return _weighted(clips, sources, set_of), val_clips


def _weighted(clips: ClipDataset, sources: Sequence[DataSource], set_of: Sequence[int]) -> ClipDataset:
    """Return the clips to train on, each as often in an epoch as the weight of its set says.

    Args:
        set_of: number of the set, for every clip of all sets, held out or not.
    """
    repeats = repeats_of([source.weight for source in sources])
    if max(repeats) == 1:
        return clips
    indices = clips.indices if isinstance(clips, Subset) else range(len(clips))
    times = [repeats[set_of[index]] for index in indices]
    for number, source in enumerate(sources):
        own = [count for index, count in zip(indices, times, strict=True) if set_of[index] == number]
        log.info("%s: %d clips to train on, %d times each, %.0f %% of an epoch", source.path, len(own), repeats[number],
                 100 * sum(own) / sum(times))
    return clips.subset(place for place, count in enumerate(times) for _ in range(count))


def _report_origins(config: RunConfig, clips: ClipDataset, val_clips: ClipDataset) -> None:
    """Say which clips stay together in a split, and name held-out ones whose video or sound is trained on."""
    count = len(clips)
    groups = origin_groups(ConcatDataset(clips, val_clips))
    if config.val_dir is None and config.val_fraction > 0 and len(groups) > len(set(groups)):
        log.info("%d clips are of %d videos or sounds; what is of one video, or has the same sound, is held out "
                 "together or not at all", len(groups), len(set(groups)))
        if not len(val_clips) and count >= 5:
            log.warning("nothing is held out: every video or sound has more than half of the clips; give clips of "
                        "another one with --val_dir")
    nameless = sum(not any(origin.startswith("source ") for origin in clips.origins(i)) for i in range(count))
    if config.val_dir is None and len(val_clips) and nameless:
        log.info("%d of %d clips to train on do not say which video they are of, so a held-out clip may be of the same "
                 "one", nameless, count)
    trained = set(groups[:count])
    leaked = [name for name, group in zip(val_clips.ids, groups[count:], strict=True) if group in trained]
    if leaked:
        log.warning("%d held-out clips are of a video or a sound that is trained on too, so the validation loss looks "
                    "better than it is: %s", len(leaked), listed(leaked, NAMED))


# -- model -------------------------------------------------------------------------------------------------------------


def build_run(
    config: RunConfig, clips: tuple[ClipDataset, ClipDataset], device: torch.device, world: World,
    shared: SharedParts | None = None,
) -> TrainingRun:
    """Return the base model with a fresh adapter and everything that trains it.

    Args:
        shared: of earlier runs, whose base model and sounds to preserve are taken if they are the same.
    """
    shared = shared or SharedParts()
    model, training, precision = config.model, config.training, dtype_of(config.precision)
    stored = stored_dtype(config.base_dtype, config.precision)

    def load() -> Generator:
        base = load_generator(model.variant, model.selva_dir, file=model.generator)
        cast_frozen_(base, stored)
        return base.to(device)

    own_base = config.compile  # compiled blocks are not given on
    generator = load() if own_base else shared.generator((model, stored, device), load)
    check_ranks(generator, config.lora)
    if config.preserve:  # before there is an adapter, which would cost time in every layer and add nothing yet

        def make() -> ClipDataset:
            text_features = load_clip_text(model.variant, model.selva_dir, device).encode(config.preserve)
            return with_preserved(
                generator, clips[0], config.preserve, text_features, config.preserve_share, seed=training.seed,
                precision=precision, use_clip_features=training.clip_features == "use",
            )

        key = (model, stored, precision, tuple(config.preserve), config.preserve_share, training.seed,
               training.clip_features,
               tuple(map(str, config.data_dir)) if isinstance(config.data_dir, list | tuple) else str(config.data_dir),
               config.duration, config.normalize_audio, tuple(clips[0].ids))
        clips = shared.preserved(key, make), clips[1]
    report = inject_lora(generator, config.lora, torch.Generator().manual_seed(training.seed))
    generator.gradient_checkpointing = config.checkpoint_blocks or config.grad_checkpointing
    if config.compile:
        compile_blocks_(generator)
    total = sum(p.numel() for p in generator.parameters())
    log.info("%s: %s of %s in all", model.variant, report.summary(), f"{total:,}")
    for line in report.notice:
        log.warning("%s", line)
    torch.manual_seed(training.seed + world.rank)  # dropout
    graphs = graphed_calls(config.cuda_graph, device, "training", graph_problem(generator, world))
    return TrainingRun(generator, *clips, training, precision, world, graphs)


def estimate(run: TrainingRun) -> None:
    """Try two steps and log the time and memory that the whole run will need; nothing is written."""
    run.generator.train()
    run.train_step()  # the first one allocates and warms up
    started = time.monotonic()
    run.train_step()
    seconds = time.monotonic() - started
    log.info("dry run: %.2f s/step, about %s for %d steps; peak memory %.2f GiB; nothing was written", seconds,
             clock(seconds * run.config.steps), run.config.steps, peak_memory_bytes(run.device) / 2**30)
