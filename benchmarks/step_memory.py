#!/usr/bin/env python3
"""Table of the memory of a training step on a GPU, which needs neither a GPU nor weights.

    python benchmarks/step_memory.py                                # prints it, half a minute
    python benchmarks/step_memory.py --docs docs/performance.md     # puts it between the marks there
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.utils.document import begin_mark, marked_block, update_document

BEGIN = begin_mark("benchmarks/step_memory.py")
VARIANTS, BATCHES = ("small_16k", "medium_44k", "large_44k"), (1, 4, 16)


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("memory")
    group.add_argument("--variants", nargs="+", default=list(VARIANTS), help="rows of the table")
    group.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"), help="number format")
    group.add_argument("--docs", type=Path, default=None, help="document to put the table into")
    parser.add_common(seed=False, device=False)
    return parser


def rows(variants: Sequence[str], precision: str) -> Iterator[str]:
    """Yield the lines of the table: a variant, with and without checkpointing, bytes by batch, the batch by card."""
    from selva.lora.config import LoRAConfig
    from selva.training.config import TrainConfig
    from selva.training.memory import CARDS_GB, LONG_BATCH, OTHERS_BYTES, largest_batch, step_memory, usable_bytes
    from selva.utils.device import dtype_of

    yield "| | " + " | ".join([*(f"batch {n}" for n in BATCHES), *(f"fits {gb} GB" for gb in CARDS_GB)]) + " |"
    yield "|---" * (1 + len(BATCHES) + len(CARDS_GB)) + "|"
    for variant in variants:
        for checkpointing in (False, True):
            peaks = {
                n: step_memory(variant, LoRAConfig(), TrainConfig(batch_size=n), dtype_of(precision),
                               checkpoint_blocks=checkpointing, num_clips=n).peak
                for n in (*BATCHES, LONG_BATCH)
            }
            fits = (largest_batch(peaks, usable_bytes(gb * 2**30 - OTHERS_BYTES)) for gb in CARDS_GB)
            cells = [f"{variant}{', `--grad_checkpointing`' if checkpointing else ''}",
                     *(f"{peaks[n] / 2**30:.2f} GiB" for n in BATCHES), *(str(count or "none") for count in fits)]
            yield "| " + " | ".join(cells) + " |"


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    lines = list(rows(args.variants, args.precision))
    print("\n".join(lines))
    if args.docs is not None:
        update_document(args.docs, BEGIN, marked_block(BEGIN, [*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
