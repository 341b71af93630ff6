"""Teach a video-to-audio model a new sound: train a LoRA adapter on extracted features.

    python train_lora.py --data_dir features/dog --output_dir runs/dog --variant small_16k --selva_dir weights/
    python train_lora.py --data_dir features/demo --output_dir runs/demo --variant tiny_16k --steps 200

Reads <name>.npz and the sound of the same name (extract_features.py writes both). Writes to the output folder:

    adapter_step00500.pt ...    adapters to try, each also a point to resume from (--resume)
    adapter_final.pt            the result; adapter_best.pt: the lowest loss on held-out clips
    sample_step00500.wav/.png   a sound generated at that step, and its spectrogram
    loss_raw.png loss_smoothed.png metrics.jsonl meta.json config.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selva import cli, flow
from selva.checkpoint import TrainingState, check_same_settings, load_checkpoint, load_newest_checkpoint
from selva.data.dataset import ClipDataset, split_validation
from selva.data.folder_dataset import FolderDataset, load_clip_dataset
from selva.data.summary import summarise
from selva.lora.config import PRESETS, LoRAConfig, parse_targets
from selva.lora.inject import inject_lora
from selva.models.generator import cast_frozen_
from selva.models.variants import Variant, get_variant
from selva.sequence import DEFAULT_DURATION_SEC
from selva.training.compiling import compile_blocks_, prepare_to_compile
from selva.training.config import CLIP_FEATURE_MODES, LATENT_MODES, LR_SCHEDULES, TrainConfig
from selva.training.loop import fit
from selva.training.prior_preservation import mixture, with_preserved
from selva.training.run import TrainingRun
from selva.training.run_folder import RunFolder, check_disk_space
from selva.training.sample import TrainingSample
from selva.utils.device import peak_memory_bytes
from selva.utils.distributed import World, join_world, leave
from selva.utils.metrics_log import MetricsFile
from selva.utils.text import clock
from selva.weights.find import check_weights
from selva.weights.load import load_clip_text, load_generator

log = logging.getLogger("selva.train_lora")


# ---------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("data and output")
    group.add_argument("--data_dir", type=Path, required=True,
                       help="folder of .npz + sound pairs, or an MMAudio memmap")
    group.add_argument("--output_dir", type=Path, default=Path("lora_output"), help="folder of this run")
    group.add_argument("--resume", metavar="FILE|auto",
                       help="continue from a step file; auto takes the newest of the output folder, if any")
    group.add_argument("--dry_run", action="store_true",
                       help="check everything, try two steps, estimate memory and time, and write nothing")
    group.add_argument("--skip_invalid", action="store_true",
                       help="train without the clips that cannot be used, instead of stopping to name them")
    group.add_argument("--duration", type=float, default=DEFAULT_DURATION_SEC,
                       help="longer clips are trained on in windows of this length; shorter ones stay as they are")
    group.add_argument("--normalize_audio", choices=("peak", "none"), default="peak",
                       help="peak: 0.95 of full scale, as the base models were trained; none: as recorded")
    parser.add_model()

    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=int, default=LoRAConfig.rank, help="size of the adapter")
    group.add_argument("--alpha", type=float, help="the adapter is scaled by alpha / rank (default: rank, scale 1)")
    group.add_argument("--target", nargs="+", default=list(LoRAConfig().targets), metavar="SUFFIX[:RANK]",
                       help="adapt the layers whose names end so, e.g. attn.qkv linear1:4, or a preset: "
                       f"{', '.join(PRESETS)} (default: attn.qkv)")
    group.add_argument("--lora_dropout", type=float, default=LoRAConfig.dropout, help="dropout before the adapter")
    group.add_argument("--init", choices=("standard", "pissa"), default=LoRAConfig.init,
                       help="pissa starts at the largest singular directions of the base weights")
    group.add_argument("--dora", action="store_true", help="DoRA: also train the length of every row of the weights")
    group.add_argument("--rslora", action="store_true", help="scale alpha / sqrt(rank), alpha 16 unless given")

    group = parser.add_argument_group("optimisation (a step is one update, whatever --grad_accum is)")
    add = _adder(group)
    add("steps", int, "updates")
    add("lr", float, "learning rate")
    add("warmup_steps", int, "updates over which the rate rises")
    add("lr_schedule", str, "what the rate does then; multistep is MMAudio's", choices=LR_SCHEDULES)
    add("lr_cycles", int, "cycles of cosine_restarts")
    add("batch_size", int, "clips per forward pass")
    add("grad_accum", int, "forward passes per update")
    add("lora_plus_ratio", float, "LoRA+: rate of the B matrices over that of the A matrices")
    add("weight_decay", float, "decoupled weight decay of the adapter")
    add("ema_decay", float, "keep a moving average of the adapter, which is then what is judged and saved; e.g. 0.999")
    add("save_every", int, "steps between checkpoints, each with a sample")

    group = parser.add_argument_group("objective (the defaults are how the base models were trained)")
    add = _adder(group)
    add("timestep_mode", str, "times to train at; curriculum is logit_normal first and uniform later",
        choices=flow.TIMESTEP_MODES)
    add("logit_normal_sigma", float, "spread of logit_normal")
    add("curriculum_switch", float, "fraction of all steps at which curriculum switches")
    add("null_prob", float, "how often the video, and separately the text, is replaced by the learned nothing")
    add("latent", str, "draw each target from the VAE posterior, or take its mode", choices=LATENT_MODES)
    add("clip_features", str, "pass CLIP frame features, or the learned nothing as official SelVA does; "
        "stored in the adapter and followed by infer.py", choices=CLIP_FEATURE_MODES)

    group = parser.add_argument_group("evaluation")
    group.add_argument("--val_fraction", type=float, default=0.1,
                       help="share of the clips held out to see overfitting; none below five clips")
    group.add_argument("--val_dir", type=Path, help="hold out the clips of this folder instead")
    _adder(group)("val_every", int, "steps between validations")
    _adder(group)("patience", int, "stop after so many validations without a better one; 0: never")
    _adder(group)("log_every", int, "steps between log lines")
    group.add_argument("--keep_last", type=int, default=0, help="step files to keep; 0: all of them")
    group.add_argument("--tensorboard", action="store_true", help="write the curves for TensorBoard too")
    group.add_argument("--preview", action=cli.BooleanFlag, default=True, help="generate a sample at every checkpoint")

    group = parser.add_argument_group("keeping what the model knows")
    group.add_argument("--preserve", nargs="*", default=[], metavar="PROMPT",
                       help="sounds that shall stay as they are; the model also trains on what it makes of these "
                       "prompts now. Without them, a new sound may take over others at full strength")
    group.add_argument("--preserve_share", type=float, default=0.5, help="share of the training that goes into that")

    group = parser.add_argument_group("memory and speed")
    group.add_argument("--grad_checkpointing", action="store_true",
                       help="recompute blocks in the backward pass: less memory for more time")
    group.add_argument("--checkpoint_blocks", type=cli.positive_int, metavar="N",
                       help="recompute only the first N blocks, as few as the memory needs")
    group.add_argument("--compile", action="store_true",
                       help="compile the blocks: the first steps take a minute or more, less when the same has been "
                       "compiled before, and later ones less; needs a C++ compiler, on NVIDIA GPUs triton")
    parser.add_common(precision="bf16")
    return parser


def _adder(group: argparse._ArgumentGroup):
    """Return a function that adds an option whose default is the field of the same name in TrainConfig."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}

    def add(name: str, kind: type, text: str, **kwargs: Any) -> None:
        group.add_argument(f"--{name}", type=kind, default=defaults[name], help=text, **kwargs)

    return add


