"""Kills count for the part of a run that they fell into."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from scripts.kill_test import TRAINERS, Run, differences, fell_into, main, same_tensors, wait_for

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


OF_BASE = "saved out/checkpoints/step_00000010"


@pytest.mark.parametrize("half_written, lines, expected", [
    (False, ("step 4/20: loss 1",), "training"),
    (False, ("step 5/20: loss 1",), "validation"),
    (False, ("step 5/20: loss 1", "step 5: validation loss 1"), "training"),  # nothing is sampled at that step
    (False, ("step 10/20: loss 1", "step 10: validation loss 1"), "sample"),
    (False, ("step 10/20: loss 1", "step 10: validation loss 1", "sample: out/01.flac"), "sample"),  # and compared
    (False, ("step 10/20: loss 1", "sample: out/01.flac", "step 10, 1 samples: eval_onset_f1 1"), "training"),
    (True, ("step 11/20: loss 1",), "saving"),  # beside the steps
    (False, ("step 11/20: loss 1", OF_BASE), "training"),
])
def test_a_kill_of_the_base_trainer_counts_for_its_own_parts(half_written, lines, expected):
    assert fell_into("saving", run_with(*lines), half_written, TRAINERS["base"]) == expected


def test_the_end_is_after_the_last_state_and_not_where_a_run_goes_on_from_it():
    saved = TRAINERS["base"].last_saved(10)
    assert saved.match(OF_BASE) and not saved.match("resuming from out/checkpoints/step_00000010")
    assert TRAINERS["lora"].last_saved(5).match(SAVED)


def put_base_run(folder, weight: float, loss: float, sound: bytes = b"sound") -> None:
    for name in ("export/a.pth", "ema_ckpts/0.5.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.tensor(weight), "step": 1}, folder / name)
    (folder / "samples" / "step_00000010").mkdir(parents=True)
    (folder / "samples" / "step_00000010" / "01.flac").write_bytes(sound)
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "wait_share": {loss}}}\n')


def test_whatever_differs_from_the_undisturbed_run_is_named(tmp_path):
    base = TRAINERS["base"]
    put_base_run(tmp_path / "whole", 1.0, 2.0)
    put_base_run(tmp_path / "same", 1.0, 2.0)
    (tmp_path / "same" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "wait_share": 0.5}\n')
    assert differences(tmp_path / "whole", tmp_path / "same", base) == []
    put_base_run(tmp_path / "other", 1.5, 2.5, b"noise")
    assert differences(tmp_path / "whole", tmp_path / "other", base) == [
        "export/a.pth", "ema_ckpts/0.5.pt", "samples/step_00000010/01.flac", "metrics.jsonl"]
    (tmp_path / "same" / "export" / "a.pth").unlink()
    assert differences(tmp_path / "whole", tmp_path / "same", base) == ["export/a.pth"]
    assert not same_tensors({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


def test_a_run_that_has_ended_was_not_killed(tmp_path):
    run = Run([sys.executable, "-c", "import sys; print('step 1/1: loss', file=sys.stderr)"], 1)
    assert not wait_for("training", run, tmp_path, random.Random(0), 1) or run.processes[0].wait() == 0
    assert not run.kill()
    run = Run([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert run.kill() and isinstance(run.processes[0], subprocess.Popen)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_copy_of_this_process_is_a_run_like_any_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nprint(f'step {sys.argv[1]}/9: rank', os.environ.get('RANK'), "
                      "file=sys.stderr, flush=True)\nif sys.argv[1] == '3': sys.exit(5)\ntime.sleep(60)\n")
    run = Run([sys.executable, str(script), "3"], 1, fork=True)
    assert run.wait() == 5 and run.step() == 3 and run.is_over and not run.kill()
    run = Run([sys.executable, str(script), "4"], 2, fork=True)
    assert run.until(lambda: run.step() == 4) and run.count("rank 0") == 1 and run.count("rank 1") == 0
    assert run.kill() and "RANK" not in os.environ


def test_a_run_too_short_to_go_back_in_is_refused(tmp_path, capsys):
    assert main(["--data_dir", str(tmp_path), "--work_dir", str(tmp_path / "runs"), "--variant", "tiny_16k",
                 "--steps", "10"]) == 2
    assert "--steps 10: expected at least four times --save_every" in capsys.readouterr().err
