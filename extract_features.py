#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Extract the features that the model sees: videos -> .npz files with their sound beside them, or a packed data set.

    python extract_features.py clips/ --output_dir features/dog --prompt "a dog barking" --variant small_16k --selva_dir weights/
    python extract_features.py clips.tsv --output_dir features/all --windows --variant small_16k --selva_dir weights/
    torchrun --nproc_per_node=8 extract_features.py clips.tsv --output_dir data/train --format memmap --selva_dir weights/
    python extract_features.py sounds/ --sound_only --output_dir features/gong --prompt "a gong" --selva_dir weights/
    python extract_features.py cut/clips.tsv --recordings sounds/ --captions captions.tsv --output_dir data/sounds --selva_dir weights/

Writes <id>.npz (published ComfyUI-SelVA schema) and <id>.flac for every clip; train_lora.py reads that folder. What is
there already, made from the same content with the same settings, is left as it is: an interrupted run is started again.
manifest.jsonl lists every clip with its status.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.extraction.config import ExtractionConfig
from selva.weights.find import check_weights


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(ExtractionConfig)
    parser.add_common()
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(ExtractionConfig, args)
    check_weights(config.model.variant, config.model.selva_dir, config.weight_parts)
    from selva.extraction.extract import extract  # PyTorch takes seconds to import; mistakes were told before

    return cli.EXIT_FAILED if extract(config, announce, args.debug) else 0


def announce(path: Path) -> None:
    print(path, flush=True)


if __name__ == "__main__":
    cli.leave(main())
