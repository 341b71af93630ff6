"""Make two data sets of toy clips to train a base model on: videos, and sounds without pictures.

    python scripts/make_demo_sets.py --out toy --videos 1500 --sounds 500
    python scripts/train_base.py --config configs/base_tiny_16k.yaml --data toy/sets/video:2 toy/sets/sound

Clips of the ten things that tiny_16k knows are made in clips/ and sounds/ and encoded as extract_features.py --format
memmap does it. Started again, it goes on where it was stopped. Prints the two sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.weights.config import ModelConfig

SEED = 1_000_000  # of the first scene: measurements use those from 8,000,000 on


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("clips")
    group.add_argument("--out", type=Path, required=True, help="folder for clips and sets")
    group.add_argument("--videos", type=cli.positive_int, default=1500, help="how many videos of 8 s")
    group.add_argument("--sounds", type=cli.positive_int, default=500, help="how many sounds without pictures")
    group.add_argument("--size", type=cli.positive_int, default=80,
                       help="pixels per side of the videos, even; tiny_16k looks at 80")
    parser.add_common()
    parser.set_defaults(seed=SEED)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.size % 2 or not 32 <= args.size <= 1024:
        raise cli.UsageError(f"--size is {args.size}, expected an even number from 32 to 1024")
    from toyworld import sets  # PyTorch takes seconds to import; mistakes were told before

    model = ModelConfig(variant="tiny_16k", device=args.device)
    for path in sets.make_sets(args.out, model, args.videos, args.sounds, size=args.size, seed=args.seed,
                               lossless=True):
        print(path)
    return 0


if __name__ == "__main__":
    cli.leave(main())
