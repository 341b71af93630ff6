"""Extract what the model sees: videos -> feature files (.npz) with their sound beside them, or a packed data set.

    python extract_features.py clips/ --output_dir features/dog --prompt "a dog barking" --variant small_16k --selva_dir weights/
    python extract_features.py clips.tsv --output_dir features/all --windows --variant small_16k --selva_dir weights/
    torchrun --nproc_per_node=8 extract_features.py clips.tsv --output_dir data/train --format memmap --selva_dir weights/
    python extract_features.py cut/clips.tsv --recordings sounds/ --captions captions.tsv --output_dir data/sounds --selva_dir weights/

Writes <id>.npz (published ComfyUI-SelVA schema) and <id>.flac for every clip; train_lora.py reads that folder. What is
there already, made from the same content with the same settings, is left as it is: an interrupted run is started again.
manifest.jsonl says what became of every clip.
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from selva import cli
from selva.data.latents import FRONT_END
from selva.extraction.audio_set import AudioSetExtractor, plan_audio_set, run_sounds
from selva.extraction.extractor import EXTRACTION_VERSION, FeatureExtractor
from selva.extraction.manifest import ManifestWriter, Outcome, Shard
from selva.extraction.outputs import FeatureFiles, MemmapRows, beside_memmap, memmap_manifest
from selva.extraction.pipeline import ClipEncoder, Summary, run
from selva.extraction.reader import ClipReader, ReadSettings, default_workers, read_clips
from selva.inputs.jobs import ClipJob, collect_jobs
from selva.models.variants import Variant, get_variant
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.utils import distributed
from selva.utils.progress import StageTimes
from selva.utils.text import clock
from selva.utils.torchrun import is_main_process
from selva.weights.find import check_weights, encoders_identity

log = logging.getLogger("selva.extract_features")

ENCODER_PARTS = ("clip_text", "clip_image", "t5", "video_encoder")
CONFIG_FILE = "extract_config.yaml"
# What has no meaning for sound without pictures.
VIDEO_ONLY = ("recursive", "video_dir", "audio", "latents", "name", "preview", "overwrite", "prompt", "prompts",
              "start", "windows", "overlap", "mask")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("inputs", nargs="*", type=Path, metavar="INPUT",
                       help="videos, folders of videos, or tables (.tsv, .csv) with the columns id and, as you like, "
                       "path, start, duration, prompt, label or caption, mask")
    group.add_argument("--recursive", action="store_true", help="take the subfolders of folders too")
    group.add_argument("--video_dir", type=Path, metavar="DIR", help="where a table's videos lie, if not beside it")
    group.add_argument("--output_dir", type=Path, required=True,
                       help="where the features go; with --format memmap the data set itself, its table beside it")
    group.add_argument("--format", choices=("npz", "memmap"), default="npz",
                       help="npz: one file per clip; memmap: the packed format of MMAudio's own training, for clips "
                       "of 8 s with sound")
    group.add_argument("--audio", choices=("extract", "copy", "none"),
                       help="the sound beside each .npz: extract decodes it and writes .flac (default); copy takes the "
                       "stream as it is, for MP3, Vorbis, Opus, FLAC and PCM; none leaves it to you")
    group.add_argument("--latents", action="store_true",
                       help="encode the sound with the VAE too and store mean and deviation in the .npz")
    group.add_argument("--name",
                       help="call the clips NAME_001, NAME_002 ... instead of by their files; a clip that has a number "
                       "in the output folder keeps it")
    group.add_argument("--preview", type=Path, metavar="DIR",
                       help="write a picture per clip that shows what each encoder saw")
    group.add_argument("--overwrite", action="store_true", help="extract again even where features are current")
    group = parser.add_argument_group("clips")
    group.add_argument("--prompt", default="", help="what is to be heard, for all clips without a prompt of their own")
    group.add_argument("--prompts", type=Path, metavar="FILE",
                       help="prompts.txt with lines `name.npz: prompt` that go before --prompt")
    group.add_argument("--start", type=float, default=0.0, help="seconds into the video where the clip begins")
    group.add_argument("--duration", type=float, default=DEFAULT_DURATION_SEC,
                       help="seconds to use; a shorter video makes a shorter clip")
    group.add_argument("--windows", action="store_true",
                       help="cut all of every video into clips of --duration, called <video>_000, <video>_001 ...")
    group.add_argument("--overlap", type=float, default=0.0, help="seconds that each of these shares with the next")
    parser.add_masks()
    group = parser.add_argument_group("sound without pictures (always a memmap)")
    group.add_argument("--recordings", type=Path, metavar="DIR",
                       help="the folder of recordings that INPUT, a clips.tsv of partition_clips.py, cuts")
    group.add_argument("--captions", type=Path, metavar="FILE",
                       help="table with the columns id, a recording's name or a clip's id, and caption")
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int,
                       help="processes that read videos ahead of the encoders; 0 reads in the main process; by default "
                       "what the cores of this machine allow")
    group.add_argument("--shard", type=_shard, metavar="I/N",
                       help="do every N-th clip only, counted from 1: one of N independent jobs, in any order, on any "
                       "machines that share the output folder. Under torchrun its processes share this part")
    group.add_argument("--strict", action="store_true", help="stop at the first clip that fails")
    parser.add_model()
    # The base models were trained on float32 features; half precision saves time on a GPU and rounds them.
    parser.add_common(precision="fp32")
    return parser


def _shard(text: str) -> str:
    """Return ``text`` if it is "I/N" with 1 <= I <= N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 2/8, from 1/8 to 8/8")
    return text


