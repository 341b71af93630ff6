"""Measure what every switch of train_lora.py does: train methods on sounds that tiny_16k does not know, and judge them.

    python benchmarks/soundbench.py --work bench --suite small       # about an hour on two cores, started twice
    python benchmarks/soundbench.py --work bench --methods uniform short --sounds bird --seeds 1
    python benchmarks/soundbench.py --list

Methods and questions are in soundbench.yaml. Each run adds a row to soundbench.jsonl: the new sound recognised, the
known ones kept, timing, memorisation, held-out loss, distance to true sound, along the way and for every strength of
the adapter, with its cost and its settings. What has a row is not done again, so a stopped suite goes on; several
processes with one work folder share the runs. Settings are chosen by --scenes select; --scenes judge has other scenes,
clips and seeds, for what was chosen. findings.py makes docs/findings.md of the rows.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sound_plan import PLAN_FILE, ROOT, SCENE_SETS, Method, Plan, Run, cells_of, read_plan, runs_of
from sound_rows import append_row, read_rows

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.training.config import RunConfig
from selva.utils.device import resolve_device
from selva.utils.errors import UsageError, UserError
from selva.utils.lock import FolderInUse, FolderLock
from selva.utils.settings import removed_of, removed_problems
from selva.utils.suggestions import did_you_mean, nearest
from toyworld.classes import UNSEEN

if TYPE_CHECKING:
    from sound_train import Trainer

log = logging.getLogger("selva.soundbench")

VARIANT = "tiny_16k"
ROWS_FILE = ROOT / "benchmarks" / "soundbench.jsonl"


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("runs")
    group.add_argument("--suite", default="small", help="sounds, seeds and methods, as soundbench.yaml has them")
    group.add_argument("--methods", nargs="+", metavar="NAME", help="these methods instead of those of the suite")
    group.add_argument("--sounds", nargs="+", choices=list(UNSEEN), help="these sounds instead of those of the suite")
    group.add_argument("--seeds", nargs="+", type=cli.positive_int, help="these seeds instead of those of the suite")
    group.add_argument("--clips", type=cli.positive_int, default=20, help="clips of the new sound")
    group.add_argument("--scenes", choices=list(SCENE_SETS), default="select",
                       help="select: to choose settings by. judge: for what was chosen; look at it once")
    group.add_argument("--list", action="store_true", help="list the runs in their order, and which are done")
    group = parser.add_argument_group("where and how long")
    group.add_argument("--work", type=Path, default=Path("soundbench"),
                       help="folder of clips, encoded scenes, runs in progress and finished adapters")
    group.add_argument("--results", type=Path, default=ROWS_FILE, help="rows are added to this file")
    group.add_argument("--plan", type=Path, default=PLAN_FILE, help="methods, questions and suites")
    group.add_argument("--hours", type=float, default=math.inf, help="begin no run after so many")
    group.add_argument("--threads", type=cli.positive_int, default=1, help="threads of PyTorch")
    parser.add_common(seed=False)
    return parser


def chosen_runs(args, plan: Plan) -> list[Run]:
    """Return the runs that the command line asks for, the most valuable first.

    Raises:
        UsageError: an unknown suite or method.
    """
    if args.suite not in plan.suites:
        raise UsageError(f"--suite {args.suite}: expected one of {', '.join(plan.suites)}")
    suite = plan.suites[args.suite]
    names = args.methods or [name for name, one in plan.methods.items()
                             if one.rank <= suite["highest_rank"] and not lost_settings(one)]
    if unknown := [name for name in names if name not in plan.methods]:
        hints = "; ".join(f"{name}{did_you_mean(nearest(name, plan.methods))}" for name in unknown)
        raise UsageError(f"--methods: unknown {hints}; known are {', '.join(plan.methods)}")
    cells = cells_of(args.scenes, args.sounds or suite["sounds"], args.clips, args.seeds or suite["seeds"])
    return runs_of([plan.methods[name] for name in names], cells)


def lost_settings(method: Method) -> list[str]:
    """Return a sentence for every setting of a method that this version no longer has; its rows are of earlier ones."""
    return removed_problems(method.settings, removed_of(RunConfig))


def check_settings(runs: Sequence[Run]) -> None:
    """Raise a UserError if a method has settings that no training would take, before hours of others."""
    from sound_train import configured

    if lost := {run.method.name: one for run in runs if (one := lost_settings(run.method))}:
        raise UserError("; ".join(f"method {name}: {'; '.join(one)}. Its rows name the commit that can repeat them"
                                  for name, one in lost.items()))
    for method in {run.method.name: run for run in runs}.values():
        try:
            configured(method.method, method.cell, Path("."), Path("never_written"), "cpu")
        except UserError as error:
            raise UserError(f"method {method.method.name}: {error}") from error


def make_trainer(args) -> Trainer:
    """Return the networks, the classifier and the prepared inputs that all runs share."""
    from sound_data import Inputs
    from sound_judge import Judge
    from sound_train import Trainer

    from toyworld.judging import fit_classifier
    from toyworld.measure import ToyGenerator

    device = resolve_device(args.device)
    inputs = Inputs(args.work, ToyGenerator(VARIANT, device))
    return Trainer(args.work, Judge(inputs, fit_classifier()), str(device))


def do_runs(runs: Sequence[Run], args, trainer: Trainer) -> int:
    """Do every run that has no row and that no other process is at; return the exit code."""
    from sound_train import Stopped

    started, failed = time.monotonic(), []
    for run in runs:
        if time.monotonic() - started > 3600 * args.hours:
            log.info("%g hours are over", args.hours)
            break
        if any(row["key"] == run.key for row in read_rows(args.results)):
            continue
        try:
            with FolderLock(args.work / "locks" / f"{run.key}.lock", "measures"):
                log.info("%s: %s", run.key, run.method.name)
                row = trainer.row(run)
                append_row(args.results, row)
                trainer.forget(run)
                print(f"{row['key']}\t{row['method']}\t{row['checkpoints'][-1]['new']['recognised']:.2f}\t"
                      f"{row['checkpoints'][-1]['known']['recognised']:.2f}\t{row['train_cpu_sec']:.0f}", flush=True)
        except FolderInUse:
            log.info("%s: another process is at it", run.key)
        except Stopped as stop:
            return cli.EXIT_INTERRUPTED if stop.signal == signal.SIGINT else cli.EXIT_TERMINATED
        except UserError as error:  # such as a gradient that is not finite: the other runs are worth doing
            log.error("%s (%s) failed: %s", run.key, run.method.name, error)
            failed.append(run.key)
            trainer.shared.clear()
            shutil.rmtree(args.work / "runs" / run.key, ignore_errors=True)
    return cli.EXIT_FAILED if failed else 0


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    runs = chosen_runs(args, read_plan(args.plan))
    if args.list:
        done = {row["key"] for row in read_rows(args.results)}
        for run in runs:
            cell = run.cell
            print(f"{'done' if run.key in done else 'open'}\t{run.method.name}\t{cell.sound}\tclips {cell.clips}\t"
                  f"seed {cell.seed}\t{cell.scenes}")
        return 0
    import torch

    torch.set_num_threads(args.threads)
    check_settings(runs)
    return do_runs(runs, args, make_trainer(args))


if __name__ == "__main__":
    sys.exit(main())
