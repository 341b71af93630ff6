"""Generate sound for videos, with or without adapters.

    python infer.py --video cat.mp4 --prompt "a cat purring" --variant small_16k --selva_dir weights/ --adapter runs/cat/adapter_final.pt
    python infer.py clips/ --prompt "a cat purring" --variant small_16k --selva_dir weights/ --output sounds
    python infer.py clips.tsv --variant tiny_16k --num_variations 3 --output sounds
    python infer.py --features features/demo/clip.npz --variant tiny_16k --output demo.flac
    python infer.py --prompt "rain on a tin roof" --duration 8 --variant tiny_16k
    python infer.py clips/ --variant tiny_16k --compare adapters.txt --output comparison

Writes <name>.flac and, for a video, <name>.mp4 with the new sound, and <name>.yaml with the settings. Prints the paths of
the sounds and the videos, one per line. The same seed gives the same sound. What is there already, made from the same
content with the same settings, is left as it is.
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from selva import cli
from selva.audio.config import DEFAULT_TARGETS, LOUDNESS_METHODS
from selva.flow import SOLVERS, SamplingConfig
from selva.inference.batch import AdapterSetup, BatchClip, SoundBatch, Variation, common_clip_features, write_manifest
from selva.inference.compare import check_reference_dir, read_compare_list, write_comparison
from selva.inference.engine import (
    CLIP_FEATURE_CHOICES,
    DEFAULT_BATCH_SIZE,
    OFFLOAD_CHOICES,
    WHOLE_VIDEO_SEC,
    SoundGenerator,
    load_adapters,
    uses_clip_features,
)
from selva.inference.outputs import shared_names, sound_files
from selva.inference.request import SoundRequest
from selva.inputs.jobs import ClipJob, collect_jobs
from selva.inputs.suffixes import OUTPUT_AUDIO_SUFFIXES, OUTPUT_VIDEO_SUFFIXES
from selva.inputs.table import TABLE_SUFFIXES
from selva.media import video_length
from selva.models.variants import get_variant
from selva.sequence import DEFAULT_DURATION_SEC, SHORTEST_SEC
from selva.utils.device import peak_memory_bytes
from selva.utils.text import listed

log = logging.getLogger("selva.infer")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to make sound for")
    group.add_argument("inputs", nargs="*", type=Path, metavar="INPUT",
                       help="videos, folders of videos, or tables (.tsv, .csv) with the columns id, and optionally "
                       "prompt, path, start, duration, mask")
    group.add_argument("--video", type=Path, action="append", default=[], metavar="FILE",
                       help="a video; may be given several times")
    group.add_argument("--features", type=Path, action="append", default=[], metavar="PATH",
                       help="features from extract_features.py instead: an .npz or a folder of them; may be given "
                       "several times")
    group.add_argument("--recursive", action="store_true", help="take the subfolders of a folder too")
    group.add_argument("--prompt", help="what is to be heard (default with --features: their own prompt); alone, sound "
                       "is made from words only")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="prompts.txt with lines `name.npz: prompt`")
    group.add_argument("--negative_prompt", default="", help="what is not to be heard")
    group.add_argument("--start", type=float, default=0.0, help="seconds into the video where the sound begins")
    group.add_argument("--duration", type=float,
                       help=f"seconds of sound (default {DEFAULT_DURATION_SEC:g}, or what the features cover; with "
                       "--long to the end of the video)")
    group.add_argument("--long", action="store_true",
                       help=f"go through more than {DEFAULT_DURATION_SEC:g} s in overlapping windows that are sampled "
                       "together")
    parser.add_masks()
    group = parser.add_argument_group("what to write")
    group.add_argument("--output", type=Path, default=Path("output"),
                       help="a folder, or for one sound a file name ending in .flac, .wav, .mp4, .mov, .mkv or .m4v")
    group.add_argument("--audio_only", action="store_true", help="write no video")
    group.add_argument("--normalize", choices=LOUDNESS_METHODS, default="none",
                       help="bring each sound to a level: its RMS, its loudness or its true peak, which is kept below "
                       "-1 dBTP in any case. none: the level that the model makes")
    group.add_argument("--target", type=float, metavar="DB",
                       help="that level (default " + ", ".join(f"{k} {v:g}" for k, v in DEFAULT_TARGETS.items()) + ")")
    group.add_argument("--overwrite", action="store_true", help="make again what is there already")
    parser.add_model()
    group = parser.add_argument_group("adapters")
    group.add_argument("--adapter", type=Path, action="append", default=[], metavar="FILE",
                       help="LoRA adapter, ours or one of ComfyUI-SelVA; may be given several times")
    group.add_argument("--strength", type=float, action="append", default=[],
                       help="strength of the adapter at the same position (default 1; 0 is the base model)")
    group.add_argument("--clip_features", choices=CLIP_FEATURE_CHOICES, default="auto",
                       help="pass CLIP frame features, or the learned nothing. auto: what the adapter was trained "
                       "with; without one, empty for SelVA and use for MMAudio, as officially released")
    group.add_argument("--compare", type=Path, metavar="FILE",
                       help="the same clips and seeds with each line of this list: `path strength [label]`, or `base`; "
                       "writes one sheet of spectrograms and the figures")
    group.add_argument("--reference", type=Path, metavar="DIR",
                       help="with --compare: sounds named like the clips to compare with (default: the video's own "
                       "sound, or the one beside the features)")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_steps", type=int, default=SamplingConfig.num_steps, help="steps of the solver")
    group.add_argument("--solver", choices=SOLVERS, default=SamplingConfig.solver,
                       help="midpoint and heun take twice the time per step")
    group.add_argument("--cfg_strength", type=float, default=SamplingConfig.cfg_strength,
                       help="guidance: how strictly video and prompt are followed; below 1 there is none")
    group.add_argument("--cfg_interval", type=float, nargs=2, metavar=("LO", "HI"),
                       default=list(SamplingConfig.cfg_interval),
                       help="guidance only between these times; 0 is noise, 1 is sound (default: 0 1)")
    group.add_argument("--num_variations", type=cli.positive_int, default=1, metavar="N",
                       help="sounds per clip, with the seeds --seed to --seed + N - 1, called <name>_1 to <name>_N")
    group.add_argument("--batch_size", type=cli.positive_int, default=DEFAULT_BATCH_SIZE,
                       help="sounds of equal length that are sampled at once")
    group.add_argument("--offload", choices=OFFLOAD_CHOICES, default="auto",
                       help="auto: load one network after the other and free it, which takes the least memory; none: "
                       "keep all loaded, which is quicker for many clips")
    parser.add_common(precision="bf16")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a UsageError that lists everything wrong with the command line."""
    problems = []
    videos = bool(args.inputs or args.video)
    if videos and args.features:
        problems.append("give videos or --features, not both")
    if not (videos or args.features or args.prompt):
        problems.append("give a video, --features or --prompt")
    files = (*args.adapter, args.prompts, args.compare)
    problems += [f"{path}: no such file" for path in files if path and not path.is_file()]
    problems += [f"{path}: no such file" for path in (*args.inputs, *args.video, *args.features) if not path.exists()]
    if len(args.strength) > len(args.adapter):
        problems.append(f"{len(args.strength)} --strength for {len(args.adapter)} --adapter")
    if args.compare and args.adapter:
        problems.append("with --compare the adapters stand in its list, not in --adapter")
    if args.reference and not args.compare:
        problems.append("--reference belongs to --compare")
    suffix = args.output.suffix.lower()
    if suffix and suffix not in OUTPUT_AUDIO_SUFFIXES + OUTPUT_VIDEO_SUFFIXES and not args.output.is_dir():
        problems.append(f"--output {args.output}: expected a folder or a name ending in "
                        f"{', '.join(OUTPUT_AUDIO_SUFFIXES + OUTPUT_VIDEO_SUFFIXES)}")
    if is_file_name(args.output) and args.compare:
        problems.append(f"--output {args.output}: --compare writes a folder")
    if suffix in OUTPUT_VIDEO_SUFFIXES and (args.audio_only or not videos):
        problems.append(f"--output {args.output}: a video is only written with --video and without --audio_only")
    for path in (*args.inputs, *args.video):
        if args.output.is_file() and path.is_file() and args.output.samefile(path):
            problems.append(f"--output {args.output}: is the video itself")
    if args.duration is not None and not (args.duration >= SHORTEST_SEC and math.isfinite(args.duration)):
        problems.append(f"--duration is {args.duration}, expected at least {SHORTEST_SEC} seconds")
    if not videos and (args.start or args.mask or args.prompts):
        problems.append("--start, --mask and --prompts belong to videos; features have theirs already")
    if args.target is not None and (args.normalize == "none" or not math.isfinite(args.target)):
        problems.append(f"--target {args.target:g}: expected a number of dB, together with --normalize")
    try:
        sampling_config(args)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise cli.UsageError("; ".join(problems))


