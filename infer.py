"""Generate sound for a video, with or without an adapter.

    python infer.py --video cat.mp4 --prompt "a cat purring" --variant small_16k --selva_dir weights/ --adapter runs/cat/adapter_final.pt
    python infer.py --features features/demo/clip.npz --variant tiny_16k --output demo.flac
    python infer.py --prompt "rain on a tin roof" --duration 8 --variant tiny_16k

Writes <name>.flac and, for a video, <name>.mp4 with the new sound, and <name>.yaml with the settings. Prints the paths of
the sound and the video, one per line. The same seed gives the same sound.
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selva import cli
from selva.checkpoint import load_adapter
from selva.extraction import FeatureExtractor
from selva.features import load_features
from selva.lora import Adapter, merge_adapters
from selva.media import mux_video, write_audio
from selva.models.generator import Generator, cast_frozen_
from selva.models.zoo import Variant, features_problem, get_variant
from selva.report import Progress, clock, peak_memory_bytes
from selva.sampling import SamplingConfig, decode_latents, sample_latents
from selva.sequence import DEFAULT_DURATION_SEC, SHORTEST_SEC, SequenceConfig, sequence_config
from selva.weights import check_weights, load_generator, load_vae, load_vocoder

log = logging.getLogger("selva.infer")

AUDIO_SUFFIXES, VIDEO_SUFFIXES = (".flac", ".wav"), (".mp4", ".mov", ".mkv", ".m4v")
CLIP_FEATURE_CHOICES = ("auto", "use", "empty")


@dataclass(frozen=True)
class Conditions:
    """What one sound is generated from; features (1, tokens, channels) float32 on the CPU.

    Attributes:
        clip_f, sync_f: None where nothing was given, which becomes the learned empty features.
        negative: text features to guide away from, None for the learned empty text.
        name: stem of the output files.
    """

    name: str
    sequence: SequenceConfig
    clip_f: Tensor | None
    sync_f: Tensor | None
    text_f: Tensor | None
    negative: Tensor | None


# ---------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to make sound for")
    group.add_argument("--video", type=Path, help="the video")
    group.add_argument("--features", type=Path, metavar="FILE.npz", help="features from extract_features.py instead")
    group.add_argument("--prompt", help="what is to be heard (default with --features: their own prompt)")
    group.add_argument("--negative_prompt", default="", help="what is not to be heard")
    group.add_argument("--start", type=float, default=0.0, help="seconds into the video where the sound begins")
    group.add_argument("--duration", type=float,
                       help=f"seconds of sound (default {DEFAULT_DURATION_SEC:g}, or what the features cover)")
    group.add_argument("--output", type=Path, default=Path("output"),
                       help="a folder, or a file name ending in .flac, .wav or .mp4")
    group.add_argument("--audio_only", action="store_true", help="write no video")
    parser.add_model()
    group = parser.add_argument_group("adapters")
    group.add_argument("--adapter", type=Path, action="append", default=[], metavar="FILE",
                       help="LoRA adapter, ours or one of ComfyUI-SelVA; may be given several times")
    group.add_argument("--strength", type=float, action="append", default=[],
                       help="strength of the adapter at the same position (default 1; 0 is the base model)")
    group.add_argument("--clip_features", choices=CLIP_FEATURE_CHOICES, default="auto",
                       help="pass CLIP frame features, or the learned nothing. auto: what the adapter was trained "
                       "with; without one, empty for SelVA and use for MMAudio, as officially released")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_steps", type=int, default=SamplingConfig.num_steps, help="Euler steps")
    group.add_argument("--cfg_strength", type=float, default=SamplingConfig.cfg_strength,
                       help="guidance: how strictly video and prompt are followed; below 1 there is none")
    parser.add_common(precision="bf16")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a UsageError that lists everything wrong with the command line."""
    problems = []
    if args.video and args.features:
        problems.append("give --video or --features, not both")
    if not (args.video or args.features or args.prompt):
        problems.append("give --video, --features or --prompt")
    problems += [f"{p}: no such file" for p in (args.video, args.features, *args.adapter) if p and not p.is_file()]
    if len(args.strength) > len(args.adapter):
        problems.append(f"{len(args.strength)} --strength for {len(args.adapter)} --adapter")
    suffix = args.output.suffix.lower()
    if suffix and suffix not in AUDIO_SUFFIXES + VIDEO_SUFFIXES and not args.output.is_dir():
        problems.append(f"--output {args.output}: expected a folder or a name ending in "
                        f"{', '.join(AUDIO_SUFFIXES + VIDEO_SUFFIXES)}")
    if suffix in VIDEO_SUFFIXES and (args.audio_only or not args.video):
        problems.append(f"--output {args.output}: a video is only written with --video and without --audio_only")
    if args.num_steps < 1:
        problems.append(f"--num_steps is {args.num_steps}, expected at least 1")
    if args.video and args.output.is_file() and args.output.samefile(args.video):
        problems.append(f"--output {args.output}: is the video itself")
    if args.duration is not None and not args.duration >= SHORTEST_SEC:
        problems.append(f"--duration is {args.duration}, expected at least {SHORTEST_SEC} seconds")
    if args.features and args.start:
        problems.append("--start belongs to --video; features begin where they were extracted")
    if problems:
        raise cli.UsageError("; ".join(problems))