def check_arguments(args: argparse.Namespace, variant: Variant) -> None:
    """Raise UsageError for what cannot be meant together."""
    try:
        sequence_config(variant.mode, args.duration)
    except ValueError as error:
        raise cli.UsageError(f"--duration: {error}") from error
    if args.workers is not None and args.workers < 0:
        raise cli.UsageError(f"--workers is {args.workers}, expected 0 or more")
    if (args.recordings is None) != (args.captions is None) or (args.recordings and len(args.inputs) != 1):
        raise cli.UsageError("sound without pictures needs one table of clips, --recordings and --captions")
    given = [f"--{name}" for name in VIDEO_ONLY if getattr(args, name) not in (None, False, "", 0.0)]
    if args.recordings and given:
        raise cli.UsageError(f"{', '.join(given)}: only for videos, not for sound without pictures; leave it out")
    if args.format == "memmap":
        if args.audio is not None:
            raise cli.UsageError("--audio: a memmap holds the encoded sound, it has no sound files; leave --audio out")
        if args.duration != DEFAULT_DURATION_SEC:
            raise cli.UsageError(f"--duration is {args.duration:g}, but the rows of a memmap are "
                                 f"{DEFAULT_DURATION_SEC:g} s; leave --duration out, or use --format npz")


def work_list(args: argparse.Namespace) -> list[ClipJob]:
    """Return the clips that the arguments ask for.

    Raises:
        UsageError: they ask for nothing, for something that does not exist, or for two clips of one name.
    """
    try:
        jobs = collect_jobs(
            args.inputs, recursive=args.recursive, prompt=args.prompt, prompts=args.prompts, start_sec=args.start,
            duration_sec=args.duration, windows=args.windows, overlap_sec=args.overlap, mask=args.mask, name=args.name,
            name_dir=args.output_dir if args.format == "npz" else None, video_dir=args.video_dir,
        )
    except (ValueError, FileNotFoundError) as error:
        raise cli.UsageError(str(error)) from error
    for job in jobs:
        cli.mask_settings(args, job.mask)  # says what is wrong with them
    without = sum(not job.prompt for job in jobs)
    if without:
        log.warning("%d of %d clips have no prompt: their sounds can later only be asked for without words, and the "
                    "video encoder cannot look for anything. Give --prompt or --prompts", without, len(jobs))
    return jobs


def open_output(args: argparse.Namespace, variant: Variant, jobs: list[ClipJob]) -> FeatureFiles | MemmapRows:
    """Return what takes the features; the config of the run is written beside it."""
    if args.format == "memmap":
        settings = {"extraction_version": EXTRACTION_VERSION, "encoders": encoders_identity(variant),
                    "mode": variant.mode, "precision": args.precision, "front_end": FRONT_END}
        output = MemmapRows(args.output_dir, variant, jobs, settings)
    else:
        output = FeatureFiles(args.output_dir, variant)
    write_config(output.beside(CONFIG_FILE), args)
    return output


def write_config(path: Path, args: argparse.Namespace) -> None:
    """Write the settings that all processes of a run share."""
    if is_main_process():
        cli.write_settings(path, argparse.Namespace(**{**vars(args), "shard": None}))


def open_accounts(
    args: argparse.Namespace, manifest: Path, state: Path, rows: list[tuple[str, str, float | None]], prompts: list[str]
) -> ManifestWriter:
    """Return the books of this process about its share of the work list."""
    index, count = map(int, args.shard.split("/")) if args.shard else (1, 1)
    settings = {name: str(value) for name, value in vars(args).items() if name in (
        "format", "audio", "latents", "variant", "precision", "mask_strength", "mask_clip", "mask_sync")}
    return ManifestWriter(manifest, state, rows, [settings, prompts], Shard.of_process(index - 1, count))