def is_file_name(output: Path) -> bool:
    return output.suffix.lower() in OUTPUT_AUDIO_SUFFIXES + OUTPUT_VIDEO_SUFFIXES and not output.is_dir()


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(args.num_steps, args.cfg_strength, args.solver, tuple(args.cfg_interval))


# ---------------------------------------------------------------------------------------------------------------
# what there is to do
# ---------------------------------------------------------------------------------------------------------------


def collect_requests(args: argparse.Namespace) -> dict[str, SoundRequest]:
    """Return what sound is to be made for, by the name of the output."""
    if args.features:
        return feature_requests(args)
    if not (args.inputs or args.video):
        request = SoundRequest(None, None, args.prompt, args.negative_prompt, duration_sec=args.duration)
        return {name_of_words(args.prompt): request}
    try:
        jobs = collect_jobs(
            [*args.inputs, *args.video], recursive=args.recursive, prompt=args.prompt or "", prompts=args.prompts,
            start_sec=args.start, mask=args.mask,
            duration_sec=args.duration or (WHOLE_VIDEO_SEC if args.long else DEFAULT_DURATION_SEC),
        )
    except (ValueError, OSError) as error:
        raise cli.UsageError(str(error)) from error
    warn_of_long_videos(args, jobs)
    # Words typed for a video that was named itself are meant; a folder's or a table's own prompts go first.
    named = {path for path in (*args.inputs, *args.video) if path.is_file()}
    prompts = {job.id: args.prompt if args.prompt and job.path in named else job.prompt for job in jobs}
    if without := [id_ for id_, prompt in prompts.items() if not prompt]:
        log.warning("no prompt for %s: the model is not told what is to be heard", listed(without))
    return {
        job.id: SoundRequest(job.path, None, prompts[job.id], args.negative_prompt, job.start_sec, job.duration_sec,
                             cli.mask_settings(args, job.mask))
        for job in jobs
    }


