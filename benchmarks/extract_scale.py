"""Show that extraction scales: the same files from any number of processes, however often killed, in constant memory.

    python benchmarks/extract_scale.py --work_dir /tmp/scale --clips 2000 --few 200 --kills 10

Makes a set of tiny videos of 8 s, a damaged one and a short one among them, each with a prompt of its own, and extracts
it with tiny_16k: by one process; by two under torchrun; by one that is killed again and again (SIGKILL, at random
moments) and started again. Then the first --few of them, for the memory. Prints a table, and exits with 0 if all
outputs are equal byte for byte and peak memory differs by at most 10 %.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.extraction.manifest import DONE, FAILED, SKIPPED, read_manifest
from selva.media import write_video
from selva.partition.windows import write_table
from selva.utils.errors import UserError
from selva.utils.text import clock, counted

EXTRACT = Path(__file__).resolve().parents[1] / "extract_features.py"
SECONDS, FPS, SIZE, RATE = 8, 8, 64, 16_000
SHORT, DAMAGED = 3, 7  # clips of the set that cannot be used
MEMORY_TOLERANCE = 0.10


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("the set")
    group.add_argument("--work_dir", type=Path, required=True, help="for the videos, which are kept, and the outputs")
    group.add_argument("--clips", type=cli.positive_int, default=2000, help="clips of the whole set")
    group.add_argument("--few", type=cli.positive_int, default=200, help="clips of the set to compare the memory with")
    group.add_argument("--kills", type=cli.positive_int, default=10, help="how often to kill")
    group.add_argument("--format", choices=("npz", "memmap"), default="memmap", help="what is written")
    group.add_argument("--workers", type=int, default=1, help="processes that read ahead, per process")
    parser.add_common(device=False)
    return parser


# -- the set -----------------------------------------------------------------------------------------------------------


def make_set(folder: Path, count: int) -> None:
    """Write the videos that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"clip_{number:05d}.mp4"
        if not path.exists():
            make_clip(path, number)


def make_clip(path: Path, number: int) -> None:
    """Write a video of a bar that moves, with a tone; both are like no other clip's."""
    if number == DAMAGED:
        path.write_bytes(b"not a video")
        return
    rng = np.random.default_rng(number)
    seconds = 2 if number == SHORT else SECONDS
    colour, speed = rng.integers(64, 256, 3), int(rng.integers(1, 9))
    pictures = np.full((seconds * FPS, SIZE, SIZE, 3), 20, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        left = (index * speed) % (SIZE - 8)
        picture[:, left : left + 8] = colour
    times = np.arange(round((seconds + 0.1) * RATE)) / RATE
    write_video(path, pictures, FPS, 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * times), RATE)


def write_work_list(path: Path, videos: Path, count: int) -> None:
    rows = [(f"clip_{n:05d}", videos / f"clip_{n:05d}.mp4", f"a bar and a tone, number {n}") for n in range(count)]
    write_table(path, ("id", "path", "prompt"), rows)


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run: seconds, exit code, and the peak memory of its largest process in GiB."""

    seconds: float
    code: int
    memory: float
    worker_memory: float


def command(args: argparse.Namespace, table: Path, output: Path, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(EXTRACT), str(table), "--output_dir", str(output), "--format", args.format, "--variant",
            "tiny_16k", "--device", "cpu", "--workers", str(args.workers)]


def start(given: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        return subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=file, env=environment)


def whole_run(given: list[str], log: Path) -> Run:
    """Run a command to its end."""
    log.unlink(missing_ok=True)
    began = time.monotonic()
    code = start(given, log).wait()
    found = re.search(r"peak memory ([\d.]+) GiB(?:, of a worker ([\d.]+) GiB)?", log.read_text())
    if found is None:
        raise UserError(f"{log}: the run did not come to its end (exit code {code}); see there")
    return Run(time.monotonic() - began, code, float(found[1]), float(found[2] or 0))


def killed_run(given: list[str], log: Path, kills: int, expected_sec: float, rng: random.Random) -> tuple[int, int]:
    """Kill a command ``kills`` times, then let it end; return the number of kills and the last exit code."""
    log.unlink(missing_ok=True)
    done = 0
    for _ in range(kills):
        process = start(given, log)
        # Now and then while it is still loading: that takes a few seconds.
        try:
            process.wait(3 + rng.uniform(0, 1.6 * expected_sec / kills))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
    return done, start(given, log).wait()


# -- comparing ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of everything that a run has written, but for its log and its settings."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
        if not name.name.endswith(("config.yaml", ".log")) and not any(part.startswith(".") for part in name.parts)
    }


def check_manifest(output: Path, args: argparse.Namespace) -> None:
    name = "manifest.jsonl"
    path = output.with_name(f"{output.name}.{name}") if args.format == "memmap" else output / name
    statuses = [row["status"] for row in read_manifest(path)]
    expected = [DONE] * args.clips
    expected[DAMAGED] = FAILED
    if args.format == "memmap":
        expected[SHORT] = SKIPPED
    if statuses != expected:
        raise UserError(f"{path}: does not say what became of the clips")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if min(args.clips, args.few) <= DAMAGED:
        raise cli.UsageError(f"--clips and --few: expected at least {DAMAGED + 1}")
    videos, tables = args.work_dir / "videos", {}
    make_set(videos, args.clips)
    for count in (args.clips, args.few):
        tables[count] = args.work_dir / f"clips_{count}.tsv"
        write_work_list(tables[count], videos, count)
    folders = {name: args.work_dir / name for name in ("few", "one", "two", "killed")}
    for folder in folders.values():
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()

    def extraction(name: str, count: int, processes: int = 1) -> tuple[list[str], Path]:
        return command(args, tables[count], folders[name] / "set", processes), folders[name] / "run.log"

    runs = {
        "few": whole_run(*extraction("few", args.few)),
        "one": whole_run(*extraction("one", args.clips)),
        "two": whole_run(*extraction("two", args.clips, processes=2)),
    }
    for name, run in runs.items():
        count = args.few if name == "few" else args.clips
        print(f"{name:8}{count:6} clips in {clock(run.seconds):>10}, exit code {run.code}, peak {run.memory:.2f} GiB, "
              f"of a worker {run.worker_memory:.2f} GiB", flush=True)
    kills, code = killed_run(*extraction("killed", args.clips), args.kills, runs["one"].seconds,
                             random.Random(args.seed))
    print(f"killed  {args.clips:6} clips, {counted(kills, 'time')}, exit code {code} in the end")

    equal = {name: contents(folders[name]) == contents(folders["one"]) for name in ("two", "killed")}
    check_manifest(folders["one"] / "set", args)
    growth = runs["one"].memory / runs["few"].memory - 1
    for name, same in equal.items():
        print(f"{name}: {'equal byte for byte' if same else 'DIFFERENT'}")
    print(f"peak memory of {counted(args.clips, 'clip')} against {args.few}: {growth:+.1%}")
    codes = {run.code for run in runs.values()} | {code}
    passed = all(equal.values()) and abs(growth) <= MEMORY_TOLERANCE and codes == {cli.EXIT_FAILED}
    print("passed" if passed else "FAILED")
    return 0 if passed else cli.EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
