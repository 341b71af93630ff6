"""Extract what the model sees: videos -> feature bundles (.npz) with their sound beside them.

    python extract_features.py clips/ --output_dir features/dog --prompt "a dog barking" --variant small_16k --selva_dir weights/
    python extract_features.py a.mp4 b.mp4 --output_dir features/demo --variant tiny_16k --prompt "a bouncing ball"

Writes <stem>.npz (published ComfyUI-SelVA schema) and <stem>.flac for every video; train_lora.py reads that folder.
Clips whose features are already there, made from the same content with the same settings, are left as they are.
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from selva import cli
from selva.datasets import read_prompts
from selva.extraction import FeatureExtractor
from selva.features import load_features, save_features
from selva.media import extract_audio, probe
from selva.models.zoo import get_variant
from selva.report import Progress, clock, peak_memory_bytes
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.weights import check_weights

log = logging.getLogger("selva.extract_features")

ENCODER_PARTS = ("clip_text", "clip_image", "t5", "video_encoder")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="videos, or folders of videos")
    group.add_argument("--output_dir", type=Path, required=True, help="where the features go")
    group.add_argument("--audio", choices=("extract", "none"), default="extract",
                       help="write the sound of each clip beside its features")
    group.add_argument("--overwrite", action="store_true", help="extract again even where features are current")
    group = parser.add_argument_group("clips")
    group.add_argument("--prompt", default="", help="what is to be heard, for all videos")
    group.add_argument("--prompts", type=Path, metavar="FILE",
                       help="prompts.txt with lines `name.npz: prompt` that go before --prompt")
    group.add_argument("--start", type=float, default=0.0, help="seconds into the video where the clip begins")
    group.add_argument("--duration", type=float, default=DEFAULT_DURATION_SEC,
                       help="seconds to use; a shorter video makes a shorter clip")
    parser.add_model()
    # The base models were trained on float32 features; half precision saves time on a GPU and rounds them.
    parser.add_common(precision="fp32")
    return parser


def collect_videos(inputs: Sequence[Path]) -> list[Path]:
    """Return the videos that the arguments name, folders expanded in sorted order.

    Raises:
        UsageError: a path does not exist, a folder holds no video, or two videos would share one output name.
    """
    if not inputs:
        raise cli.UsageError("give at least one video or folder")
    videos: list[Path] = []
    for path in inputs:
        if path.is_dir():
            # Hidden files are nobody's videos: macOS leaves "._dog.mp4" on foreign disks.
            visible = (p for p in path.iterdir() if not p.name.startswith("."))
            found = sorted(p for p in visible if p.suffix.lower() in VIDEO_SUFFIXES)
            if not found:
                raise cli.UsageError(f"{path}: no videos in this folder; looked for {' '.join(VIDEO_SUFFIXES)}")
            videos += found
        elif path.exists():
            videos.append(path)
        else:
            raise cli.UsageError(f"{path}: no such file or folder")
    owner: dict[str, Path] = {}
    for path in videos:
        other = owner.setdefault(path.stem, path)
        if other is not path:
            raise cli.UsageError(f"{other} and {path} would both become {path.stem}.npz; rename one of them")
    return videos


def is_current(path: Path, settings: dict, audio_path: Path | None) -> bool:
    """Return whether ``path`` holds readable features made with ``settings``, and its sound is there if wanted."""
    if not path.exists() or (audio_path is not None and not audio_path.exists()):
        return False
    try:
        return load_features(path).settings == settings
    except (ValueError, OSError) as error:
        log.warning("%s; extracting again", error)
        return False


def extract_one(extractor: FeatureExtractor, path: Path, prompt: str, args: argparse.Namespace) -> bool:
    """Write the features and the sound of one video; return False if both were there already.

    Raises:
        ValueError, OSError: the video cannot be used.
    """
    target = args.output_dir / f"{path.stem}.npz"
    has_sound = args.audio == "extract" and "audio" in probe(path).streams
    audio_path = target.with_suffix(".flac") if has_sound else None
    settings = extractor.settings(path, prompt, args.duration, args.start)
    if not args.overwrite and is_current(target, settings, audio_path):
        return False
    frames = extractor.read(path, args.duration, args.start)
    bundle = extractor.extract(frames, prompt, settings)
    if audio_path is not None:
        # The latent frames reach up to one frame beyond the clip; sound that is there is taken along for them.
        lengths = sequence_config(extractor.variant.mode, bundle.duration)
        extract_audio(path, audio_path, args.start, lengths.num_audio_frames / lengths.sampling_rate)
    elif args.audio == "extract":
        log.warning("%s: has no sound; the features are written, but training needs %s.wav or .flac beside them",
                    path, path.stem)
    save_features(target, bundle)
    return True


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = cli.resolve_device(args.device)
    variant = get_variant(args.variant)
    try:
        sequence_config(variant.mode, args.duration)
    except ValueError as error:
        raise cli.UsageError(f"--duration: {error}") from error
    videos = collect_videos(args.inputs)
    written_prompts = read_prompts(args.prompts) if args.prompts else {}
    unused = sorted(set(written_prompts) - {f"{path.stem}.npz" for path in videos})
    if unused:
        log.warning("%s: no video for %s", args.prompts, ", ".join(unused))
    prompts = {path: written_prompts.get(f"{path.stem}.npz", args.prompt) for path in videos}
    without = [path.name for path, prompt in prompts.items() if not prompt]
    if without:
        log.warning("%d of %d videos have no prompt: their sounds can later only be asked for without words, and the "
                    "video encoder cannot look for anything. Give --prompt or --prompts", len(without), len(videos))
    check_weights(variant.name, args.selva_dir, ENCODER_PARTS)
    extractor = FeatureExtractor(variant, args.selva_dir, device, cli.PRECISIONS[args.precision])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    cli.write_settings(args.output_dir / "extract_config.yaml", args)

    start, done, current, failed = time.monotonic(), 0, 0, []
    with Progress(len(videos), "extracting", "clips") as progress:
        for number, path in enumerate(videos, 1):
            try:
                if extract_one(extractor, path, prompts[path], args):
                    done += 1
                    print(args.output_dir / f"{path.stem}.npz", flush=True)
                else:
                    current += 1
            except (ValueError, OSError) as error:
                failed.append(path)
                log.error("%s", error)
            progress.update(number, path.name)
    log.info("%d extracted, %d already current, %d failed, in %s, peak memory %.2f GiB", done, current, len(failed),
             clock(time.monotonic() - start), peak_memory_bytes(device) / 2**30)
    return cli.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