def name_of_words(prompt: str | None) -> str:
    """Return a file name for the sound of words alone."""
    return re.sub(r"\W+", "_", prompt or "").strip("_")[:60] or "sound"


def feature_requests(args: argparse.Namespace) -> dict[str, SoundRequest]:
    requests: dict[str, SoundRequest] = {}
    for path in args.features:
        found = sorted(p for p in path.glob("*.npz") if not p.name.startswith(".")) if path.is_dir() else [path]
        if not found:
            raise cli.UsageError(f"{path}: no .npz in this folder")
        for file in found:
            if file.stem in requests:
                raise cli.UsageError(f"{requests[file.stem].features} and {file} would both become {file.stem}.flac")
            requests[file.stem] = SoundRequest(None, file, args.prompt, args.negative_prompt,
                                               duration_sec=args.duration)
    return requests


def warn_of_long_videos(args: argparse.Namespace, jobs: Sequence[ClipJob]) -> None:
    """Say which videos get sound for their beginning only because nothing else was asked for."""
    if args.long:
        return
    if args.duration is not None:
        if args.duration > DEFAULT_DURATION_SEC:
            log.info("%g s in one pass; the models were trained on %g s, and --long goes on in windows of that",
                     args.duration, DEFAULT_DURATION_SEC)
        return
    longer = []
    for job in jobs:
        try:
            seconds = video_length(job.path) - job.start_sec
        except (ValueError, OSError):
            continue  # it will fail by name
        if job.duration_sec == DEFAULT_DURATION_SEC and seconds > DEFAULT_DURATION_SEC + 0.5:
            longer.append(f"{job.path.name} ({seconds:.1f} s)")
    if longer:
        log.warning("sound is made for the first %g s only of %s; --long goes through the whole video",
                    DEFAULT_DURATION_SEC, listed(longer))


def adapter_settings(args: argparse.Namespace) -> list[AdapterSetup]:
    """Return the adapters and strengths to use: one setting, or those of the list to compare."""
    variant = get_variant(args.variant)
    if args.compare:
        lines = read_compare_list(args.compare)
        return [AdapterSetup(line.label, load_adapters(line.adapters, variant), line.adapters) for line in lines]
    strengths = args.strength + [1.0] * (len(args.adapter) - len(args.strength))
    specs = tuple(zip(args.adapter, strengths, strict=True))
    for path, strength in specs:
        log.info("adapter %s at strength %g", path, strength)
    return [AdapterSetup("", load_adapters(specs, variant), specs)]