def report(summary: Summary, outcome: Outcome | None, manifest: Path) -> None:
    log.info("%s", summary.table())
    log.info("%d extracted, %d already current, %d left out, %d failed, in %s", summary.extracted, summary.current,
             summary.skipped, summary.failed, clock(summary.elapsed_sec))
    if outcome is None:
        log.error("stopped at the first clip that failed (--strict)")
    elif not outcome.complete:
        log.info("this part is finished; the manifest will be complete when the parts %s are",
                 ", ".join(map(str, outcome.unfinished)))
    else:
        log.info("what became of every clip: %s", manifest)


def exit_code(summary: Summary, outcome: Outcome | None, shard: Shard) -> int:
    """Return 1 if a clip failed.

    torchrun ends the other processes when one of them fails, so under torchrun the last one to finish speaks for all.
    """
    if outcome is None or len(shard.indices_in_group) == 1:
        return cli.EXIT_FAILED if summary.failed else 0
    return cli.EXIT_FAILED if outcome.group_complete and outcome.group_failed else 0


def extract_videos(args: argparse.Namespace, extractor: FeatureExtractor) -> int:
    """Extract what the arguments ask for, and return the exit code."""
    variant, jobs = extractor.variant, work_list(args)
    latents = args.latents or args.format == "memmap"
    check_weights(variant.name, args.selva_dir, (*ENCODER_PARTS, *(("vae",) if latents else ())))
    output = open_output(args, variant, jobs)
    settings = ReadSettings(
        variant.name, str(extractor.precision).removeprefix("torch."),
        None if args.format == "memmap" else args.output_dir, args.audio or "extract", latents, args.overwrite,
        args.mask_strength, args.mask_clip, args.mask_sync, args.preview,
    )
    reader = ClipReader(jobs, settings, output.digests)
    rows = [(job.id, str(job.path), job.start_sec) for job in jobs]
    with open_accounts(args, output.manifest, output.state, rows, [job.prompt for job in jobs]) as accounts:
        own = accounts.shard.own(len(jobs))
        workers = args.workers if args.workers is not None else default_workers(len(own))
        encoder = ClipEncoder(extractor, jobs, own, StageTimes())
        clips = read_clips(reader, own, workers, args.debug)
        summary = run(clips, len(own), encoder, output, accounts, strict=args.strict, announce=announce)
        stopped = args.strict and summary.failed
        outcome = None if stopped else accounts.finish()
        for path in [] if stopped else output.finish():
            announce(path)
    output.close()
    report(summary, outcome, output.manifest)
    return exit_code(summary, outcome, accounts.shard)


def extract_sounds(args: argparse.Namespace, extractor: FeatureExtractor) -> int:
    """Make a set of sound without pictures, and return the exit code."""
    jobs = plan_audio_set(args.inputs[0], args.captions, args.recordings)
    check_weights(extractor.variant.name, args.selva_dir, ("clip_text", "vae"))
    rows = [(job.window.id, str(job.path or job.window.name), None) for job in jobs]
    workers = args.workers if args.workers is not None else default_workers(len(jobs))
    sounds = AudioSetExtractor(extractor, num_workers=workers)
    with sounds.open_writer(args.output_dir, jobs) as writer:
        manifest, state = memmap_manifest(args.output_dir)
        write_config(beside_memmap(args.output_dir, CONFIG_FILE), args)
        with open_accounts(args, manifest, state, rows, [job.caption for job in jobs]) as accounts:
            own = accounts.shard.own_groups([job.window.name for job in jobs])  # a recording is read once
            extractor.prepare_texts({jobs[index].caption for index in own}, sync=False)
            results = sounds.run(jobs, writer, own)
            summary = run_sounds(results, len(own), jobs, accounts, args.output_dir.name, args.strict)
            stopped = args.strict and summary.failed
            outcome = None if stopped else accounts.finish()
            if not stopped and writer.publish_if_complete():
                announce(args.output_dir)
    report(summary, outcome, manifest)
    return exit_code(summary, outcome, accounts.shard)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = cli.resolve_device(args.device)
    variant = get_variant(args.variant)
    check_arguments(args, variant)
    extractor = FeatureExtractor(variant, args.selva_dir, device, cli.PRECISIONS[args.precision])
    return extract_sounds(args, extractor) if args.recordings else extract_videos(args, extractor)


def announce(path: Path) -> None:
    print(path, flush=True)


if __name__ == "__main__":
    distributed.leave(main())
