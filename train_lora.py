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
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selva import cli, flow
from selva.checkpoint import (
    TrainingState,
    check_same_settings,
    load_checkpoint,
    load_newest_checkpoint,
    save_adapter,
    save_checkpoint,
    step_file_name,
)
from selva.datasets import scan_folder
from selva.files import atomic_write_text
from selva.lora import LoRAConfig, inject_lora
from selva.media import write_audio
from selva.models.generator import cast_frozen_
from selva.models.zoo import Variant, get_variant
from selva.report import MetricsFile, clock, peak_memory_bytes, plot_losses, plot_spectrograms
from selva.sampling import SamplingConfig, decode_latents, sample_latents
from selva.sequence import DEFAULT_DURATION_SEC
from selva.training import (
    CLIP_FEATURE_MODES,
    LATENT_MODES,
    LR_SCHEDULES,
    TrainConfig,
    TrainingRun,
    fit,
    split_validation,
)
from selva.training_data import TrainingClip, load_waveform, prepare_clips
from selva.weights import check_weights, load_generator, load_vae, load_vocoder

log = logging.getLogger("selva.train_lora")

RUN_FILES = ("adapter_*", "sample_*", "loss_*.png", "metrics.jsonl", "meta.json", "config.yaml")


# ---------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("data and output")
    group.add_argument("--data_dir", type=Path, required=True, help="folder of feature bundles and their sounds")
    group.add_argument("--output_dir", type=Path, default=Path("lora_output"), help="folder of this run")
    group.add_argument("--resume", metavar="FILE|auto",
                       help="continue from a step file; auto takes the newest of the output folder, if any")
    group.add_argument("--skip_invalid", action="store_true",
                       help="train without the clips that cannot be used, instead of stopping to name them")
    group.add_argument("--duration", type=float, default=DEFAULT_DURATION_SEC,
                       help="longer clips are cut to this many seconds; shorter ones keep their length")
    group.add_argument("--normalize_audio", choices=("peak", "none"), default="peak",
                       help="peak: 0.95 of full scale, as the base models were trained; none: as recorded")
    parser.add_model()

    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=int, default=LoRAConfig.rank, help="size of the adapter")
    group.add_argument("--alpha", type=float, help="the adapter is scaled by alpha / rank (default: rank, scale 1)")
    group.add_argument("--target", nargs="+", default=list(LoRAConfig().targets), metavar="SUFFIX",
                       help="adapt the layers whose names end so, e.g. attn.qkv linear1 ffn.w1 (default: attn.qkv)")
    group.add_argument("--lora_dropout", type=float, default=LoRAConfig.dropout, help="dropout before the adapter")
    group.add_argument("--init", choices=("standard", "pissa"), default=LoRAConfig.init,
                       help="pissa starts at the largest singular directions of the base weights")
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
    _adder(group)("val_every", int, "steps between validations")
    _adder(group)("patience", int, "stop after so many validations without a better one; 0: never")
    _adder(group)("log_every", int, "steps between log lines")
    group.add_argument("--preview", action=cli.BooleanFlag, default=True, help="generate a sample at every checkpoint")

    group = parser.add_argument_group("memory")
    group.add_argument("--grad_checkpointing", action="store_true",
                       help="recompute blocks in the backward pass: far less memory, about a third more time")
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
        lora_config = LoRAConfig(rank=args.rank, alpha=args.alpha, targets=tuple(args.target),
                                 dropout=args.lora_dropout, rslora=args.rslora, init=args.init)
    except ValueError as error:
        problems.append(str(error))
    if not 0 <= args.val_fraction < 1:
        problems.append(f"val_fraction is {args.val_fraction}, expected 0 to below 1")
    if not args.data_dir.is_dir():
        problems.append(f"--data_dir {args.data_dir}: no such folder")
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
    }


# ---------------------------------------------------------------------------------------------------------------
# the output folder
# ---------------------------------------------------------------------------------------------------------------


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


