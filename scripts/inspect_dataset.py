"""Inspect a data set before training on it: its content, what cannot be used, what is odd.

    python scripts/inspect_dataset.py features/dog
    python scripts/inspect_dataset.py features/dog --videos clips/ --png dog.png --json dog.json
    python scripts/inspect_dataset.py data/vgg-train                                   # a memmap of MMAudio

DIR is a data set for train_lora.py: features (.npz) with their sound, or a memmap with its table beside it. A folder of
sounds or videos without features is measured too. Prints a table and a sentence for everything remarkable;
"!" cannot be used, "?" may be meant. Nothing in DIR is changed. Exit code 1 if something cannot be used.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.data.inspection.measures import inspect
from selva.data.inspection.report import is_inspection, is_overview, sentences, summary, table, to_json
from selva.models.variants import VARIANTS, get_variant
from selva.utils.files import atomic_write_text, check_own_output, real_path

log = logging.getLogger("selva.inspect_dataset")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="*", metavar="DIR", help="the data set")
    parser.add_argument("--recursive", action="store_true", help="sounds and videos without features: take the "
                                                                 "subfolders too")
    parser.add_argument("--variant", choices=VARIANTS, metavar="NAME",
                        help="model that is to be trained, one of " + ", ".join(VARIANTS) + "; by default the one that "
                             "the features name, or whose shapes a memmap has")
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    group.add_argument("--png", type=Path, metavar="FILE",
                       help="write a picture: spectrogram and waveform of every clip, its frames above")
    group.add_argument("--png_clips", type=cli.positive_int, default=24, metavar="N",
                       help="clips in the picture; remarkable ones first, then others spread evenly")
    group.add_argument("--videos", type=Path, metavar="DIR2",
                       help="folder of the videos, to draw their frames (default: videos beside the features)")
    parser.add_common(seed=False, device=False)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if len(args.data_dir) != 1:
        raise cli.UsageError(f"give one folder to look at, got {len(args.data_dir)}")
    (data_dir,) = args.data_dir
    if args.videos is not None and not args.videos.is_dir():
        raise cli.UsageError(f"--videos {args.videos}: no such folder")
    for flag, path, suffix, is_ours in (("--json", args.json, ".json", is_inspection),
                                        ("--png", args.png, ".png", is_overview)):
        if path is None:
            continue
        if real_path(data_dir) in real_path(path).parents:
            raise cli.UsageError(f"{flag} {path}: lies in {data_dir}, in which nothing is changed; name a file outside")
        check_own_output(flag, path, suffix, is_ours)
    inspection = inspect(data_dir, get_variant(args.variant) if args.variant else None, args.recursive)
    for line in [*table(inspection), "", *sentences(inspection), summary(inspection)]:
        print(line)
    if args.json is not None:
        atomic_write_text(args.json, to_json(inspection))
        log.info("measurements: %s", args.json)
    if args.png is not None:
        from selva.data.inspection.overview import write_overview

        write_overview(inspection, args.png, args.videos or data_dir, args.png_clips)
        log.info("overview: %s", args.png)
    return 0 if inspection.usable else cli.EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
