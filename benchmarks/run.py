"""Measure our way against the plain way, side by side, on this machine.

    python scripts/make_test_weights.py --variant small_16k --selva_dir test_weights
    python benchmarks/run.py --variant small_16k --selva_dir test_weights --docs docs/performance.md
    python benchmarks/run.py --variant tiny_16k --only start,memmap

Both ways (benchmarks/plain.py is the plain one) get the same random weights and take turns; the medians are compared,
and a check shows that they compute the same. Prints Markdown tables and writes them beside a JSON file with all
figures; a second table shows how each stage grows with clips, batch and duration.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data_stages import extraction, startup
from machine import kind_of, processor_name
from measure import Bench, Result, clock, growth_table, markdown
from stages import Sizes, Stage, checkpointed_step, memmap_reading, sampling, training_step, vocoder

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import __version__, cli
from selva.models.variants import get_variant
from selva.utils.device import dtype_of, resolve_device
from selva.utils.document import begin_mark, marked_block, update_document
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text

log = logging.getLogger("selva.benchmark")

BEGIN_MARK = begin_mark("benchmarks/run.py")

STAGES: dict[str, Stage] = {
    "train": training_step,
    "checkpoint": checkpointed_step,
    "start": startup,
    "extract": extraction,
    "sample": sampling,
    "vocoder": vocoder,
    "memmap": memmap_reading,
}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", default="", metavar="STAGE,...", help=f"stages, of {', '.join(STAGES)}; all without")
    group.add_argument("--batches", type=cli.positive_int, nargs="+", default=[1, 4, 16], help="batch sizes")
    group.add_argument("--durations", type=float, nargs="+", default=[2.0, 8.0, 16.0],
                       help="seconds of sound to sample and to decode")
    group.add_argument("--clips", type=cli.positive_int, nargs="+",
                       help="clips to start a training on (default: 8; 8 32 128 with tiny_16k, whose start is short)")
    group.add_argument("--rows", type=cli.positive_int, nargs="+", default=[256, 4096],
                       help="rows of a memmap to read from; 4096 take 5 GB on the disk at full size")
    group.add_argument("--repeats", type=cli.positive_int, default=5,
                       help="of each way, at least 3 where they take long; the median counts")
    group.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder for tables and figures")
    group.add_argument("--docs", type=Path, metavar="FILE",
                       help="document in which the tables of all results in --out replace what is between its marks")
    group = parser.add_argument_group("model, of random weights")
    group.add_argument("--variant", default="small_16k", metavar="NAME", help="whose sizes")
    group.add_argument("--selva_dir", type=Path,
                       help="weight files to start a training with, e.g. of scripts/make_test_weights.py; only for "
                       "start, and not for tiny_16k")
    parser.add_common(precision="bf16", seed=False)
    return parser


def describe_machine(device: torch.device) -> str:
    """Return the processor, threads and versions in one line."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{processor_name(device)}{threads}, torch {torch.__version__}"


def kinds_table(stored: Sequence[dict[str, Any]]) -> str:
    """Return a table of ours over plain with a column for every kind of processor; "" if all results are of one."""
    columns = list(dict.fromkeys((each["kind"], each["precision"]) for each in stored if "kind" in each))
    if len({kind for kind, _ in columns}) < 2:
        return ""
    ratios: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for each in stored:
        for row in each["results"]:
            if row["ratio"] is not None and "kind" in each:
                key = each["variant"], row["stage"], row["size"]
                ratios.setdefault(key, {})[each["kind"], each["precision"]] = row["ratio"]
    header = ["variant", "stage", "size", *(f"{kind}, {precision}" for kind, precision in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for key, found in ratios.items():
        cells = [f"{found[column]:.2f}" if column in found else "" for column in columns]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(["### Ours over plain, by kind of processor", "", *lines]) + "\n"


def tables(figures: dict[str, Any]) -> str:
    """Return the figures of one run as Markdown."""
    results = [Result(**row) for row in figures["results"]]
    growth = growth_table(results)
    return f"{figures['title']}\n\n{markdown(results)}\n" + (f"\nHow it grows:\n\n{growth}\n" if growth else "")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    chosen = [name for name in args.only.split(",") if name] or list(STAGES)
    if unknown := set(chosen) - set(STAGES):
        raise cli.UsageError(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(STAGES)}")
    try:
        variant = get_variant(args.variant)
    except ValueError as error:
        raise cli.UsageError(f"--variant: {error}") from error
    if args.selva_dir is None and "start" in chosen and not variant.packaged:
        raise cli.UsageError(f"--selva_dir is missing: a start of {variant.name} reads weight files; write random ones "
                             "with scripts/make_test_weights.py, or leave start out with --only")
    device, dtype = resolve_device(args.device), dtype_of(args.precision)
    clips = args.clips or ([8, 32, 128] if variant.packaged else [8])
    sizes = Sizes(variant, args.batches, args.durations, clips, args.rows, None if variant.packaged else args.selva_dir)
    bench = Bench(device, args.repeats, dtype)
    rates = ", ".join(f"{str(d).removeprefix('torch.')} {rate:.2f}" for d, rate in bench.ceilings.items())
    title = f"{variant.name}, {args.precision}, {describe_machine(device)}; matrix products in TFLOP/s: {rates}"
    log.info("%s", title)
    results, wrong = [], []
    for name in chosen:
        for result in STAGES[name](bench, sizes):
            results.append(result)
            log.info("%s, %s: %s", result.stage, result.size,
                     clock(result.ours_sec) if result.ratio is None else f"{result.ratio:.2f}")
            if result.error is None:
                continue
            assert result.tolerance is not None
            if not result.error <= result.tolerance:
                wrong.append(f"{result.stage}, {result.size}: the two ways differ by {result.error:.2g}")
    kind = kind_of(device)
    where = [device.type] if kind in (device.type, "AVX512") else [device.type, kind.lower()]
    name = "_".join([variant.name, args.precision, *where, *(chosen if args.only else [])])
    figures = {"name": name, "title": title, "kind": kind, "precision": args.precision, "variant": variant.name,
               "selva": __version__, "results": [result.row() for result in results]}
    atomic_write_text(args.out / f"{name}.json", json.dumps(figures, indent=2) + "\n")
    atomic_write_text(args.out / f"{name}.md", tables(figures))
    print(tables(figures))
    if args.docs is not None:
        stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.out.glob("*.json"))]
        sections = [f"### {each['name']}\n\n{tables(each)}" for each in stored]
        sections = [*filter(None, [kinds_table(stored)]), *sections]
        update_document(args.docs, BEGIN_MARK, marked_block(BEGIN_MARK, sections))
    if wrong:
        raise UserError("; ".join(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