def configs_from(args: argparse.Namespace) -> tuple[TrainConfig, LoRAConfig]:
    """Return the checked settings; all mistakes of both are reported at once.

    Raises:
        UsageError: lists every setting that is out of range.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    problems = []
    train_config = lora_config = None
    try:
        train_config = TrainConfig(**{k: v for k, v in vars(args).items() if k in names})
    except ValueError as error:
        problems.append(str(error))
    try:
        targets, target_ranks = parse_targets(args.target)
        lora_config = LoRAConfig(rank=args.rank, alpha=args.alpha, targets=targets, target_ranks=target_ranks,
                                 dropout=args.lora_dropout, rslora=args.rslora, init=args.init, dora=args.dora)
    except ValueError as error:
        problems.append(str(error))
    if not 0 <= args.val_fraction < 1:
        problems.append(f"val_fraction is {args.val_fraction}, expected 0 to below 1")
    try:
        mixture(1, 1, args.preserve_share)
    except ValueError as error:
        problems.append(str(error))
    if args.keep_last < 0:
        problems.append(f"keep_last is {args.keep_last}, expected at least 0")
    folders = {"--data_dir": args.data_dir, "--val_dir": args.val_dir}
    problems += [f"{flag} {path}: no such folder" for flag, path in folders.items() if path and not path.is_dir()]
    if args.resume not in (None, "auto") and not Path(args.resume).is_file():
        problems.append(f"--resume {args.resume}: no such file")
    if problems:
        raise cli.UsageError("; ".join(problems))
    return train_config, lora_config


def adapter_meta(variant: Variant, args: argparse.Namespace, config: TrainConfig, num_clips: int) -> dict[str, Any]:
    """Return what is stored in every adapter of the run: the published keys, and ours that others ignore."""
    return {
        "variant": variant.name,
        "steps": config.steps,
        "timestep_mode": config.timestep_mode,
        "logit_normal_sigma": config.logit_normal_sigma,
        "curriculum_switch": config.curriculum_switch,
        "lora_plus_ratio": config.lora_plus_ratio,
        "clip_features": config.clip_features,
        "num_clips": num_clips,
        "train_config": {**dataclasses.asdict(config), "betas": list(config.betas)},
        "normalize_audio": args.normalize_audio,
        "precision": args.precision,
        "preserve": list(args.preserve),
        "preserve_share": args.preserve_share,
    }


# ---------------------------------------------------------------------------------------------------------------
# resuming
# ---------------------------------------------------------------------------------------------------------------


def find_resume(args: argparse.Namespace) -> TrainingState | None:
    """Return the state that ``--resume`` names; None for a fresh start."""
    if args.resume is None:
        return None
    if args.resume != "auto":
        return load_checkpoint(args.resume)
    saved = load_newest_checkpoint(args.output_dir)
    log.info("resuming from %s", saved.path) if saved else log.info("nothing to resume in %s", args.output_dir)
    return saved


# Settings of TrainConfig that change what is learned; the others may change when a run is continued.
FIXED_SETTINGS = ("clip_features", "latent", "null_prob", "timestep_mode", "logit_normal_sigma", "seed")


def check_resumable(
    saved: TrainingState, args: argparse.Namespace, config: TrainConfig, lora_config: LoRAConfig
) -> None:
    """Raise a ValueError if the run is at its end, or if continuing would mix two different trainings.

    A run that was stopped between its last step and its final adapter is not at its end.
    """
    finished = (args.output_dir / "adapter_final.pt").exists()
    if saved.step > config.steps or (saved.step == config.steps and finished):
        raise ValueError(f"{saved.path}: is at step {saved.step} and --steps is {config.steps}; give a larger --steps")
    check_same_settings(saved, lora_config)
    before = saved.meta.get("train_config", {})
    pairs = {name: (before[name], getattr(config, name)) for name in FIXED_SETTINGS if name in before}
    for name, now in (("variant", args.variant), ("normalize_audio", args.normalize_audio),
                      ("preserve", list(args.preserve)), ("preserve_share", args.preserve_share)):
        pairs[name] = (saved.meta.get(name, now), now)
    different = [f"{name} was {was!r} and is {now!r} now" for name, (was, now) in pairs.items() if was != now]
    if different:
        raise ValueError(f"{saved.path}: continuing with other settings would mix two trainings: "
                         f"{'; '.join(different)}. Use the same settings, or start a new run")


# ---------------------------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------------------------


def load_clips(
    args: argparse.Namespace, data_dir: Path, variant: Variant, device: torch.device, world: World
) -> ClipDataset:
    """Return the clips of a data folder, encoded; every clip that cannot be used is named.

    Raises:
        ValueError: no clip can be used, or some cannot and ``--skip_invalid`` is not given.
    """
    def load() -> tuple[ClipDataset, list[tuple[Path, str]]]:
        return load_clip_dataset(
            data_dir, variant, args.selva_dir, device, max_duration_sec=args.duration,
            normalize_audio=args.normalize_audio, use_cache=not args.dry_run,
        )

    if not world.is_main:  # rank 0 has filled the cache when the others look
        world.wait()
    clips, problems = load()
    if world.is_main:
        world.wait()
    for path, reason in problems:
        log.error("%s", reason if str(path) in reason else f"{path}: {reason}")
    if world.is_main and isinstance(clips, FolderDataset) and len(clips):
        summary = summarise(clips, problems)
        for line in summary.lines():
            log.info("%s", line)
        for line in summary.warnings():
            log.warning("%s", line)
    if not len(clips):
        raise ValueError(f"{data_dir}: no clip can be trained on; extract_features.py makes .npz + sound pairs")
    if problems and not args.skip_invalid:
        raise ValueError(f"{data_dir}: {len(problems)} files cannot be used, see above; repair or remove them, or give "
                         "--skip_invalid to train without them")
    return clips


def load_split(
    args: argparse.Namespace, variant: Variant, device: torch.device, world: World
) -> tuple[ClipDataset, ClipDataset]:
    """Return (training, held-out) clips, as ``--val_dir`` or ``--val_fraction`` divides them."""
    clips = load_clips(args, args.data_dir, variant, device, world)
    if args.val_dir is None:
        clips, val_clips = split_validation(clips, args.val_fraction, args.seed)
    else:
        val_clips = load_clips(args, args.val_dir, variant, device, world)
    log.info("%d clips to train on, %d held out%s", len(clips), len(val_clips),
             "" if len(val_clips) else ": overfitting will not be seen")
    return clips, val_clips


# ---------------------------------------------------------------------------------------------------------------
# stopping
# ---------------------------------------------------------------------------------------------------------------


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else cli.Terminated
        self.signal = number
        log.warning("stopping after this step and saving; once more stops at once")

    @property
    def exit_code(self) -> int:
        return cli.EXIT_INTERRUPTED if self.signal == signal.SIGINT else cli.EXIT_TERMINATED


# ---------------------------------------------------------------------------------------------------------------
# the script
# ---------------------------------------------------------------------------------------------------------------


def build_run(
    args: argparse.Namespace,
    config: TrainConfig,
    lora_config: LoRAConfig,
    variant: Variant,
    clips: tuple[ClipDataset, ClipDataset],
    device: torch.device,
    world: World,
) -> TrainingRun:
    """Return the base model with a fresh adapter and everything that trains it."""
    precision = cli.PRECISIONS[args.precision]
    generator = load_generator(variant.name, args.selva_dir)
    cast_frozen_(generator, precision)
    report = inject_lora(generator, lora_config, torch.Generator().manual_seed(args.seed))
    generator.to(device)
    generator.gradient_checkpointing = args.checkpoint_blocks or args.grad_checkpointing
    if args.preserve:
        text_features = load_clip_text(variant.name, args.selva_dir, device).encode(args.preserve)
        clips = (
            with_preserved(
                generator, clips[0], args.preserve, text_features, args.preserve_share, seed=args.seed,
                precision=precision, use_clip=config.clip_features == "use",
            ),
            clips[1],
        )
    if args.compile:
        compile_blocks_(generator)
    total = sum(p.numel() for p in generator.parameters())
    log.info("%s: %s of %s in all", variant.name, report.summary(), f"{total:,}")
    for line in report.notice:
        log.warning("%s", line)
    torch.manual_seed(args.seed + world.rank)  # dropout
    return TrainingRun(generator, *clips, config, precision, world)


def estimate(run: TrainingRun) -> None:
    """Try two steps and tell what the whole run will need; nothing is written."""
    run.generator.train()
    run.train_step()  # the first one allocates and warms up
    started = time.monotonic()
    run.train_step()
    seconds = time.monotonic() - started
    log.info("dry run: %.2f s/step, about %s for %d steps; peak memory %.2f GiB; nothing was written", seconds,
             clock(seconds * run.config.steps), run.config.steps, peak_memory_bytes(run.device) / 2**30)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config, lora_config = configs_from(args)
    device, variant = cli.resolve_device(args.device), get_variant(args.variant)
    needs = ("generator", "vae", "clip_text", *(["vocoder"] if args.preview else []))
    check_weights(variant.name, args.selva_dir, needs)
    if args.compile:
        prepare_to_compile(device)
    with join_world(device) as world:
        return train(args, config, lora_config, variant, device, world)


def train(
    args: argparse.Namespace,
    config: TrainConfig,
    lora_config: LoRAConfig,
    variant: Variant,
    device: torch.device,
    world: World,
) -> int:
    """Do what the command line says and return the exit code."""
    # 1. the old state and the data, before the base model is read
    saved = find_resume(args)
    if saved is not None:
        check_resumable(saved, args, config, lora_config)
    clips, val_clips = load_split(args, variant, device, world)

    # 2. the model, and everything with a state; then the old state
    run = build_run(args, config, lora_config, variant, (clips, val_clips), device, world)
    if saved is not None:
        run.restore(saved)
    if args.dry_run:
        estimate(run)
        return 0

    # 3. the output folder
    meta = adapter_meta(variant, args, config, len(clips))
    folder = RunFolder(args.output_dir, meta, args.keep_last,
                       f"{variant.name}, {len(clips)} clips, rank {lora_config.rank}")
    metrics, preview = MetricsFile(), None
    if world.is_main:
        num_checkpoints = min(-(-config.steps // config.save_every), args.keep_last or config.steps)
        check_disk_space(args.output_dir, run.checkpoint_bytes(), num_checkpoints)
        metrics = folder.open(saved.step if saved else None)
        if args.tensorboard:
            metrics.mirror_to_tensorboard(args.output_dir / "tensorboard")
        cli.write_settings(args.output_dir / "config.yaml", args)
        if args.preview:
            shown = val_clips if len(val_clips) else clips
            preview = TrainingSample(shown.clip(0), bool(len(val_clips)), variant, args.selva_dir, args.normalize_audio,
                              args.seed)

    # 4. train
    def on_checkpoint(run: TrainingRun) -> None:
        if not world.is_main:
            return
        folder.save_step(run, metrics)
        if preview is not None and not stop():
            try:
                with run.evaluated():
                    preview.write(run, args.output_dir)
            except (ValueError, OSError) as error:  # a sample that cannot be made must not end a run
                log.warning("no sample at step %d: %s", run.step, error)

    def on_best(run: TrainingRun) -> None:
        if world.is_main:
            folder.save_best(run)

    started = time.monotonic()
    with StopRequest() as stop:
        finished = fit(run, metrics, on_checkpoint=on_checkpoint, on_best=on_best, should_stop=stop)
    if not finished:
        log.warning("stopped at step %d of %d; continue with --resume auto", run.step, config.steps)
        return stop.exit_code
    if not world.is_main:
        return 0

    # 5. the result
    log.info("trained to step %d in %s, peak memory %.2f GiB", run.step, clock(time.monotonic() - started),
             peak_memory_bytes(device) / 2**30)
    if len(val_clips) and run.best_step < run.step:
        log.info("validation was best at step %d (%.4f): adapter_best.pt", run.best_step, run.best_val_loss)
    print(folder.save_final(run))
    return 0


if __name__ == "__main__":
    leave(main())