def load_adapters(args: argparse.Namespace, variant: Variant) -> list[tuple[Adapter, float]]:
    """Return (adapter, strength) pairs; an adapter that says it was trained for another variant is refused."""
    strengths = args.strength + [1.0] * (len(args.adapter) - len(args.strength))
    pairs = []
    for path, strength in zip(args.adapter, strengths, strict=True):
        adapter = load_adapter(path)
        trained_for = adapter.meta.get("variant")
        if trained_for is not None and trained_for != variant.name:
            raise ValueError(f"{path}: was trained for variant {trained_for}, not {variant.name}; "
                             f"use --variant {trained_for}")
        log.info("adapter %s at strength %g", path, strength)
        pairs.append((adapter, strength))
    return pairs


def uses_clip_features(choice: str, variant: Variant, adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """Return whether CLIP frame features are passed: as asked for, as the adapters were trained, or as released.

    Adapters of ComfyUI-SelVA do not say; that trainer always passes them.

    Raises:
        ValueError: two adapters were trained differently, and nothing was asked for.
    """
    if choice != "auto":
        return choice == "use"
    trained = {adapter.meta.get("clip_features", "use") for adapter, _ in adapters}
    if len(trained) > 1:
        raise ValueError("the adapters were trained with different --clip_features; choose one")
    return trained.pop() == "use" if trained else variant.family == "mmaudio"


# ---------------------------------------------------------------------------------------------------------------
# the stages, in the order in which networks are loaded and freed
# ---------------------------------------------------------------------------------------------------------------


def read_conditions(args: argparse.Namespace, variant: Variant, device: torch.device, use_clip: bool) -> Conditions:
    """Encode what was given: a video, stored features, or only a prompt."""
    # Features are float32 as those that the base models and adapters were trained on.
    extractor = FeatureExtractor(variant, args.selva_dir, device)
    prompt, clip_f, sync_f, text_f = args.prompt or "", None, None, None
    if args.features:
        bundle = load_features(args.features)
        if problem := features_problem(bundle.variant, variant):
            raise ValueError(f"{args.features}: {problem}")
        duration = min(bundle.duration, args.duration or bundle.duration)
        name, clip_f, sync_f = args.features.stem, bundle.clip_features, bundle.sync_features
        if args.prompt is None:
            prompt, text_f = bundle.prompt, bundle.text_features
        elif args.prompt != bundle.prompt and variant.family == "selva":
            log.warning("%s: the sync features were extracted with prompt %r and keep it", args.features, bundle.prompt)
    elif args.video:
        frames = extractor.read(args.video, args.duration or DEFAULT_DURATION_SEC, args.start)
        duration, name = frames.duration_sec, args.video.stem
        extractor.prepare_texts([prompt])
        clip_f = extractor.clip_features(frames.clip_frames) if use_clip else None
        sync_f = extractor.sync_features(frames.sync_frames, prompt)
    else:
        duration = args.duration or DEFAULT_DURATION_SEC
        name = re.sub(r"\W+", "_", prompt).strip("_")[:60] or "sound"
    sequence = sequence_config(variant.mode, duration)
    if text_f is None:
        text_f = extractor.text_features(prompt)
    conditions = Conditions(
        name=name,
        sequence=sequence,
        clip_f=clip_f[:, : sequence.clip_seq_len] if clip_f is not None and use_clip else None,
        sync_f=sync_f[:, : sequence.sync_seq_len] if sync_f is not None else None,
        text_f=text_f,
        negative=extractor.text_features(args.negative_prompt) if args.negative_prompt else None,
    )
    check_widths(conditions, variant, args.features)
    return conditions


def check_widths(conditions: Conditions, variant: Variant, source: Path | None) -> None:
    """Raise a ValueError if features from a file are not those of the variant's encoders."""
    config = variant.generator
    for what, features, width in (
        ("clip_features", conditions.clip_f, config.clip_dim),
        ("sync_features", conditions.sync_f, config.sync_dim),
        ("text_features", conditions.text_f, config.text_dim),
    ):
        if features is not None and features.shape[2] != width:
            raise ValueError(f"{source}: {what} are {features.shape[2]} wide, but {variant.name} takes {width}; "
                             f"extract again with --variant {variant.name}")


def prepared_generator(
    args: argparse.Namespace, variant: Variant, adapters: Sequence[tuple[Adapter, float]], device: torch.device
) -> Generator:
    """Return the generator with the adapters merged in float32, then stored in ``--precision``."""
    generator = load_generator(variant.name, args.selva_dir)
    merge_adapters(generator, adapters)
    cast_frozen_(generator, cli.PRECISIONS[args.precision])
    return generator.to(device)


def generate(args: argparse.Namespace, generator: Generator, conditions: Conditions) -> Tensor:
    """Return (1, N, C) latents."""
    device, sequence = generator.latent_mean.device, conditions.sequence
    generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
    empty_clip, empty_sync, _ = generator.empty_features(1)
    clip_f = empty_clip if conditions.clip_f is None else conditions.clip_f.to(device)
    sync_f = empty_sync if conditions.sync_f is None else conditions.sync_f.to(device)
    negative = None if conditions.negative is None else conditions.negative.to(device)
    sampling = SamplingConfig(num_steps=args.num_steps, cfg_strength=args.cfg_strength)
    with Progress(sampling.num_steps, "sampling", "steps") as progress:
        return sample_latents(
            generator, clip_f, sync_f, conditions.text_f.to(device), [args.seed], sampling, negative_text=negative,
            precision=cli.PRECISIONS[args.precision], on_step=progress.update,
        )


def output_paths(args: argparse.Namespace, name: str) -> tuple[Path | None, Path | None]:
    """Return (audio path, video path); None for what is not written."""
    suffix = args.output.suffix.lower()
    if suffix in AUDIO_SUFFIXES and not args.output.is_dir():
        return args.output, None
    if suffix in VIDEO_SUFFIXES and not args.output.is_dir():
        return None, args.output
    return args.output / f"{name}.flac", args.output / f"{name}.mp4" if args.video and not args.audio_only else None


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    device, variant = cli.resolve_device(args.device), get_variant(args.variant)
    adapters = load_adapters(args, variant)
    use_clip = uses_clip_features(args.clip_features, variant, adapters)
    needs = ["generator", "vae", "vocoder", "clip_text"]
    if args.video:
        needs += ["video_encoder", "t5", *(["clip_image"] if use_clip else [])]
    check_weights(variant.name, args.selva_dir, needs)

    started = time.monotonic()
    conditions = read_conditions(args, variant, device, use_clip)
    log.info("%s: %g s, CLIP frame features %s", conditions.name, conditions.sequence.duration_sec,
             "passed" if conditions.clip_f is not None else "empty")
    encoded = time.monotonic()
    generator = prepared_generator(args, variant, adapters, device)
    latents = generate(args, generator, conditions)
    del generator
    sampled = time.monotonic()
    vae = load_vae(variant.name, args.selva_dir, device).drop_encoder()
    waveform = decode_latents(latents, vae, load_vocoder(variant.name, args.selva_dir, device))[0].cpu()
    rate = conditions.sequence.sampling_rate
    # The last latent frame may reach beyond the clip; the sound ends exactly with it.
    waveform = waveform[: round(conditions.sequence.duration_sec * rate)]

    audio_path, video_path = output_paths(args, conditions.name)
    if audio_path is not None:
        write_audio(audio_path, waveform, rate)
    if video_path is not None:
        mux_video(args.video, waveform, rate, video_path, args.start, conditions.sequence.duration_sec)
    log.info("encoded in %s, sampled in %s, decoded and written in %s, peak memory %.2f GiB",
             clock(encoded - started), clock(sampled - encoded), clock(time.monotonic() - sampled),
             peak_memory_bytes(device) / 2**30)
    written = [path for path in (audio_path, video_path) if path is not None]
    cli.write_settings(written[0].with_suffix(".yaml"), args)
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
