#!/usr/bin/env python3
"""Train a base model: the whole generator, from scratch or from weights, on data sets of extract_features.py.

    python scripts/train_base.py --config configs/base_small_16k.yaml --data sets/vgg:5 sets/bbc --output_dir runs/a
    torchrun --nproc_per_node=8 scripts/train_base.py --config configs/base_large_44k.yaml --data ... --shard fsdp2
    python scripts/train_base.py --config configs/finetune.yaml --init weights/mmaudio_small_16k.pth --data sets/mine
    python scripts/train_base.py --example                     # all of it in small, to see that it works here

Reads memmaps (extract_features.py --format memmap, or MMAudio's own). Writes to the output folder:

    checkpoints/step_00010000/    the whole state, from which any number of processes go on (--resume auto)
    ema_ckpts/                    snapshots of the averages, for scripts/make_ema.py
    samples/                      sounds of held-out rows, and their spectrograms
    export/                       the result: <variant>_ema and <variant>_last, each as .pth and .safetensors
    metrics.jsonl loss_raw.png loss_smoothed.png config.yaml

Prints the exported files.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.training.base.config import BaseTrainConfig
from selva.training.config import check_settings_of_old_run
from selva.weights.find import check_weights


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(BaseTrainConfig)
    parser.add_common()
    parser.add_argument("--example", action="store_true",
                        help="make a few toy clips and data sets in --output_dir, train a small model on them with two "
                        "processes, and make a sound with it; no other setting counts, it takes a minute")
    return parser


def run_example(arguments: Sequence[str]) -> int:
    """Do what ``--example`` asks for."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--example", action="store_true", help="this")
    parser.add_argument("--output_dir", type=Path, default=Path("base_example"), help="folder for everything")
    args = parser.parse_args(arguments)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise cli.UsageError(f"--output_dir {args.output_dir}: is not empty; give a new folder")
    from toyworld import example  # PyTorch takes seconds to import

    example.run_example(args.output_dir, Path(__file__), print)
    return 0


def needed_weights(config: BaseTrainConfig) -> list[str]:
    """Return the parts of the variant whose published files a run reads."""
    needs = ["clip_text"] if config.init is None else []
    if config.init == "published":
        needs.append("generator")
    return needs + (["vae", "vocoder"] if config.sample_every else [])


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if "--example" in given:
        return run_example(given)
    args = build_parser().parse_args(argv)
    config = cli.config_from(BaseTrainConfig, args)
    if not config.dry_run:
        check_settings_of_old_run(args.config, config.output_dir, config.resume)
    check_weights(config.model.variant, config.model.selva_dir, needed_weights(config))
    from selva.training.base.train import train_base  # PyTorch takes seconds to import; mistakes were told before

    result = train_base(config, cli.saved_settings(args))
    if result.signal is not None:
        return cli.EXIT_INTERRUPTED if result.signal == signal.SIGINT else cli.EXIT_TERMINATED
    for path in result.exports:
        print(path)
    return 0


if __name__ == "__main__":
    cli.leave(main())
