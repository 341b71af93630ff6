#!/usr/bin/env python3
"""Suggest settings of train_lora.py for a data folder and this machine, with a reason on every line.

    python scripts/suggest_config.py features/dog --output dog.yaml
    python train_lora.py --config dog.yaml --output_dir runs/dog
    python scripts/suggest_config.py features/dog --gpu_memory 24        # for another machine

A start from rules of thumb, not a measurement: the number of clips decides steps and size, memory decides the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.models.variants import VARIANTS
from selva.utils.errors import UsageError
from selva.utils.files import atomic_write_text


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("suggestion")
    group.add_argument("data_dir", type=Path, help="folder of .npz + sound pairs")
    group.add_argument("--variant", choices=tuple(VARIANTS), help="model to train (default: that of the features)")
    group.add_argument("--gpu_memory", type=float, metavar="GB", help="free memory of the GPU; 0: a CPU (default: what "
                       "is free here)")
    group.add_argument("--output", type=Path, metavar="FILE.yaml", help="file to write (default: print it)")
    group.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_common(seed=False, device=False)
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.gpu_memory is not None and not 0 <= args.gpu_memory < 10_000:
        raise UsageError(f"--gpu_memory is {args.gpu_memory}, expected GB of at least 0")
    if args.output is not None and args.output.exists() and not args.overwrite:
        raise UsageError(f"{args.output}: is there already; name another --output, or replace it with --overwrite")
    from selva.training.suggest import as_yaml, free_gpu_memory, suggest

    free = free_gpu_memory() if args.gpu_memory is None else round(args.gpu_memory * 2**30) or None
    text = as_yaml(suggest(args.data_dir, args.variant, free))
    if args.output is None:
        print(text, end="")
    else:
        atomic_write_text(args.output, text)
        print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