def final_path(folder: Path) -> Path:
    """Return adapter_final.pt, or the next free adapter_final_001.pt if a finished run was continued."""
    path, number = folder / "adapter_final.pt", 0
    while path.exists():
        number += 1
        path = folder / f"adapter_final_{number:03d}.pt"
    return path


def find_resume(args: argparse.Namespace) -> TrainingState | None:
    """Return the state that ``--resume`` names; None for a fresh start."""
    if args.resume is None:
        return None
    if args.resume != "auto":
        return load_checkpoint(args.resume)
    saved = load_newest_checkpoint(args.output_dir)
    log.info("resuming from %s", saved.path) if saved else log.info("nothing to resume in %s", args.output_dir)
    return saved


def check_resumable(saved: TrainingState, lora_config: LoRAConfig, variant: Variant) -> None:
    """Raise a ValueError if continuing would mix two different trainings."""
    if saved.meta.get("variant", variant.name) != variant.name:
        raise ValueError(f"{saved.path}: is a run of variant {saved.meta['variant']}, not {variant.name}")
    check_same_settings(saved, lora_config)


# ---------------------------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------------------------


def load_clips(args: argparse.Namespace, variant: Variant, device: torch.device) -> list[TrainingClip]:
    """Return the clips of the data folder, encoded; every clip that cannot be used is named.

    Raises:
        ValueError: no clip can be used, or some cannot and ``--skip_invalid`` is not given.
    """
    scan = scan_folder(args.data_dir)
    clips, problems = prepare_clips(
        scan.clips, variant, args.selva_dir, device,
        max_duration_sec=args.duration, normalize_audio=args.normalize_audio,
    )
    for path, reason in (*scan.skipped, *problems):
        log.error("%s", reason if str(path) in reason else f"{path}: {reason}")
    bad = len(scan.skipped) + len(problems)
    if not clips:
        raise ValueError(f"{args.data_dir}: no clip can be trained on; extract_features.py makes .npz + sound pairs")
    if bad and not args.skip_invalid:
        raise ValueError(f"{args.data_dir}: {bad} files cannot be used, see above; repair or remove them, or give "
                         "--skip_invalid to train without them")
    seconds = sum(clip.sequence.duration_sec for clip in clips)
    lengths = sorted({f"{clip.sequence.duration_sec:g}" for clip in clips}, key=float)
    log.info("%d clips, %s in all, clip lengths %s s, %d different prompts, %d files left out",
             len(clips), clock(seconds), " ".join(lengths), len({clip.prompt for clip in clips}), bad)
    return clips


# ---------------------------------------------------------------------------------------------------------------
# samples
# ---------------------------------------------------------------------------------------------------------------


