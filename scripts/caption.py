#!/usr/bin/env python3
"""Caption recordings and clips by listening to them: speech by Whisper, other sounds by CLAP.

    python scripts/caption.py --data_dir talks --whisper whisper-small
    python partition_clips.py --data_dir talks --output_dir clips --segments talks/*.json
    python scripts/caption.py --data_dir clips --whisper whisper-small --to_captions 'a man says "{text}"'
    python scripts/caption.py --data_dir clips --clap clap-htsat-unfused --labels labels.txt

Whisper writes <name>.json with times, which partition_clips.py cuts at. CLAP chooses from your list of captions, and
leaves to you, by name, what it is not sure about. Captions become <name>.txt beside the clips (or lines of --prompts),
for you to edit: what you have written or edited is never replaced. Prints the .json files, or the table of scores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.partition.captioning.config import CaptionConfig


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(CaptionConfig)
    parser.add_common()
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    config = cli.config_from(CaptionConfig, build_parser().parse_args(argv))
    if not config.data_dir.is_dir():
        raise cli.UsageError(f"--data_dir {config.data_dir}: no such folder")
    from selva.partition.captioning.run import caption_recordings  # PyTorch takes seconds to import

    captioned = caption_recordings(config)
    for path in captioned.paths:
        print(path)
    return cli.EXIT_FAILED if captioned.failed else 0


if __name__ == "__main__":
    sys.exit(main())
