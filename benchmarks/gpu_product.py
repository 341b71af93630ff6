"""Part of `gpu.py`: the four scripts from videos to sound with `tiny_16k`, and the tests that need a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_rows import Gap, Row, Rows, Setup

from selva.utils.errors import UserError
from selva.utils.text import counted

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = "tests/test_on_gpu.py"  # all that are marked gpu; collecting the others takes longer than running these
SMALL_CLIPS = ["--count", "2", "--duration", "1.6", "--size", "64"]
LAST_CHARACTERS = 1500  # of what a command printed, in a message
SPARE_SEC = 2.0  # a command ends that much before its part does, so that what it has printed is read
CHOSEN = re.compile(r"\bcollected (\d+) item")
BEGUN = re.compile(r"^\S+::(.+?)(?: (PASSED|FAILED|ERROR|SKIPPED)\b.*| *)$", re.MULTILINE)  # a line of pytest -v


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
            code, printed = run(setup, command)
            if code is None:
                yield Gap(what, f"was not done in time: {printed[-LAST_CHARACTERS:]}", fault=False)
                return
            if code:
                raise UserError(f"{command[0]} ended with exit code {code}: {printed[-LAST_CHARACTERS:]}")
            note = "; ".join(line.split("selva.", 1)[-1] for line in printed.splitlines() if "CUDA graph" in line)
            yield Row(f"{what}, whole", "tiny_16k", time.monotonic() - started, "s", note=note[:200])


def tests(setup: Setup) -> Rows:
    """Run the tests that need a GPU; every one that fails is a wrong figure. Those done count, whatever ends it."""
    code, printed = run(setup, ["-m", "pytest", "-v", "--tb=short", GPU_TESTS])
    ended = "was not done in time" if code is None else f"ended with exit code {code}"
    chosen = CHOSEN.search(printed)
    if chosen is None:
        raise UserError(f"no test was run, pytest {ended}: {printed[-LAST_CHARACTERS:]}")
    results: dict[str, set[str]] = {}
    for name, result in BEGUN.findall(printed):
        results.setdefault(name, set()).add(result)
    failed = [name for name, found in results.items() if found & {"FAILED", "ERROR"}]
    passed = [name for name, found in results.items() if found == {"PASSED"}]
    skipped = [name for name, found in results.items() if "SKIPPED" in found]
    if setup.device.type == "cuda" and code is not None and not failed and not passed:
        raise UserError(f"no test that needs a GPU was run: {printed[-LAST_CHARACTERS:]}")
    yield Row("tests that failed", GPU_TESTS, len(failed), "", limit=0, note=", ".join(failed))
    yield Row("tests that passed", GPU_TESTS, len(passed), "", note=f"{len(skipped)} skipped" if skipped else "")
    if missing := int(chosen[1]) - len(failed) - len(passed) - len(skipped):
        interrupted = next((f", from {name} on" for name, found in results.items() if found == {""}), "")
        last = "" if code is None else f": {printed[-LAST_CHARACTERS:]}"
        yield Gap(f"{missing} of {counted(int(chosen[1]), 'test')}{interrupted}", f"pytest {ended}{last}",
                  fault=code is not None)


def run(setup: Setup, command: list) -> tuple[int | None, str]:
    """Return the exit code of a Python command, which gets the time that is left, and what it has printed.

    The code is None where it was not done in time.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Into a file, not through a pipe, of which nothing is left when the time is over.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        with subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=printed,
            stderr=subprocess.STDOUT,
        ) as process:
            try:
                code = process.wait(max(0.0, setup.seconds_left() - SPARE_SEC))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
        printed.seek(0)
        return code, printed.read()
