"""Kill a training run again and again, resume it each time, and compare the result with an undisturbed run.

    python scripts/kill_test.py --data_dir features/demo --work_dir runs/kill_test --variant tiny_16k --kills 20

Both runs have the same settings; the second one is ended with SIGKILL at random moments, each time followed by
`--resume auto`. Prints a line per kill. Exit code 0 if both final adapters are equal bit for bit, else 1.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from selva import cli
from selva.checkpoint import STEP_FILE, load_adapter

log = logging.getLogger("selva.kill_test")

TRAIN = Path(__file__).resolve().parents[1] / "train_lora.py"


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("the runs")
    group.add_argument("--data_dir", type=Path, required=True, help="folder of feature bundles and their sounds")
    group.add_argument("--work_dir", type=Path, required=True, help="empty or new folder for both runs")
    group.add_argument("--kills", type=cli.positive_int, default=20, help="how often to kill")
    group.add_argument("--steps", type=cli.positive_int, default=200, help="steps of both runs")
    group.add_argument("--save_every", type=cli.positive_int, default=5, help="steps between checkpoints")
    parser.add_model()
    parser.add_common(precision="fp32")
    return parser


def train_command(args, output_dir: Path) -> list[str]:
    command = [
        sys.executable, str(TRAIN), "--data_dir", args.data_dir, "--output_dir", output_dir, "--variant", args.variant,
        "--steps", args.steps, "--save_every", args.save_every, "--val_every", 20, "--batch_size", 2, "--rank", 4,
        "--warmup_steps", 5, "--lora_dropout", 0.1, "--ema_decay", 0.9, "--lr_schedule", "cosine", "--seed", args.seed,
        "--device", args.device, "--precision", args.precision, "--no_preview", "--resume", "auto",
    ]
    if args.selva_dir:
        command += ["--selva_dir", args.selva_dir]
    return [str(part) for part in command]


def newest_step(folder: Path) -> int:
    steps = [int(match[1]) for path in folder.glob("*.pt") if (match := STEP_FILE.fullmatch(path.name))]
    return max(steps, default=0)


def start_quietly(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process whose output is thrown away."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def undisturbed_run(command: list[str], folder: Path) -> tuple[float, float]:
    """Run to the end and return the seconds before the first step and those after it.

    Raises:
        ValueError: the run failed.
    """
    started, first_step = time.monotonic(), None
    process = start_quietly(command)
    while process.poll() is None:
        if first_step is None and (folder / "config.yaml").exists():
            first_step = time.monotonic()
        time.sleep(0.02)
    if process.returncode or first_step is None:
        raise ValueError(f"the undisturbed run failed with exit code {process.returncode}: {' '.join(command)}")
    return first_step - started, time.monotonic() - first_step


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.work_dir.exists() and any(args.work_dir.iterdir()):
        raise cli.UsageError(f"--work_dir {args.work_dir}: is not empty")
    whole = args.work_dir / "whole"
    loading, training = undisturbed_run(train_command(args, whole), whole)
    log.info("undisturbed run: %d steps in %.1f s, after %.1f s of loading", args.steps, training, loading)

    killed, rng = args.work_dir / "killed", random.Random(args.seed)
    for number in range(1, args.kills + 1):
        process = start_quietly(train_command(args, killed))
        wait = rng.uniform(0.7 * loading, loading + 1.6 * training / args.kills)  # now and then while still loading
        try:
            process.wait(wait)
            log.info("kill %2d: the run had ended before it", number)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.info("kill %2d after %4.1f s: newest checkpoint at step %d", number, wait, newest_step(killed))
    subprocess.run(train_command(args, killed), check=not (killed / "adapter_final.pt").exists(),
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    one, two = (load_adapter(args.work_dir / name / "adapter_final.pt").tensors for name in ("whole", "killed"))
    equal = one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    print("equal bit for bit" if equal else "DIFFERENT")
    return 0 if equal else cli.EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
