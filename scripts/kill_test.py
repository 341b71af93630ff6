"""Kill training runs again and again, resume them each time, and compare their ends with undisturbed runs.

    python scripts/kill_test.py --data_dir features/demo --work_dir runs/kill_test --variant tiny_16k --kills 20

All runs have the same settings. Each is ended with SIGKILL a few times, while it loads, trains, saves, validates, makes
a sample or goes back to an older step, and at last at its end, each time followed by `--resume auto`. A kill counts
for the part that it fell into, as the log and half-written files show afterwards; kills while loading do not count.

Exit code 0 if nothing is lost: adapters, metrics, samples and verdict equal an undisturbed run's bit for bit; else 1.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.checkpoint import STEP_FILE, load_adapter
from selva.utils.errors import UserError
from selva.utils.files import PARTIAL_PREFIX
from selva.utils.torchrun import process_environment

log = logging.getLogger("selva.kill_test")

TRAIN = Path(__file__).resolve().parents[1] / "train_lora.py"
PARTS, LAST_PARTS = ("training", "saving", "validation", "sample"), ("rewind", "end")
VAL_EVERY, KILLS_PER_RUN = 5, 8
STEP_LINE = re.compile(r"step (\d+)/")
NEWS = re.compile(r"step \d+[/:]|saved .*adapter_step|sample: ")  # lines that say what a run does next


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("the runs")
    group.add_argument("--data_dir", type=Path, required=True, help="folder of feature bundles and their sounds")
    group.add_argument("--work_dir", type=Path, required=True, help="empty or new folder for all runs")
    group.add_argument("--kills", type=cli.positive_int, default=20, help="how many kills have to count")
    group.add_argument("--steps", type=cli.positive_int, default=60, help="steps of every run")
    group.add_argument("--save_every", type=cli.positive_int, default=5, help="steps between checkpoints")
    group.add_argument("--processes", type=cli.positive_int, nargs="+", default=[1, 2], metavar="N",
                       help="processes that share a run; several numbers take turns")
    parser.add_model()
    parser.add_common(precision="fp32")
    return parser


def train_command(args, output_dir: Path, processes: int, resume: str | Path = "auto") -> list[str]:
    command = [
        sys.executable, TRAIN, "--data_dir", args.data_dir, "--output_dir", output_dir, "--variant", args.variant,
        "--steps", args.steps, "--save_every", args.save_every, "--val_every", VAL_EVERY, "--log_every", 1,
        "--batch_size", max(1, 2 // processes), "--rank", 4, "--warmup_steps", 5, "--lora_dropout", 0.1,
        "--ema_decay", 0.9, "--lr_schedule", "cosine", "--seed", args.seed, "--device", args.device,
        "--precision", args.precision, "--resume", resume, "--verdict_share", 1e6,  # so that the end has all its parts
    ]
    if args.selva_dir:
        command += ["--selva_dir", args.selva_dir]
    return [str(part) for part in command]


class Run:
    """Processes that share a training, as torchrun would start them, and the log of the first one."""

    def __init__(self, command: list[str], processes: int) -> None:
        self.lines: list[str] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if rank else subprocess.PIPE, text=True,
                env={**os.environ, **process_environment(rank, processes, port)})
            for rank in range(processes)
        ]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.processes[0].stderr is not None
        self.lines.extend(iter(self.processes[0].stderr.readline, ""))

    @property
    def is_over(self) -> bool:
        return self.processes[0].poll() is not None

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened and return True; False if the run ends before it."""
        while not happened():
            if self.is_over:
                return False
            time.sleep(0.001)
        return not self.is_over

    def count(self, text: str) -> int:
        return sum(text in line for line in list(self.lines))

    def step(self) -> int:
        """Return the last step that the log names; 0 before the first."""
        return next((int(found[1]) for line in reversed(list(self.lines)) if (found := STEP_LINE.match(line))), 0)

    def kill(self) -> bool:
        """End all processes at once; return False if the first one had ended by itself."""
        for process in self.processes:
            process.kill()
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Return the exit code of the first process when all have ended."""
        codes = [process.wait() for process in self.processes]
        self._reader.join()
        return codes[0]


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the step files in a folder in order."""
    return sorted(int(match[1]) for path in folder.glob("*.pt") if (match := STEP_FILE.fullmatch(path.name)))


def unfinished(folder: Path) -> set[str]:
    """Return the names of files that are half written in a folder."""
    return {name for name in os.listdir(folder) if name.startswith(PARTIAL_PREFIX)} if folder.exists() else set()


def fell_into(part: str, run: Run, half_written: bool) -> str:
    """Return the part that a killed run was in, which was to be ``part``."""
    if not run.step() or part == "end":  # wait_for() has seen these
        return part
    news = next(line for line in reversed(run.lines) if NEWS.match(line))
    validating = STEP_LINE.match(news) and run.step() % VAL_EVERY == 0
    return "saving" if half_written else "sample" if "adapter_step" in news else PARTS[2 if validating else 0]


