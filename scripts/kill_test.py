"""Kill training runs again and again, resume them each time, and compare their ends with undisturbed runs.

    python scripts/kill_test.py --data_dir features/demo --work_dir runs/kill_test --variant tiny_16k --kills 20
    python scripts/kill_test.py --trainer base --data_dir sets/video:2 sets/sound --work_dir runs/kills --steps 20

All runs have the same settings. Each is ended with SIGKILL a few times, while it loads, trains, saves, validates, makes
a sample or goes back to an older step, and at last at its end, each time followed by `--resume auto`. A kill counts
for the part that it fell into, as the log and half-written files show afterwards; kills while loading do not count. The
base trainer saves while it goes on training, so a kill in "saving" is one in training too.

Exit code 0 if nothing is lost: weights, averages, metrics, samples and verdict equal those of an undisturbed run bit
for bit; else 1.
"""

from __future__ import annotations

import collections
import importlib
import json
import logging
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.checkpoint import STEP_FILE, load_adapter
from selva.training.base.checkpoint import FOLDER as CHECKPOINTS
from selva.training.base.checkpoint import all_checkpoints, checkpoint_name, step_of
from selva.utils.errors import UserError
from selva.utils.files import PARTIAL_PREFIX
from selva.utils.torchrun import process_environment

log = logging.getLogger("selva.kill_test")

ROOT = Path(__file__).resolve().parents[1]
PARTS, LAST_PARTS = ("training", "saving", "validation", "sample"), ("rewind", "end")
VAL_EVERY, SAMPLE_EVERY, KILLS_PER_RUN = 5, 10, 8
STEP_LINE = re.compile(r"step (\d+)/")
TIMING = {"sec_per_step", "rows_per_sec", "wait_share", "matmul_share", "memory_gib"}  # of metrics: never the same


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("the runs")
    group.add_argument("--trainer", choices=("lora", "base"), default="lora", help="train_lora.py, or train_base.py")
    group.add_argument("--data_dir", nargs="+", required=True, metavar="DIR[:WEIGHT]",
                       help="folders of feature bundles and their sounds; for the base trainer memmaps")
    group.add_argument("--work_dir", type=Path, required=True, help="empty or new folder for all runs")
    group.add_argument("--kills", type=cli.positive_int, default=20, help="how many kills have to count")
    group.add_argument("--steps", type=cli.positive_int, default=60, help="steps of every run")
    group.add_argument("--save_every", type=cli.positive_int, default=5, help="steps between checkpoints")
    group.add_argument("--processes", type=cli.positive_int, nargs="+", default=[1, 2], metavar="N",
                       help="processes that share a run; several numbers take turns")
    group.add_argument("--fork", action="store_true",
                       help="start the runs as copies of this process, which has imported what they import: most of "
                       "the time of a short run is that (not on Windows)")
    parser.add_model()
    parser.add_common(precision="fp32")
    return parser


class Trainer(ABC):
    """The differences between the two training scripts."""

    news: re.Pattern[str]  # lines that say what a run does next
    module: str  # that imports what a run imports

    def command(self, args, output_dir: Path, processes: int, resume: str | Path = "auto") -> list[str]:
        command = [
            sys.executable, *self.script(args, processes), "--output_dir", output_dir, "--variant", args.variant,
            "--steps", args.steps, "--save_every", args.save_every, "--val_every", VAL_EVERY, "--log_every", 1,
            "--warmup_steps", 5, "--lr_schedule", "cosine", "--seed", args.seed, "--device", args.device,
            "--precision", args.precision, "--resume", resume,
        ]
        if args.selva_dir:
            command += ["--selva_dir", args.selva_dir]
        return [str(part) for part in command]

    @abstractmethod
    def script(self, args, processes: int) -> list[object]:
        """Return the script and the flags that only it has."""

    @abstractmethod
    def states(self, folder: Path) -> dict[int, Path]:
        """Return the states that a run can be resumed from, by step, in order."""

    @abstractmethod
    def last_saved(self, steps: int) -> re.Pattern[str]:
        """Return the beginning of the line of the log that tells of the last state."""

    @abstractmethod
    def writes_to(self, folder: Path) -> Path:
        """Return the folder where half-written states lie."""

    @abstractmethod
    def after(self, news: str, step: int) -> str:
        """Return the part that a run is in after a line of the log."""

    @abstractmethod
    def differences(self, whole: Path, killed: Path) -> list[str]:
        """Return the files of a killed run that differ from those of an undisturbed one, but for the metrics."""


