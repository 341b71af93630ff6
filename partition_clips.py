#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Cut long recordings into clips of 8.1 s: recordings -> clips.tsv.

    python partition_clips.py --data_dir recordings/ --output_dir clips/
    python partition_clips.py --data_dir recordings/ --output_dir clips/ --skip_silence --val_fraction 0.1
    python partition_clips.py --data_dir talks/ --output_dir clips/ --segments talks/*.json --write_audio clips/audio

Writes <output_dir>/clips.tsv, one row per clip: id, name of the recording, first and last sample. A recording gives up
to five clips, spread over all of it without overlap; one shorter than 8.1 s gives none. What gives no clip is listed in
left_out.tsv with the reason. Only headers are read, except for --skip_silence and --write_audio.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.partition.config import PartitionConfig


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(PartitionConfig)
    parser.add_common(device=False)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    config = cli.config_from(PartitionConfig, build_parser().parse_args(argv))
    if not config.data_dir.is_dir():
        raise cli.UsageError(f"--data_dir {config.data_dir}: no such folder")
    from selva.partition.run import partition_recordings  # PyTorch takes seconds to import; mistakes were told before

    tables, failed = partition_recordings(config)
    for path in tables:
        print(path)
    return cli.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
