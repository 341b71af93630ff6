"""Cut long recordings into clips of 8.1 s: recordings -> clips.tsv.

    python partition_clips.py --data_dir recordings/ --output_dir clips/

Writes <output_dir>/clips.tsv, one row per clip: id, name of the recording, first and last sample. A recording gives up
to five clips, spread over all of it without overlap; one shorter than 8.1 s gives none. Only headers are read.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from selva import cli
from selva.clips import WINDOW_SEC, Window, partition, write_clips
from selva.media import audio_length

log = logging.getLogger("selva.partition_clips")

# Ordered: of recordings with one name, the first kind is taken, as when the clips are looked up again.
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".mka", ".wma")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("--data_dir", type=Path, required=True, help="folder of recordings (subfolders are not read)")
    group.add_argument("--output_dir", type=Path, required=True, help="where clips.tsv goes")
    group = parser.add_argument_group("part of the recordings, for several processes")
    group.add_argument("--start", type=int, default=0, help="index of the first recording, sorted by file name")
    group.add_argument("--end", type=int, default=-1,
                       help="index after the last recording, -1 for all; with --start or --end the table is called "
                            "clips_START_END.tsv")
    parser.add_common(seed=False, device=False)
    return parser


def collect_recordings(data_dir: Path) -> list[Path]:
    """Return the audio files of ``data_dir`` by name; of equal stems only the first by ``AUDIO_SUFFIXES``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no audio file in it.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    visible = (path for path in data_dir.iterdir() if path.is_file() and not path.name.startswith("."))
    recordings: dict[str, Path] = {}
    for path in sorted(visible, key=lambda path: path.name):
        if path.suffix.lower() not in AUDIO_SUFFIXES:
            continue
        other = recordings.setdefault(path.stem, path)
        if other is not path:
            kept, left = sorted((other, path), key=lambda path: AUDIO_SUFFIXES.index(path.suffix.lower()))
            recordings[path.stem] = kept
            log.warning("skipped %s: %s has the same name and goes before it", left, kept.name)
    if not recordings:
        raise ValueError(f"{data_dir}: no recordings in it, expected files like {', '.join(AUDIO_SUFFIXES)}")
    return list(recordings.values())


def partition_all(recordings: Sequence[Path]) -> tuple[list[Window], int]:
    """Return the windows of all recordings, and how many of these could not be read."""
    windows: list[Window] = []
    num_failed = 0
    for path in recordings:
        try:
            num_samples, rate = audio_length(path)
        except (ValueError, OSError) as error:
            log.warning("skipped %s", error)
            num_failed += 1
            continue
        found = partition(path.stem, num_samples, rate)
        if not found:
            log.warning("skipped %s: %.2f s long, a clip takes %.1f s", path, num_samples / rate, WINDOW_SEC)
        windows += found
    return windows, num_failed


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.start < 0 or args.end < -1:
        raise cli.UsageError(f"--start {args.start} --end {args.end}: expected 0 or more (--end -1 for all)")
    whole = args.start == 0 and args.end == -1

    recordings = collect_recordings(args.data_dir)
    end = len(recordings) if args.end == -1 else min(args.end, len(recordings))
    chosen = recordings[args.start : end]
    if not chosen:
        raise cli.UsageError(
            f"--start {args.start} --end {args.end}: no recording in this range, "
            f"{args.data_dir} has {len(recordings)} (0 ... {len(recordings) - 1})"
        )
    windows, num_failed = partition_all(chosen)
    if not windows:
        raise ValueError(f"{args.data_dir}: none of {len(chosen)} recordings gives a clip of {WINDOW_SEC} s")

    table = args.output_dir / ("clips.tsv" if whole else f"clips_{args.start}_{end}.tsv")
    write_clips(table, windows)
    cli.write_settings(table.with_name(f"{table.stem}_config.yaml"), args)
    used = len({window.name for window in windows})
    log.info("%d clips from %d of %d recordings, %d unreadable", len(windows), used, len(chosen), num_failed)
    print(table)
    return cli.EXIT_FAILED if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
