#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
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

import sys
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.inference.config import InferenceConfig
from selva.weights.find import check_weights


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(InferenceConfig)
    parser.add_common()
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    config = cli.config_from(InferenceConfig, build_parser().parse_args(argv))
    check_weights(config.model.variant, config.model.selva_dir, config.weight_parts)
    from selva.inference.run import generate  # PyTorch takes seconds to import; mistakes were told before

    return cli.EXIT_FAILED if generate(config, announce) else 0


def announce(path: Path) -> None:
    print(path, flush=True)


if __name__ == "__main__":
    sys.exit(main())