class LoraTrainer(Trainer):
    """``train_lora.py``: validation, then a step file, then a sample."""

    news = re.compile(r"step \d+[/:]|saved .*adapter_step|sample: ")
    module = "selva.training.train"

    def script(self, args, processes: int) -> list[object]:
        return [ROOT / "train_lora.py", "--data_dir", *args.data_dir, "--batch_size", max(1, 2 // processes), "--rank",
                4, "--lora_dropout", 0.1, "--ema_decay", 0.9,
                "--verdict_share", 1e6]  # so that the end has all its parts

    def states(self, folder: Path) -> dict[int, Path]:
        found = {int(match[1]): path for path in folder.glob("*.pt") if (match := STEP_FILE.fullmatch(path.name))}
        return dict(sorted(found.items()))

    def last_saved(self, steps: int) -> re.Pattern[str]:
        return re.compile(rf"saved .*adapter_step{steps:05d}\.pt")

    def writes_to(self, folder: Path) -> Path:
        return folder

    def after(self, news: str, step: int) -> str:
        if "adapter_step" in news:
            return "sample"
        return "validation" if STEP_LINE.match(news) and step % VAL_EVERY == 0 else "training"

    def differences(self, whole: Path, killed: Path) -> list[str]:
        pairs = [(path, killed / path.name) for path in sorted(whole.glob("adapter_*.pt"))]
        found = [one.name for one, two in pairs
                 if not two.exists() or not same_tensors(load_adapter(one).tensors, load_adapter(two).tensors)]
        for path in sorted(path for path in whole.iterdir() if path.suffix != ".pt"):
            other, same = killed / path.name, path.suffix == ".wav" or path.name == "verdict.json"
            if not other.exists() or (same and path.read_bytes() != other.read_bytes()):
                found.append(path.name)
        return found


class BaseTrainer(Trainer):
    """``train_base.py``: validation, then a sample, then a checkpoint that is written beside the next steps."""

    news = re.compile(r"step \d+[/:,]|sample: ")
    module = "selva.training.base.train"

    def script(self, args, processes: int) -> list[object]:
        return [ROOT / "scripts" / "train_base.py", "--data", *args.data_dir, "--batch_size", 2, "--val_rows", 1,
                "--sample_every", SAMPLE_EVERY, "--samples", 1, "--ema_every", VAL_EVERY, "--keep_last", 3]

    def states(self, folder: Path) -> dict[int, Path]:
        return {step: path for path in all_checkpoints(self.writes_to(folder)) if (step := step_of(path)) is not None}

    def last_saved(self, steps: int) -> re.Pattern[str]:
        return re.compile(rf"saved .*{checkpoint_name(steps)}")

    def writes_to(self, folder: Path) -> Path:
        return folder / CHECKPOINTS

    def after(self, news: str, step: int) -> str:
        if STEP_LINE.match(news):
            return "validation" if step % VAL_EVERY == 0 else "training"
        sampling = news.startswith("sample: ") or (": validation" in news and step % SAMPLE_EVERY == 0)
        return "sample" if sampling else "training"

    def differences(self, whole: Path, killed: Path) -> list[str]:
        names = [path.relative_to(whole) for pattern in ("export/*.pth", "ema_ckpts/*.pt", "samples/*/*.flac")
                 for path in sorted(whole.glob(pattern))]
        return [name.as_posix() for name in names
                if not (killed / name).exists() or not self._same(whole / name, killed / name)]

    def _same(self, one: Path, two: Path) -> bool:
        if one.suffix == ".flac":
            return one.read_bytes() == two.read_bytes()
        return same_tensors(*(torch.load(path, weights_only=True) for path in (one, two)))


TRAINERS: dict[str, Trainer] = {"lora": LoraTrainer(), "base": BaseTrainer()}


def same_tensors(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        for key, value in one.items())


class Fork:
    """A copy of this process that runs a script, with the part of ``subprocess.Popen`` that :class:`Run` needs."""

    def __init__(self, command: list[str], environment: dict[str, str], quiet: bool) -> None:
        self.returncode: int | None = None
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._run(command, environment, -1 if quiet else writing)
        os.close(writing)
        self.stderr = os.fdopen(reading, encoding="utf-8", errors="replace")

    def _run(self, command: list[str], environment: dict[str, str], writing: int) -> NoReturn:
        code = cli.EXIT_FAILED
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for number, target in enumerate((nothing, nothing, nothing if writing < 0 else writing)):
                os.dup2(target, number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))
            os.environ.update(environment)
            sys.argv = command[1:]
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else cli.EXIT_FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._reap(os.WNOHANG)
        return self.returncode

    def wait(self) -> int:
        while self.returncode is None:
            self._reap(0)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _reap(self, options: int) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)


