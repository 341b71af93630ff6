"""Measure everything that a GPU has to tell, in a few minutes: what is right on it, how fast, how large.

    python benchmarks/gpu.py --out gpu_results --docs docs/gpu.md
    python benchmarks/gpu.py --out gpu_results --only right,steps

Needs one card, no network and no weight files: random weights are made on the spot. Every part is run on its own; an
error in one is noted, and the next one begins. The JSON file in --out is written anew after every figure, so whatever
ends the run, what was measured is there.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_product import scripts, tests
from gpu_right import networks, training
from gpu_rows import OutOfTime, Part, Row, Setup, amount, guarded, table, time_limit, undisturbed, wrong_rows
from gpu_speed import compiled, sampling, steps
from measure import Bench

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import __version__, cli
from selva.utils.device import dtype_of, native_precision, resolve_device
from selva.utils.document import begin_mark, marked_block, update_document
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text

log = logging.getLogger("selva.benchmark")

BEGIN_MARK = begin_mark("benchmarks/gpu.py")
LIMIT_SEC = 480.0
# Name -> (what it is about, the part, the share of the time after which it is told to end). In this order: what is
# wrong comes before what is slow, and compiling, which can take minutes, last.
PARTS: dict[str, tuple[str, Part, float]] = {
    "right": ("every network against the CPU, and in half precision", networks, 0.2),
    "learns": ("the same training on the CPU and on the device", training, 0.1),
    "tests": ("the tests that need a GPU", tests, 0.2),
    "steps": ("time and memory of training steps", steps, 0.35),
    "sampling": ("sampling, vocoder, encoders", sampling, 0.2),
    "scripts": ("tiny_16k from videos to sound", scripts, 0.25),
    "compiled": ("steps with --compile", compiled, 0.3),
}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", default="", metavar="PART,...", help=f"parts, of {', '.join(PARTS)}; all without")
    group.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for the figures, a file per card")
    group.add_argument("--docs", type=Path, metavar="FILE",
                       help="document in which the tables of all results in --out replace what is between its marks")
    group.add_argument("--small", action="store_true", help="take the smallest sizes, to see that everything runs")
    group.add_argument("--limit", type=float, default=LIMIT_SEC, metavar="SEC",
                       help="seconds in all; what is not done by then is left out, and named")
    parser.add_common(precision="auto", seed=False)
    return parser


def describe(device: torch.device) -> tuple[str, str]:
    """Return the name of the card, and the versions of what drives it."""
    if device.type != "cuda":
        return device.type, f"torch {torch.__version__}, selva {__version__}"
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
    return name, f"torch {torch.__version__}, CUDA {torch.version.cuda}, selva {__version__}"


def measure(
    figures: dict[str, Any], path: Path, chosen: Sequence[str], bench: Bench, small: bool, limit: float
) -> None:
    """Run the parts, each in its share of the time, and write the figures after each of their rows."""
    started = time.monotonic()
    for name in chosen:
        about, part, share = PARTS[name]
        began = time.monotonic()
        until = min(started + limit, began + share * limit)
        found: dict[str, Any] = {"about": about, "rows": [], "failed": [], "left_out": [], "seconds": 0.0}
        figures["parts"][name] = found
        setup = Setup(bench, small, until)
        try:
            with time_limit(setup.seconds_left()):
                for row in guarded(setup, "", part(setup)):
                    if isinstance(row, Row):
                        found["rows"].append(row.stored())
                        log.info("%s: %s, %s: %s%s", name, row.what, row.size, amount(row.value, row.unit),
                                 " WRONG" if row.wrong else "")
                    else:
                        found["failed" if row.fault else "left_out"].append(str(row))
                        log.warning("%s: %s", name, row)
                    found["seconds"], figures["seconds"] = time.monotonic() - began, time.monotonic() - started
                    write(path, figures)
        except OutOfTime:
            found["left_out"].append(f"what comes after the last row: the {until - began:.0f} s for it were over")
            log.warning("%s: %s", name, found["left_out"][-1])
        found["seconds"], figures["seconds"] = time.monotonic() - began, time.monotonic() - started
        write(path, figures)


def write(path: Path, figures: dict[str, Any]) -> None:
    with undisturbed():
        atomic_write_text(path, json.dumps(figures, indent=2) + "\n")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    chosen = [name for name in args.only.split(",") if name] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise cli.UsageError(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    device = resolve_device(args.device)
    if device.type != "cuda" and not args.small:
        raise cli.UsageError(f"this measures a GPU, and the device is {device.type}; add --small to see whether "
                             "everything runs, at sizes that say nothing about speed")
    precision = native_precision(device)[0] if args.precision == "auto" else args.precision
    bench = Bench(device, repeats=1, dtype=dtype_of(precision))
    card, software = describe(device)
    rates = ", ".join(f"{str(d).removeprefix('torch.')} {rate:.2f}" for d, rate in bench.ceilings.items())
    title = f"{card}, {precision}; matrix products in TFLOP/s: {rates}"
    log.info("%s; %s", title, software)
    figures: dict[str, Any] = {"title": title, "software": software, "small": args.small, "seconds": 0.0, "parts": {}}
    path = args.out / f"gpu_{''.join(c if c.isalnum() else '_' for c in card)}_{precision}.json"
    measure(figures, path, chosen, bench, args.small, args.limit)
    print(path)
    print(table(figures))
    if args.docs is not None:
        stored = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.out.glob("gpu_*.json"))]
        update_document(args.docs, BEGIN_MARK, marked_block(BEGIN_MARK, [table(each) for each in stored]))
    parts = figures["parts"]
    failed = [f"{name}: {text}" for name, part in parts.items() for text in part["failed"]]
    if problems := wrong_rows(list(parts.values())) + failed:
        raise UserError("; ".join(problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
