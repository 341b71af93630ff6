"""Measure our way against the plain way, side by side, on this machine.

    python benchmarks/run.py --variant small_16k --precision bf16 --out benchmarks/results
    python benchmarks/run.py --variant tiny_16k --only train,vocoder --repeats 3

Both ways (benchmarks/plain.py is the plain one) get the same random weights and take turns; the medians are compared, and
a check shows that they compute the same. Prints a Markdown table and writes it beside a JSON file with all figures.
"""  # noqa: E501

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import Bench, markdown
from stages import STAGES

from selva import __version__, cli
from selva.files import atomic_write_text
from selva.models.zoo import get_variant

log = logging.getLogger("selva.benchmark")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", default="", metavar="STAGE,...", help=f"stages, of {', '.join(STAGES)}; all without")
    group.add_argument("--batches", type=cli.positive_int, nargs="+", default=[1, 4], help="batch sizes")
    group.add_argument("--repeats", type=cli.positive_int, default=5, help="of each way; the median counts")
    group.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder for table and figures")
    group.add_argument("--variant", default="small_16k", metavar="NAME", help="whose sizes; weights are random")
    parser.add_common(precision="bf16", seed=False)
    return parser


def describe_machine(device: torch.device) -> str:
    """Return the processor, threads and versions in one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


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
    device, dtype = cli.resolve_device(args.device), cli.PRECISIONS[args.precision]
    bench = Bench(device, args.repeats, dtype)
    rates = ", ".join(f"{str(d).removeprefix('torch.')} {rate:.2f}" for d, rate in bench.ceilings.items())
    title = f"{variant.name}, {args.precision}, {describe_machine(device)}; matrix products in TFLOP/s: {rates}"
    log.info("%s", title)
    results, wrong = [], []
    for name in chosen:
        for result in STAGES[name](bench, variant, args.batches):
            results.append(result)
            log.info("%s, %s: %s", result.stage, result.size, result.note if result.ratio is None else result.ratio)
            if result.tolerance is not None and not result.error <= result.tolerance:
                wrong.append(f"{result.stage}, {result.size}: the two ways differ by {result.error:.2g}")
    table = f"{title}\n\n{markdown(results)}\n"
    name = f"{variant.name}_{args.precision}_{device.type}"
    figures = {"title": title, "selva": __version__, "results": [result.row() for result in results]}
    atomic_write_text(args.out / f"{name}.json", json.dumps(figures, indent=2) + "\n")
    atomic_write_text(args.out / f"{name}.md", table)
    print(table)
    if wrong:
        raise ValueError("; ".join(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
