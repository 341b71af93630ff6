"""Reading of a base training: rows a second from a set that is larger than the memory of the process, and the waiting.

    python benchmarks/base_reading.py --work_dir /tmp/reading --gib 5
    python benchmarks/base_reading.py --work_dir /tmp/reading --gib 5 --variant small_16k --steps 0

Makes a set of random rows of that size, pushes it out of the cache of the system, and reads it in processes of their
own whose address space is limited (RLIMIT_AS, ``ulimit -v``) to what they have at their start and --more_gib:

stream    the batches of a training with nothing else to do, with one and two readers, from the disk and from the cache
training  scripts/train_base.py itself for --steps steps: rows per second, share of time that it waited for data

Prints Markdown and writes a JSON file. The set stays in the folder for the next time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import write_results

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.models.variants import VARIANTS, Variant, get_variant
from selva.utils.errors import UserError
from selva.utils.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 200  # rows that are drawn; the set repeats them
SECONDS = 10.0  # of a measurement of the stream
TABLE = ("what", "rows a second", "MB/s", "CPU ms a row", "waiting", "set", "address space", "largest resident")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--work_dir", type=Path, required=True, help="folder for the set and the run")
    group.add_argument("--variant", choices=list(VARIANTS), default="tiny_16k", help="whose rows they are")
    group.add_argument("--gib", type=float, default=5.0, help="size of the set")
    group.add_argument("--more_gib", type=float, default=1.5, help="address space on top of what a process starts with")
    group.add_argument("--batch_size", type=cli.positive_int, default=16, help="rows of a batch")
    group.add_argument("--steps", type=int, default=100, help="of the training; 0: none, only the stream")
    group.add_argument("--output", type=Path, default=Path("base_reading.json"), help="figures")
    parser.add_common(device=False)
    return parser


def put_set(folder: Path, variant: Variant, gib: float) -> int:
    """Write a set of random rows, unless it is there; return the bytes of a row."""
    from selva.data.memmap.reader import row_shapes

    shapes = row_shapes(variant, True)
    row_bytes = sum(4 * a * b for a, b in shapes.values())
    rows = int(gib * 2**30 / row_bytes)
    if (folder / "meta.json").is_file():
        return row_bytes
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with Progress(rows * len(shapes), "writing", "rows") as progress:
        for number, (key, shape) in enumerate(shapes.items()):
            block = rng.random((BLOCK, *shape), dtype=np.float32)
            with open(folder / f"{key}.memmap", "wb") as file:
                for first in range(0, rows, BLOCK):
                    file.write(block[: rows - first].tobytes())
                    progress.update(number * rows + min(rows, first + BLOCK))
    lines = [f"clip_{number:08d}\ta bell rings" for number in range(rows)]
    folder.with_name(f"{folder.name}.tsv").write_text("\n".join(["id\tlabel", *lines]) + "\n", encoding="utf-8")
    meta = {key: {"shape": [rows, *shape], "dtype": "torch.float32"} for key, shape in shapes.items()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return row_bytes


def forget(folder: Path) -> None:
    """Push the files of a set out of the system's cache."""
    for path in folder.glob("*.memmap"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def of_process(name: str) -> float:
    """Return a size of this process as Linux tells it, in GiB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) / 2**20


def measure_stream(folder: Path, variant: str, readers: int, args: argparse.Namespace, results: Any) -> None:
    """Read batches for a while in this process, under its limit."""
    import resource  # not on Windows

    import torch

    from selva.data.memmap.reader import MemmapDataset
    from selva.data.mixture import MixedClips
    from selva.data.source import DataSource
    from selva.training.base.stream import BatchStream
    from selva.training.config import ObjectiveConfig
    from selva.utils.distributed import World

    torch.set_num_threads(1)
    limit = of_process("VmSize") + args.more_gib
    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 2**30), int(limit * 2**30)))
    clips = MixedClips([MemmapDataset(folder, get_variant(variant))], [DataSource(folder)], args.seed)
    stream = BatchStream(clips, ObjectiveConfig(), batch_size=args.batch_size, steps=10**6, world=World(),
                         readers=readers)
    stream.draw()
    started, worked, batches = time.monotonic(), time.process_time(), 0
    while time.monotonic() - started < SECONDS:
        stream.draw()
        batches += 1
    seconds = time.monotonic() - started
    stream.close()
    cpu = 1000 * (time.process_time() - worked) / (batches * args.batch_size)
    rate = batches * args.batch_size / seconds
    results.put({"rows_per_sec": rate, "cpu_ms": cpu, "limit_gib": limit, "peak_gib": of_process("VmHWM")})


def streamed(folder: Path, readers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of :func:`measure_stream` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure_stream, args=(folder, args.variant, readers, args, results))
    process.start()
    found = results.get(timeout=20 * SECONDS)
    process.join()
    return found


def trained(folder: Path, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a training under its limit."""
    limit_gib = args.gib - 0.5  # the process may have less than the set
    command = [
        sys.executable, ROOT / "scripts" / "train_base.py", "--variant", args.variant, "--init", "published", "--data",
        folder, "--output_dir", run, "--steps", args.steps, "--batch_size", args.batch_size, "--log_every",
        args.steps // 2, "--save_every", args.steps, "--val_every", args.steps, "--val_rows", 2, "--sample_every", 0,
        "--device", "cpu",
    ]
    limited = ["bash", "-c", f'ulimit -v {int(limit_gib * 2**20)} && exec "$@"', "limited"]
    done = subprocess.run([*limited, *map(str, command)], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(f"the training under a limit of {limit_gib:.1f} GiB ended with {done.returncode}, see above")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = [row for row in map(json.loads, lines) if "wait_share" in row][-1]
    return {"rows_per_sec": row["rows_per_sec"], "wait_share": row["wait_share"], "limit_gib": limit_gib,
            "peak_gib": row["memory_gib"]}


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    folder = args.work_dir / f"{args.variant}_{args.gib:g}"
    row_bytes, results = put_set(folder, get_variant(args.variant), args.gib), []
    for readers in (1, 2):
        for cold in (True, False):
            if cold:
                forget(folder)
            what = f"stream, {readers} reader{'s' * (readers > 1)}, {'from the disk' if cold else 'again'}"
            results.append({"what": what, **streamed(folder, readers, args)})
    if args.steps:
        forget(folder)
        number = len(list(args.work_dir.glob("run_*")))
        results.append({"what": "training, from the disk", **trained(folder, args.work_dir / f"run_{number}", args)})
    print(f"| {' | '.join(TABLE)} |\n|{'---|' * len(TABLE)}")
    for row in results:
        waited = f"{row['wait_share']:.2%}" if "wait_share" in row else ""
        rate = row["rows_per_sec"]
        cpu = f"{row['cpu_ms']:.2f}" if "cpu_ms" in row else ""
        print(f"| {row['what']} | {rate:,.0f} | {rate * row_bytes / 1e6:,.0f} | {cpu} | {waited} | "
              f"{args.gib:.1f} GiB | {row['limit_gib']:.1f} GiB | {row['peak_gib']:.2f} GiB |")
    write_results(args.output, vars(args), results)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
