"""Kills count for the part of a run that they fell into."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from scripts.kill_test import Run, fell_into, main, wait_for

STEP, VALIDATING = "step 4/60: loss 1", "step 5/60: loss 1"
VALIDATED, SAVED, SAMPLE = "step 5: validation loss 1", "saved out/adapter_step00005.pt", "sample: out/sample_5.wav"


def run_with(*lines: str) -> Run:
    run = object.__new__(Run)  # nothing is started
    run.lines = [f"{line}\n" for line in lines]
    return run


@pytest.mark.parametrize("part, half_written, lines, expected", [
    ("validation", False, (STEP, VALIDATING), "validation"),
    ("validation", False, (STEP, VALIDATING, VALIDATED), "training"),  # it was over a moment ago
    ("validation", False, (STEP, VALIDATING, VALIDATED, SAVED), "sample"),
    ("sample", False, (STEP, SAVED, "saved out/adapter_best.pt"), "sample"),
    ("sample", False, (STEP, SAVED, SAMPLE), "training"),
    ("saving", True, (STEP, VALIDATING, VALIDATED), "saving"),
    ("saving", False, (SAVED, SAMPLE, STEP), "training"),
    ("rewind", False, ("resuming from x",), "rewind"),
    ("rewind", False, ("resuming from x", STEP), "training"),
    ("end", True, (STEP, SAVED, SAMPLE), "end"),
    ("loading", False, ("encoding sound",), "loading"),
])
def test_a_kill_counts_for_the_part_that_it_fell_into(part, half_written, lines, expected):
    assert fell_into(part, run_with(*lines), half_written) == expected


def test_a_run_that_has_ended_was_not_killed(tmp_path):
    run = Run([sys.executable, "-c", "import sys; print('step 1/1: loss', file=sys.stderr)"], 1)
    assert not wait_for("training", run, tmp_path, random.Random(0), 1) or run.processes[0].wait() == 0
    assert not run.kill()
    run = Run([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert run.kill() and isinstance(run.processes[0], subprocess.Popen)


def test_a_run_too_short_to_go_back_in_is_refused(tmp_path, capsys):
    assert main(["--data_dir", str(tmp_path), "--work_dir", str(tmp_path / "runs"), "--variant", "tiny_16k",
                 "--steps", "10"]) == 2
    assert "--steps 10: expected at least four times --save_every" in capsys.readouterr().err
