"""Preparation of a run: the state to resume from, the clips, the base model with its adapter."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.checkpoint import (
    Adapter,
    TrainingState,
    check_same_settings,
    load_adapter,
    load_checkpoint,
    load_newest_checkpoint,
)
from selva.data.dataset import ClipDataset
from selva.flow import SamplingConfig
from selva.lora.config import LoRAConfig
from selva.lora.inject import check_ranks, inject_lora
from selva.models.generator import Generator, cast_frozen_
from selva.training.changed_settings import warn_of_changes
from selva.training.compiling import compile_blocks_
from selva.training.config import RunConfig
from selva.training.outcome import missing_outcome
from selva.training.prior_preservation import EARLIER_UNGUIDED, UNGUIDED, with_preserved
from selva.training.rate_probe import probe_rate
from selva.training.run import TrainingRun, graph_problem
from selva.training.set_aside import final_of
from selva.training.shared import SharedParts
from selva.utils.device import dtype_of, peak_memory_bytes, stored_dtype
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.graph import WARM_UPS, graphed_calls
from selva.utils.settings import removed_of, removed_problems, values_of
from selva.utils.text import clock, counted
from selva.weights.find import generator_change, generator_mark
from selva.weights.load import load_clip_text, load_generator

log = logging.getLogger(__name__)

NAMED = 5  # clips in a message


def adapter_meta(
    config: RunConfig, num_clips: int, num_processes: int = 1, saved: TrainingState | None = None
) -> dict[str, Any]:
    """Return the metadata of every adapter of the run: the published keys, and ours that others ignore.

    Args:
        saved: what the run goes on from.
    """
    training, preserving = config.training, preserve_sampling(config, saved)
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
        "preserve_near": config.preserve_near,
        **({"preserve_solver": preserving.solver, "preserve_steps": preserving.num_steps} if preserving else {}),
        **_meta_of_sets(config),
        "generator": generator_mark(config.model.generator),
        **({"init_from": config.init_from.name} if config.init_from else {}),
        **({"processes": num_processes} if num_processes > 1 else {}),
    }


def _meta_of_sets(config: RunConfig) -> dict[str, Any]:
    """Return the metadata about prefixes, weights and their meaning; nothing about a plain data set."""
    prefixes = [prefix.strip() for prefix in config.prefixes(len(config.sources))]
    weights = [source.weight for source in config.sources]
    several = len(weights) > 1
    return {**({"prompt_prefix": prefixes} if any(prefixes) else {}),
            **({"data_weights": weights, "balance": config.balance} if several else {})}


def preserve_sampling(config: RunConfig, saved: TrainingState | None) -> SamplingConfig | None:
    """Return the way in which the run makes its sounds to preserve, as when it was begun; None if it makes none."""
    if not config.preserve:
        return None
    if saved is None or "preserve" not in saved.meta:  # a run of ComfyUI-SelVA that goes on here
        return UNGUIDED
    if "preserve_solver" not in saved.meta:
        return EARLIER_UNGUIDED
    return dataclasses.replace(UNGUIDED, solver=saved.meta["preserve_solver"], num_steps=saved.meta["preserve_steps"])


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
    if saved:
        log.info("resuming from %s", saved.path)
    else:
        log.info("nothing to resume in %s: it has no saved step, so the run starts anew", config.output_dir)
    return saved


# Settings of TrainConfig that change what is learned; the others may change when a run is continued.
FIXED_SETTINGS = ("clip_features", "latent", "null_prob", "padded_loss", "timestep_mode", "logit_normal_sigma",
                  "seed")
# What a resume is meant to change, what is told with the size of an update, and --lr_probe, which a begun run ignores.
FREE_SETTINGS = ("steps", "save_every", "val_every", "log_every", "batch_size", "grad_accum", "lr_probe")


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
    log.warning("%s: the run stopped here, after %s without a better one than step %d (--patience %d); "
                "nothing is trained. To go on, use --patience 0 or a larger one", saved.path,
                counted(best["worse_in_a_row"], "validation"),
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

    An update of another number of clips is allowed, and said; so are another rate, decay, dropout and the like.

    A run that was stopped between its last step and its final adapter, or before all of its verdict, its page and its
    model card were written, is not at its end.
    """
    training = config.training
    final = finished_adapter(saved, config.output_dir) if saved.step == training.steps else None
    if saved.step > training.steps or (final and not missing_outcome(final, saved.step, config.verdict)):
        raise at_its_end(saved, config)
    check_same_settings(saved, config.lora)
    before = saved.meta.get("train_config", {})
    if gone := removed_problems({**saved.meta, **before}, removed_of(RunConfig)):
        raise UserError(f"{saved.path}: cannot be continued: {'; '.join(gone)}. Start a new run, which may begin at "
                        "this adapter (--init_from)")
    pairs = {name: (before[name], getattr(training, name)) for name in FIXED_SETTINGS if name in before}
    for name, now in (("variant", config.model.variant), ("normalize_audio", config.normalize_audio),
                      ("preserve", list(config.preserve)), ("preserve_share", config.preserve_share)):
        pairs[name] = (saved.meta.get(name, now), now)
    if config.preserve:
        pairs["preserve_near"] = (saved.meta.get("preserve_near", 0.0), config.preserve_near)
    sets = _meta_of_sets(config)
    pairs["prompt_prefix"] = (saved.meta.get("prompt_prefix", []), sets.get("prompt_prefix", []))
    if saved.meta.get("data_weights") and "data_weights" in sets:  # of an earlier version they are not known
        pairs |= {name: (saved.meta[name], sets[name]) for name in ("data_weights", "balance")}
    if change := generator_change(saved.meta, config.model.generator):
        pairs["generator"] = change
    different = [f"{name} was {was!r} and is {now!r} now" for name, (was, now) in pairs.items() if was != now]
    if different:
        raise UserError(f"{saved.path}: continuing with other settings would mix two trainings: "
                         f"{'; '.join(different)}. Use the same settings, as config.yaml in its folder holds them "
                         "(--config), or start a new run")
    was = [saved.meta.get("processes", 1), *(before.get(name) for name in ("batch_size", "grad_accum"))]
    now = [num_processes, training.batch_size, training.grad_accum]
    if None not in was and math.prod(was) != math.prod(now):
        passes, rest = divmod(math.prod(was), num_processes * training.batch_size)
        advice = f"; --grad_accum {passes} keeps it" if passes and not rest else ""
        log.warning("%s: an update was made of %s and is now made of %d (%s), so the run will not go on as it would "
                    "have%s", saved.path, counted(math.prod(was), "clip"), math.prod(now), "; ".join(
                        f"{name} was {old} and is {new}" for name, old, new in zip(
                            ("number of processes", "--batch_size", "--grad_accum"), was, now, strict=True)
                        if old != new), advice)
    if not saved.is_published:  # what such a run was trained with is told when its state is restored
        if training.lr_probe:  # keeps the rate that was chosen
            training = dataclasses.replace(training, lr=before.get("lr", training.lr))
        lora = LoRAConfig.from_meta(saved.meta)
        warn_of_changes(saved.path, {**before, "lora_dropout": lora.dropout},
                        {**values_of(training), "lora_dropout": config.lora.dropout}, RunConfig, FREE_SETTINGS)


