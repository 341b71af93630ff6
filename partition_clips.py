"""Cut long recordings into clips of 8.1 s: recordings -> clips.tsv.

    python partition_clips.py --data_dir recordings/ --output_dir clips/
    python partition_clips.py --data_dir recordings/ --output_dir clips/ --skip_silence --val_fraction 0.1
    python partition_clips.py --data_dir talks/ --output_dir clips/ --segments talks/*.json --write_audio clips/audio

Writes <output_dir>/clips.tsv, one row per clip: id, name of the recording, first and last sample. A recording gives up
to five clips, spread over all of it without overlap; one shorter than 8.1 s gives none. What gives no clip is listed in
left_out.tsv with the reason. Only headers are read, except for --skip_silence and --write_audio.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selva import cli
from selva.inputs.prompts import read_sidecar
from selva.partition.config import PartitionConfig
from selva.partition.cut import (
    LeftOut,
    collect_recordings,
    cut_recording,
    forgotten_pieces,
    hold_out,
    write_left_out,
    write_piece,
)
from selva.partition.segments import Segment, find_delimiter, read_segments
from selva.partition.windows import (
    MAX_WINDOWS,
    WINDOW_SEC,
    Window,
    caption_of,
    read_captions,
    table_captions,
    write_captions,
    write_clips,
)
from selva.utils.progress import Progress
from selva.utils.text import listed

log = logging.getLogger("selva.partition_clips")

NAMED = 20  # of what is left out, on the terminal; left_out.tsv has all


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("--data_dir", type=Path, required=True, help="folder of recordings (subfolders are not read)")
    group.add_argument("--output_dir", type=Path, required=True, help="where clips.tsv goes")
    group.add_argument("--write_audio", type=Path, metavar="DIR",
                       help="also write every clip as DIR/<id>.flac (24 bits, rate, level and channels of the "
                            "recording), and its caption as DIR/<id>.txt; what is there already is not written again")
    group = parser.add_argument_group("where to cut")
    group.add_argument("--min_length_sec", type=float,
                       help=f"leave out shorter recordings (default: {WINDOW_SEC}, as published; below it, recordings "
                            "between the two become one clip each), or shorter segments (default: 0.64)")
    group.add_argument("--max_segments", type=cli.positive_int, metavar="N",
                       help=f"windows of one recording (default: {MAX_WINDOWS}, as published)")
    group.add_argument("--segments", type=Path, nargs="+", metavar="FILE",
                       help="cut here instead of in windows: tables (.tsv, .csv) with the columns name, start, end in "
                            "seconds, and optionally id and text; or .json files as whisper writes them, each named "
                            "as its recording. The text becomes the caption")
    group = parser.add_argument_group("silence")
    group.add_argument("--skip_silence", action="store_true",
                       help="move windows that are more than half silent to where least is silent, and leave out those "
                            "for which there is no place (of --segments: leave out). Decodes every recording")
    group.add_argument("--silence_db", type=float, default=PartitionConfig.silence_db,
                       help="50 ms with an RMS below this are silent, dB of full scale")
    group = parser.add_argument_group("captions and validation")
    group.add_argument("--captions", type=Path, metavar="FILE",
                       help="table with the columns id (name of the recording) and caption; without it, or where it "
                            "says nothing, <name>.txt beside a recording is its caption")
    group.add_argument("--val_fraction", type=float, default=0.0, metavar="F",
                       help="share of the recordings whose clips go into clips_val.tsv instead; chosen by --seed")
    group = parser.add_argument_group("part of the recordings, for several processes")
    group.add_argument("--start", type=int, default=0, help="index of the first recording, sorted by file name")
    group.add_argument("--end", type=int, default=-1,
                       help="index after the last recording, -1 for all; with --start or --end the table is called "
                            "clips_START_END.tsv")
    parser.add_common(device=False)
    return parser


def check_arguments(args: argparse.Namespace) -> PartitionConfig:
    """Return how to cut; raise one UsageError with everything that is wrong with the arguments."""
    problems = []
    if args.start < 0 or args.end < -1:
        problems.append(f"--start {args.start} --end {args.end}: expected 0 or more (--end -1 for all)")
    if not 0 <= args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction}: expected 0 or more and less than 1")
    if args.segments and args.max_segments is not None:
        problems.append("--max_segments: belongs to windows; with --segments all of these are taken")
    if args.write_audio is not None and args.write_audio.resolve() == args.data_dir.resolve():
        problems.append(f"--write_audio {args.write_audio}: is the folder of the recordings; the clips would be taken "
                        "for recordings next time")
    config = PartitionConfig()
    try:
        config = PartitionConfig(args.min_length_sec, args.max_segments or MAX_WINDOWS, args.skip_silence,
                                 args.silence_db)
    except ValueError as error:
        problems.append(f"--{error}")
    if problems:
        raise cli.UsageError("; ".join(problems))
    return config


def choose_part(recordings: Sequence[Path], args: argparse.Namespace) -> tuple[Sequence[Path], str]:
    """Return the recordings of this process, and what its tables are called after ``clips``."""
    end = len(recordings) if args.end == -1 else min(args.end, len(recordings))
    chosen = recordings[args.start : end]
    if not chosen:
        raise cli.UsageError(
            f"--start {args.start} --end {args.end}: no recording in this range, "
            f"{args.data_dir} has {len(recordings)} (0 ... {len(recordings) - 1})"
        )
    whole = args.start == 0 and args.end == -1
    return chosen, "" if whole else f"_{args.start}_{end}"


@dataclass
class Cut:
    """The clips so far, and what gave none."""

    windows: list[Window] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def cut_all(
    recordings: Sequence[Path], config: PartitionConfig, segments: dict[str, list[Segment]] | None
) -> Cut:
    """Return the clips of all recordings."""
    cut = Cut()
    with Progress(len(recordings), "finding silence" if config.skip_silence else "reading headers", "files") as bar:
        for number, path in enumerate(recordings, 1):
            given = None if segments is None else segments.get(path.stem, [])
            windows, left_out = cut_recording(path, config, given)
            cut.windows += windows
            cut.left_out += left_out
            bar.update(number)
    return cut


def find_captions(recordings: Sequence[Path], table: Path | None) -> dict[str, str]:
    """Return {name: caption}: of the table, else of the text file beside a recording."""
    written = read_captions(table, find_delimiter(table)) if table else {}
    unused = sorted(set(written) - {path.stem for path in recordings})
    if unused:
        log.warning("%s: no recording for %s", table, listed(unused))
    captions = {}
    for path in recordings:
        note = path.with_suffix(".txt")
        caption = written.get(path.stem) or (read_sidecar(note) if note.is_file() else "")
        if caption:
            captions[path.stem] = caption
    return captions


def write_pieces(cut: Cut, recordings: Sequence[Path], captions: dict[str, str], folder: Path) -> None:
    """Write the sound of every clip; clips whose sound cannot be read leave the table."""
    by_name = {path.stem: path for path in recordings}
    readable = []
    with Progress(len(cut.windows), "writing sound", "clips") as bar:
        for number, window in enumerate(cut.windows, 1):
            recording = by_name[window.name]
            try:
                write_piece(recording, window, folder, caption_of(window, captions))
                readable.append(window)
            except (ValueError, OSError) as error:
                reason = str(error).removeprefix(f"{recording}: ")
                cut.left_out.append(LeftOut(recording, reason, window.id, failed=True))
            bar.update(number)
    cut.windows = readable


def report_left_out(left_out: Sequence[LeftOut], table: Path) -> None:
    """Name what was left out, the failures first and the rest up to a limit."""
    for item in sorted(left_out, key=lambda item: not item.failed)[:NAMED]:
        log.log(logging.ERROR if item.failed else logging.WARNING, "skipped %s", item)
    if len(left_out) > NAMED:
        log.warning("... and %d more, see %s", len(left_out) - NAMED, table)


def write_tables(cut: Cut, held_out: set[str], captions: dict[str, str], output_dir: Path, part: str) -> list[Path]:
    """Write all tables of a run and return those with clips and captions; remove what a run before had more."""
    train, val, texts = (output_dir / f"{name}{part}.tsv" for name in ("clips", "clips_val", "captions"))
    written = [train]
    write_clips(train, [window for window in cut.windows if window.name not in held_out])
    if held_out:
        write_clips(val, [window for window in cut.windows if window.name in held_out])
        written.append(val)
    if captions:
        write_captions(texts, captions)
        written.append(texts)
    for old in {val, texts}.difference(written):
        if old.exists():
            old.unlink()
            log.warning("removed %s: it was of an earlier run, and this one has none", old)
    write_left_out(output_dir / f"left_out{part}.tsv", cut.left_out)
    return written


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = check_arguments(args)
    recordings, not_taken = collect_recordings(args.data_dir)
    chosen, part = choose_part(recordings, args)
    segments = read_segments(args.segments, {path.stem for path in recordings}) if args.segments else None
    of_clips = {s.id: s.text for given in (segments or {}).values() for s in given if s.text}
    of_names = find_captions(recordings, args.captions)

    cut = cut_all(chosen, config, segments)
    cut.left_out += not_taken if args.start == 0 else []
    if args.write_audio is not None:
        write_pieces(cut, chosen, table_captions(cut.windows, of_clips, of_names), args.write_audio)
        if not part and (old := forgotten_pieces(args.write_audio, cut.windows)):
            log.warning("%s: of no clip of this run: %s; remove them if they are of an earlier one",
                        args.write_audio, listed(old))
    report_left_out(cut.left_out, args.output_dir / f"left_out{part}.tsv")
    if not cut.windows:
        wanted = "" if segments or args.min_length_sec is not None else f" of {WINDOW_SEC} s"
        raise ValueError(f"{args.data_dir}: none of {len(chosen)} recordings gives a clip{wanted}")
    names = {window.name for window in cut.windows}
    held_out = hold_out(names, args.val_fraction, args.seed) if args.val_fraction else set()

    captions = table_captions(cut.windows, of_clips, of_names)
    tables = write_tables(cut, held_out, captions, args.output_dir, part)
    cli.write_settings(args.output_dir / f"clips{part}_config.yaml", args)
    failed = {item.path for item in cut.left_out if item.failed}
    log.info("%d clips from %d of %d recordings, %d unreadable", len(cut.windows), len(names), len(chosen), len(failed))
    if held_out:
        log.info("%d of these recordings are held out for validation", len(held_out))
    for path in tables:
        print(path)
    return cli.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