def plan_clip(
    args: argparse.Namespace, name: str, request: SoundRequest, settings: Sequence[AdapterSetup]
) -> BatchClip:
    """Return a clip with one variation for every setting and seed."""
    variations = []
    for index, setting in enumerate(settings):
        output = args.output / setting.label if args.compare else args.output
        for number in range(1, args.num_variations + 1):
            seed = args.seed + number - 1
            files = sound_files(output, name, request.video is not None, args.audio_only,
                                number if args.num_variations > 1 else None)
            # From a folder, the settings would name the sound after its source, and know no number.
            own_name = args.num_variations == 1 and name in (Path(request.source).stem, name_of_words(request.prompt))
            target = output if own_name else files.written[0]
            variations.append(Variation(index, seed, files, variation_settings(args, request, setting, seed, target)))
    return BatchClip(name, request, variations)


def variation_settings(
    args: argparse.Namespace, request: SoundRequest, setting: AdapterSetup, seed: int, output: Path
) -> argparse.Namespace:
    """Return the arguments that make this one sound again."""
    own = {
        "inputs": [], "video": [request.video] if request.video else [], "prompts": None, "recursive": False,
        "features": [request.features] if request.features else [], "prompt": request.prompt, "seed": seed,
        "start": request.start_sec, "mask": request.mask.path if request.mask else None,
        "duration": None if request.duration_sec == WHOLE_VIDEO_SEC else request.duration_sec,
        "adapter": [path for path, _ in setting.specs], "strength": [strength for _, strength in setting.specs],
        "compare": None, "reference": None, "overwrite": False, "num_variations": 1, "output": output,
    }
    return argparse.Namespace(**(vars(args) | own))


def check_names(args: argparse.Namespace, clips: Sequence[BatchClip]) -> None:
    """Raise a UsageError if two sounds would be written to one file, or one over somebody else's."""
    if is_file_name(args.output) and len(clips) > 1:
        raise cli.UsageError(f"--output {args.output}: is one file, but there are {len(clips)} clips; name a folder")
    if shared := shared_names(variation.files for clip in clips for variation in clip.variations):
        raise cli.UsageError(f"{shared[0]} would be written twice; rename one of the clips, or another --output")
    if is_file_name(args.output) or args.overwrite:
        return  # that very file is meant
    foreign = [str(path) for clip in clips for variation in clip.variations for path in variation.files.foreign()]
    if foreign:
        raise cli.UsageError(f"{listed(foreign)}: there already, and not made by infer.py, which would have left a "
                             ".yaml beside it; name another --output, or replace it with --overwrite")


def log_outcome(clips: Sequence[BatchClip], generator: SoundGenerator) -> int:
    """Say what was done, and return the exit code."""
    failed, kept = sum(bool(clip.problem) for clip in clips), sum(clip.kept for clip in clips)
    made = sum(len(clip.made) for clip in clips) - kept
    log.info("%d made, %d already there, %d of %d clips failed", made, kept, failed, len(clips))
    if made:
        log.info("%s; peak memory %.2f GiB", generator.times, peak_memory_bytes(generator.device) / 2**30)
    return cli.EXIT_FAILED if failed else 0


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    if args.reference:
        check_reference_dir(args.reference)
    settings = adapter_settings(args)
    args.clip_features = common_clip_features(args.clip_features, settings)
    generator = SoundGenerator(
        args.variant, args.selva_dir, clip_features=args.clip_features, sampling=sampling_config(args), long=args.long,
        normalize=args.normalize, target=args.target, device=args.device, precision=args.precision,
        batch_size=args.batch_size, offload=args.offload,
    )
    clips = [plan_clip(args, name, request, settings) for name, request in collect_requests(args).items()]
    check_names(args, clips)
    lists = any(path.is_dir() or path.suffix.lower() in TABLE_SUFFIXES for path in (*args.inputs, *args.features))
    is_batch = not is_file_name(args.output) and (lists or len(clips) > 1)

    def report(clip: BatchClip) -> None:
        for path in clip.paths:
            print(path, flush=True)
        if is_batch:
            write_manifest(args.output, clips, finished=clip is clips[-1])

    needs_clip = any(uses_clip_features(args.clip_features, generator.variant, s.adapters) for s in settings)
    generator.check_weights(any(clip.request.video for clip in clips), needs_clip)
    SoundBatch(generator, settings, overwrite=args.overwrite, on_clip=report).run(clips)
    if args.compare and any(clip.made for clip in clips):
        with generator.times.stage("comparing"):
            for path in write_comparison(args.output, clips, settings, args.reference):
                print(path)
    return log_outcome(clips, generator)


if __name__ == "__main__":
    sys.exit(main())