# -- model -------------------------------------------------------------------------------------------------------------


def build_run(
    config: RunConfig, clips: tuple[ClipDataset, ClipDataset], device: torch.device, world: World,
    shared: SharedParts | None = None, saved: TrainingState | None = None,
) -> TrainingRun:
    """Return the base model with a fresh adapter and everything that trains it.

    With ``lr_probe``, the rate of its configuration is the one that was chosen now.

    Args:
        saved: what the run goes on from, with the rate of the configuration.
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
    own_clips = clips[0]

    def prompts() -> Tensor:
        return load_clip_text(model.variant, model.selva_dir, device).encode(config.preserve)

    if config.preserve_near and not config.preserve:
        log.warning("--preserve_near %g has no effect without --preserve", config.preserve_near)
    sampling = preserve_sampling(config, saved)
    if sampling is not None:  # before there is an adapter, which would cost time in every layer and add nothing yet
        if sampling != UNGUIDED:
            log.info("sounds to preserve are made by %s of %s, as when the run began",
                     counted(sampling.num_steps, "step"), sampling.solver)

        def make() -> ClipDataset:
            return with_preserved(
                generator, own_clips, config.preserve, prompts(), config.preserve_share, seed=training.seed,
                near=config.preserve_near, precision=precision, use_clip_features=training.clip_features == "use",
                sampling=sampling,
            )

        key = (model, stored, precision, tuple(config.preserve), config.preserve_share, training.seed, sampling,
               config.preserve_near, training.clip_features,
               tuple(map(str, config.data_dir)) if isinstance(config.data_dir, list | tuple) else str(config.data_dir),
               config.duration, config.normalize_audio, tuple(config.prompt_prefix), tuple(clips[0].ids))
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
    if training.lr_probe and saved is None:
        found = probe_rate(generator, clips[0], training, precision, world)
        training = dataclasses.replace(training, lr=found.lr)
    return TrainingRun(generator, *clips, training, precision, world, graphs)


def estimate(run: TrainingRun) -> None:
    """Try a few steps and log the time and memory that the whole run will need; nothing is written."""
    run.generator.train()
    warm_ups = 1  # it allocates
    if run.graphs is not None:
        warm_ups = WARM_UPS + 1  # the last of them records
        windows = run.batches.peek()
        run.batches.peek = lambda: windows  # of one length, as every length has a graph of its own
    for _ in range(warm_ups):
        float(run.train_step()[0])  # a device is waited for where a number is read
    started = time.monotonic()
    float(run.train_step()[0])
    seconds = time.monotonic() - started
    log.info("dry run: %.2f s/step, about %s for %s; peak memory %.2f GiB; nothing was written", seconds,
             clock(seconds * run.config.steps), counted(run.config.steps, "step"),
             peak_memory_bytes(run.device) / 2**30)