def wait_for(part: str, run: Run, folder: Path, rng: random.Random, steps: int) -> bool:
    """Wait until a run is in a certain part, and a random moment longer; False if it ended before."""
    if part == "loading":
        time.sleep(rng.uniform(0.2, 2.0))
        return run.step() == 0 and not run.is_over
    asides = len(list(folder.glob("previous_*")))
    if part == "rewind":
        return run.until(lambda: len(list(folder.glob("previous_*"))) > asides) and _later(run, rng, 0.03)
    if part == "end":
        return run.until(lambda: run.count(f"adapter_step{steps:05d}.pt") > 0) and _later(run, rng, 3.0)
    if not run.until(lambda: run.step() > 0):
        return False
    if part == "training":
        wanted = run.step() + rng.randint(0, 7)
        return run.until(lambda: run.step() >= wanted) and _later(run, rng, 0.05)
    if part == "validation":
        return run.until(lambda: run.step() % VAL_EVERY == 0) and _later(run, rng, 0.1)
    wanted = run.count("saved ") + rng.randint(0, 1)
    if part == "sample":
        return run.until(lambda: run.count("saved ") > wanted) and _later(run, rng, 0.6)
    return run.until(lambda: run.count("saved ") >= wanted and bool(unfinished(folder))) and _later(run, rng, 0.005)


def _later(run: Run, rng: random.Random, seconds: float) -> bool:
    time.sleep(rng.uniform(0, seconds))
    return not run.is_over


def differences(whole: Path, killed: Path) -> list[str]:
    """Return the differences of a killed run from an undisturbed one."""
    found = []
    for path in sorted(whole.glob("adapter_*.pt")):
        other = killed / path.name
        one, two = (load_adapter(p).tensors if p.exists() else {} for p in (path, other))
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            found.append(path.name)
    for path in sorted(path for path in whole.iterdir() if path.suffix != ".pt"):
        other, same = killed / path.name, path.suffix == ".wav" or path.name == "verdict.json"
        if not other.exists() or (same and path.read_bytes() != other.read_bytes()):
            found.append(path.name)
    rows = [[{key: value for key, value in json.loads(line).items() if key != "sec_per_step"}
             for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for folder in (whole, killed)]
    return [*found, *(["metrics.jsonl"] if rows[0] != rows[1] else [])]


def kill_a_run(args, folder: Path, processes: int, wanted: int, rng: random.Random) -> collections.Counter[str]:
    """Take one run to its end through up to ``KILLS_PER_RUN`` kills, and return how many counted, by part."""
    counted: collections.Counter[str] = collections.Counter()
    parts = [*rng.sample(PARTS, len(PARTS)), *rng.choices(PARTS, k=KILLS_PER_RUN - len(PARTS) - 2)]
    queue = ["end", "rewind", *parts[: max(0, wanted - 2)], "loading"]
    while queue:
        part, steps = queue.pop(), steps_in(folder)
        if part == "rewind" and len(steps) < 2:  # after a sample there is one more
            queue.append(part)
            part = "sample"
        resume = folder / f"adapter_step{rng.choice(steps[:-1]):05d}.pt" if part == "rewind" else "auto"
        run = Run(train_command(args, folder, processes, resume), processes)
        met, writing = wait_for(part, run, folder, rng, args.steps), unfinished(folder)
        if not run.kill() or not met:
            log.info("%s: not in %s any more, does not count (step %d)", folder.name, part, run.step())
            continue
        part = fell_into(part, run, bool(writing & unfinished(folder)))  # what is still there is not finished
        counted[part] += part != "loading"
        log.info("%s, processes %d: killed in %s at step %d; newest step file %s", folder.name, processes, part,
                 run.step(), max(steps_in(folder), default="none"))
    return counted


def finish(args, folder: Path, processes: int) -> None:
    """Take a run to its end; a ValueError says that it does not get there."""
    run = Run(train_command(args, folder, processes), processes)
    if run.wait() and not run.count("give a larger --steps"):  # the last kill came when everything was done
        raise UserError(f"{folder}: the run failed: {''.join(run.lines[-5:])}")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.work_dir.exists() and any(args.work_dir.iterdir()):
        raise cli.UsageError(f"--work_dir {args.work_dir}: is not empty")
    if args.steps < 4 * args.save_every:
        raise cli.UsageError(f"--steps {args.steps}: expected at least four times --save_every, to go back in")
    share = -(-args.kills // len(args.processes))  # so that each number of processes has its turn
    for processes in args.processes:
        finish(args, args.work_dir / f"whole_{processes}", processes)
        log.info("undisturbed run of %d process(es): done", processes)
    rng, counted, wrong, number = random.Random(args.seed), collections.Counter(), [], 0
    while counted.total() < args.kills:
        processes, number = args.processes[number % len(args.processes)], number + 1
        folder = args.work_dir / f"killed_{number:03d}"
        counted += kill_a_run(args, folder, processes, min(share, args.kills - counted.total()), rng)
        finish(args, folder, processes)
        different = differences(args.work_dir / f"whole_{processes}", folder)
        wrong += [f"{folder.name}/{name}" for name in different]
        log.info("%s: %s", folder.name, "DIFFERENT: " + ", ".join(different) if different else "equal bit for bit")
    kinds = ", ".join(f"{counted[part]} in {part}" for part in (*PARTS, *LAST_PARTS))
    print(f"kills that count: {counted.total()} ({kinds}), runs: {number}: "
          + ("DIFFERENT: " + ", ".join(wrong) if wrong else "nothing lost, equal bit for bit"))
    return cli.EXIT_FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