class Run:
    """Processes that share a training, as torchrun would start them, and the log of the first one.

    Args:
        fork: as copies of this process; else as processes of their own.
    """

    def __init__(self, command: list[str], processes: int, fork: bool = False) -> None:
        self.lines: list[str] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[subprocess.Popen[str] | Fork] = []
        for rank in range(processes):
            own = process_environment(rank, processes, port)
            self.processes.append(Fork(command, own, quiet=rank > 0) if fork else subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if rank else subprocess.PIPE, text=True,
                env={**os.environ, **own}))
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

    def news(self, trainer: Trainer) -> str:
        """Return the last line that says what the run does next."""
        return next((line for line in reversed(list(self.lines)) if trainer.news.match(line)), "")

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


def unfinished(folder: Path) -> set[str]:
    """Return the names of files that are half written in a folder."""
    return {name for name in os.listdir(folder) if name.startswith(PARTIAL_PREFIX)} if folder.exists() else set()


def fell_into(part: str, run: Run, half_written: bool, trainer: Trainer = TRAINERS["lora"]) -> str:
    """Return the part that a killed run was in, which was to be ``part``."""
    if not run.step() or part == "end":  # wait_for() has seen these
        return part
    return "saving" if half_written else trainer.after(run.news(trainer), run.step())


def wait_for(
    part: str, run: Run, folder: Path, rng: random.Random, steps: int, trainer: Trainer = TRAINERS["lora"]
) -> bool:
    """Wait until a run is in a certain part, and a random moment longer; False if it ended before.

    ``part`` may be "progress" too: until there is one more state to go on from.
    """
    if part == "loading":
        time.sleep(rng.uniform(0.2, 2.0))
        return run.step() == 0 and not run.is_over
    asides = len(list(folder.glob("previous_*")))
    if part == "rewind":
        return run.until(lambda: len(list(folder.glob("previous_*"))) > asides) and _later(run, rng, 0.03)
    if part == "end":
        saved = trainer.last_saved(steps)
        return run.until(lambda: any(map(saved.match, list(run.lines)))) and _later(run, rng, 3.0)
    if not run.until(lambda: run.step() > 0):
        return False
    if part == "progress":
        there = len(trainer.states(folder))
        return run.until(lambda: len(trainer.states(folder)) > there) and _later(run, rng, 0.6)
    if part == "training":
        wanted = run.step() + rng.randint(0, 7)
        return run.until(lambda: run.step() >= wanted) and _later(run, rng, 0.05)
    if part == "validation":
        return run.until(lambda: run.step() % VAL_EVERY == 0) and _later(run, rng, 0.1)
    if part == "sample":
        return run.until(lambda: trainer.after(run.news(trainer), run.step()) == "sample") and _later(run, rng, 0.6)
    wanted = run.count("saved ") + rng.randint(0, 1)
    return (run.until(lambda: run.count("saved ") >= wanted and bool(unfinished(trainer.writes_to(folder))))
            and _later(run, rng, 0.005))


