"""Part of `gpu.py`: the four scripts from videos to sound with `tiny_16k`, and the tests that are marked `gpu`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_rows import Row, Rows, Setup

from selva.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = "tests/test_on_gpu.py"
SMALL_CLIPS = ["--count", "2", "--duration", "1.6", "--size", "64"]
LAST_CHARACTERS = 1500  # of what a command printed, in a message
VERDICT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def scripts(setup: Setup) -> Rows:
    """Make videos, extract their features, train the preset for a first try, and make sound, on the device."""
    with tempfile.TemporaryDirectory() as name:
        folder, device = Path(name), ["--device", str(setup.device)]
        model = ["--variant", "tiny_16k", *device]
        steps = ["--steps", str(setup.pick(500, 2)), "--warmup_steps", str(setup.pick(25, 1))]
        commands = {
            "make_demo_clips": ["scripts/make_demo_clips.py", "--out", folder / "clips", *setup.pick([], SMALL_CLIPS)],
            "extract_features": ["extract_features.py", folder / "clips", "--output_dir", folder / "features",
                                 "--prompts", folder / "clips" / "prompts.txt", *model],
            "train_lora": ["train_lora.py", "--config", "configs/first_try.yaml", "--data_dir", folder / "features",
                           "--output_dir", folder / "run", *model, *steps],
            "infer": ["infer.py", folder / "clips", "--prompts", folder / "clips" / "prompts.txt", "--output",
                      folder / "sounds", "--adapter", folder / "run" / "adapter_final.pt", *model],
        }
        for what, command in commands.items():
            started = time.monotonic()
            printed = run(setup, command)
            note = "; ".join(line.split("selva.", 1)[-1] for line in printed.splitlines() if "CUDA graph" in line)
            yield Row(f"{what}, whole", "tiny_16k", time.monotonic() - started, "s", note=note[:200])


def tests(setup: Setup) -> Rows:
    """Run the tests that need a GPU; every one that fails is a wrong figure."""
    where = [GPU_TESTS] if setup.small else ["tests"]
    command = ["-m", "pytest", "-q", "-m", "gpu", "--tb=short", *where]
    printed = run(setup, command, good=(0, 1))
    counts = {what.rstrip("s"): int(number) for number, what in VERDICT.findall(printed.strip().splitlines()[-1])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if setup.device.type == "cuda" and not failed + counts.get("passed", 0):
        raise UserError(f"no test that needs a GPU was run: {printed[-LAST_CHARACTERS:]}")
    names = " ".join(re.findall(r"^(?:FAILED|ERROR) \S+", printed, flags=re.MULTILINE))
    yield Row("tests that failed", "of those marked gpu", failed, "", limit=0, note=names)
    yield Row("tests that passed", "of those marked gpu", counts.get("passed", 0), "",
              note=f"{counts['skipped']} skipped" if "skipped" in counts else "")


def run(setup: Setup, command: list, good: tuple[int, ...] = (0,)) -> str:
    """Return the output of a Python command, which gets the time that is left.

    Raises:
        UserError: it ended with another exit code, or not in time.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=setup.seconds_left(), check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} was not done in the {error.timeout:.0f} s that were left") from error
    if done.returncode not in good:
        raise UserError(f"{' '.join(map(str, command[:3]))} ended with exit code {done.returncode}: "
                        f"{done.stdout[-LAST_CHARACTERS:]}")
    return done.stdout