class Preview:
    """Generates a sound for one clip at every checkpoint, with guidance, the way infer.py would."""

    def __init__(self, clip: TrainingClip, held_out: bool, variant: Variant, args: argparse.Namespace) -> None:
        self.clip, self.variant, self.args = clip, variant, args
        self.name = f"{clip.id} ({'held out' if held_out else 'a training clip: none is held out'})"
        self.reference = load_waveform(clip.audio_path, clip.sequence, args.normalize_audio)

    def write(self, run: TrainingRun) -> None:
        clip, generator, device = self.clip, run.generator, run.device
        generator.eval()
        generator.set_sequence(*clip.lengths)
        clip_f = clip.clip_f[None].to(device)
        if run.config.clip_features == "empty":
            clip_f = generator.empty_features(1)[0]
        sampling = SamplingConfig()
        latents = sample_latents(
            generator, clip_f, clip.sync_f[None].to(device), clip.text_f[None].to(device), [self.args.seed], sampling,
            precision=run.precision,
        )
        generator.train()
        # Loaded for this moment only: training needs the memory more.
        vae = load_vae(self.variant.name, self.args.selva_dir, device).drop_encoder()
        vocoder = load_vocoder(self.variant.name, self.args.selva_dir, device)
        waveform = decode_latents(latents, vae, vocoder)[0].cpu()
        stem = self.args.output_dir / f"sample_step{run.step:05d}"
        rate = clip.sequence.sampling_rate
        write_audio(stem.with_suffix(".wav"), waveform, rate)
        plot_spectrograms(
            [(f"generated, guidance {sampling.cfg_strength}, {sampling.num_steps} steps", waveform),
             ("recorded", self.reference)],
            rate, stem.with_suffix(".png"), f"step {run.step}: {self.name}, {clip.prompt!r}",
        )
        log.info("sample: %s", stem.with_suffix(".wav"))


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


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    # 1. everything cheap, and the data, before the base model is read
    args = build_parser().parse_args(argv)
    config, lora_config = configs_from(args)
    device, precision = cli.resolve_device(args.device), cli.PRECISIONS[args.precision]
    variant = get_variant(args.variant)
    needs = ("generator", "vae", "clip_text", *(["vocoder"] if args.preview else []))
    check_weights(variant.name, args.selva_dir, needs)
    torch.manual_seed(args.seed)
    saved = find_resume(args)
    if saved is not None:
        check_resumable(saved, lora_config, variant)
    clips, val_clips = split_validation(load_clips(args, variant, device), args.val_fraction, args.seed)
    log.info("%d clips to train on, %d held out%s", len(clips), len(val_clips),
             "" if val_clips else ": overfitting will not be seen")

    # 2. generator and adapter
    generator = load_generator(variant.name, args.selva_dir)
    cast_frozen_(generator, precision)
    report = inject_lora(generator, lora_config, torch.Generator().manual_seed(args.seed))
    generator.to(device)
    generator.gradient_checkpointing = args.grad_checkpointing
    for name, reason in report.skipped:
        log.warning("target skipped: %s (%s)", name, reason)
    log.info("%s: %s of %s in all", variant.name, report.summary(),
             f"{sum(p.numel() for p in generator.parameters()):,}")

    # 3. everything with a state, then the old state
    run = TrainingRun(generator, clips, val_clips, config, precision)
    if saved is not None:
        run.restore(saved)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if saved is None:
        move_old_run_aside(args.output_dir)
    metrics = MetricsFile(args.output_dir / "metrics.jsonl")
    metrics.cut_after(run.step)
    cli.write_settings(args.output_dir / "config.yaml", args)
    meta = adapter_meta(variant, args, config, len(clips))
    preview = Preview((val_clips or clips)[0], bool(val_clips), variant, args) if args.preview else None

    # 4. train
    def on_checkpoint(run: TrainingRun) -> None:
        path = args.output_dir / step_file_name(run.step)
        save_checkpoint(path, generator, {**meta, "step": run.step}, step=run.step,
                        optimizer=run.optimizer.state_dict(), extra=run.extra_state(),
                        state=run.ema.average if run.ema else None)
        plot_losses(metrics, args.output_dir, f"{variant.name}, {len(clips)} clips, rank {lora_config.rank}")
        log.info("saved %s", path)
        if preview is not None and not stop():
            with run.evaluated():
                preview.write(run)

    def on_best(run: TrainingRun) -> None:
        with run.evaluated():
            save_adapter(args.output_dir / "adapter_best.pt", generator,
                         {**meta, "step": run.step, "val_loss": run.best_val_loss})

    started = time.monotonic()
    with StopRequest() as stop:
        finished = fit(run, metrics, on_checkpoint=on_checkpoint, on_best=on_best, should_stop=stop)
    if not finished:
        log.warning("stopped at step %d of %d; continue with --resume auto", run.step, config.steps)
        return stop.exit_code

    # 5. the result
    result = final_path(args.output_dir)
    with run.evaluated():
        written = save_adapter(result, generator, {**meta, "step": run.step})
    atomic_write_text(args.output_dir / "meta.json", json.dumps(written, indent=2) + "\n")
    log.info("trained to step %d in %s, peak memory %.2f GiB", run.step, clock(time.monotonic() - started),
             peak_memory_bytes(device) / 2**30)
    if val_clips and run.best_step < run.step:
        log.info("validation was best at step %d (%.4f): adapter_best.pt", run.best_step, run.best_val_loss)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