def _later(run: Run, rng: random.Random, seconds: float) -> bool:
    time.sleep(rng.uniform(0, seconds))
    return not run.is_over


def differences(whole: Path, killed: Path, trainer: Trainer) -> list[str]:
    """Return the differences of a killed run from an undisturbed one."""
    rows = [[{key: value for key, value in json.loads(line).items() if key not in TIMING}
             for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for folder in (whole, killed)]
    return [*trainer.differences(whole, killed), *(["metrics.jsonl"] if rows[0] != rows[1] else [])]


def kill_a_run(args, folder: Path, processes: int, wanted: int, rng: random.Random) -> collections.Counter[str]:
    """Take one run to its end through up to ``KILLS_PER_RUN`` kills, and return how many counted, by part."""
    counted: collections.Counter[str] = collections.Counter()
    trainer = TRAINERS[args.trainer]
    parts = [*rng.sample(PARTS, len(PARTS)), *rng.choices(PARTS, k=KILLS_PER_RUN - len(PARTS) - 2)]
    queue = ["end", "rewind", *parts[: max(0, wanted - 2)], "loading"]
    while queue:
        part, states = queue.pop(), trainer.states(folder)
        steps = list(states)
        if part == "rewind" and len(steps) < 2:
            queue.append(part)
            part = "progress"
        resume = states[rng.choice(steps[:-1])] if part == "rewind" else "auto"
        run = Run(trainer.command(args, folder, processes, resume), processes, args.fork)
        try:
            met = wait_for(part, run, folder, rng, args.steps, trainer)
            writing = unfinished(trainer.writes_to(folder))
        finally:
            killed = run.kill()
        if not killed or not met:
            log.info("%s: not in %s any more, does not count (step %d)", folder.name, part, run.step())
            continue
        # What is still there was not finished.
        part = fell_into(part, run, bool(writing & unfinished(trainer.writes_to(folder))), trainer)
        counted[part] += part != "loading"
        log.info("%s, %d process%s: killed in %s at step %d; newest step file %s", folder.name, processes,
                 "es" * (processes > 1), part, run.step(), max(trainer.states(folder), default="none"))
    return counted


def finish(args, folder: Path, processes: int) -> None:
    """Take a run to its end; a ValueError says that it does not get there."""
    run = Run(TRAINERS[args.trainer].command(args, folder, processes), processes, args.fork)
    try:
        code = run.wait()
    finally:
        run.kill()  # if this test is ended itself
    if code and not run.count("give a larger --steps"):  # the last kill came when everything was done
        raise UserError(f"{folder}: the run failed: {''.join(run.lines[-5:])}")


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.work_dir.exists() and any(args.work_dir.iterdir()):
        raise cli.UsageError(f"--work_dir {args.work_dir}: is not empty")
    if args.steps < 4 * args.save_every:
        raise cli.UsageError(f"--steps {args.steps}: expected at least four times --save_every, to go back in")
    if args.fork:
        importlib.import_module(TRAINERS[args.trainer].module)
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
        different = differences(args.work_dir / f"whole_{processes}", folder, TRAINERS[args.trainer])
        wrong += [f"{folder.name}/{name}" for name in different]
        log.info("%s: %s", folder.name, "DIFFERENT: " + ", ".join(different) if different else "equal bit for bit")
    kinds = ", ".join(f"{counted[part]} in {part}" for part in (*PARTS, *LAST_PARTS))
    print(f"kills that count: {counted.total()} ({kinds}), runs: {number}: "
          + ("DIFFERENT: " + ", ".join(wrong) if wrong else "nothing lost, equal bit for bit"))
    return cli.EXIT_FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
