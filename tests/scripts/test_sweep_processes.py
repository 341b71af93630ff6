"""scripts/sweep.py in processes of its own: killed at random, and shared by two that torchrun has started."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from selva.checkpoint import load_adapter

ROOT = Path(__file__).parents[2]
GRID = {"lr": [0.001, 0.01], "rank": [2, 4]}
STEPS, KILLS = 12, 6
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="SIGKILL")]


def put_sweep(folder: Path, data: Path) -> Path:
    base = {"variant": "tiny_16k", "device": "cpu", "data_dir": str(data), "val_fraction": 0.2, "steps": STEPS,
            "batch_size": 2, "warmup_steps": 1, "save_every": 3, "val_every": 3, "precision": "fp32",
            "preview": False, "verdict": False, "preserve": ["a bell rings"]}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": base, "grid": GRID}), encoding="utf-8")
    return path


def start(sweep: Path, output_dir: Path, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "scripts" / "sweep.py"), str(sweep), "--output_dir", str(output_dir)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def undisturbed(_features, tmp_path_factory) -> tuple[Path, Path]:
    """A sweep of four runs and the folder of its results."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = put_sweep(folder, Path(shutil.copytree(_features, folder / "features")))
    finish(start(sweep, folder / "whole"))
    return sweep, folder / "whole"


def steps_done(folder: Path) -> int:
    """Return the number of steps that all runs of a sweep have written down so far."""
    return sum(path.read_bytes().count(b'"grad_norm"') for path in folder.glob("*/metrics.jsonl"))


def assert_same_results(found: Path, expected: Path) -> None:
    assert (found / "sweep.tsv").read_bytes() == (expected / "sweep.tsv").read_bytes()
    folders = sorted(path.name for path in expected.iterdir() if path.is_dir())
    assert len(folders) == 4 and folders == sorted(path.name for path in found.iterdir() if path.is_dir())
    for name in folders:
        ours, theirs = (load_adapter(folder / name / "adapter_final.pt").tensors for folder in (found, expected))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_sweep_that_is_killed_at_random_ends_in_the_same_table(undisturbed, tmp_path):
    sweep, whole = undisturbed
    assert steps_done(whole) == 4 * STEPS
    rng, out, kills = random.Random(7), tmp_path / "killed", 0
    for _ in range(KILLS):
        process = start(sweep, out)
        target = steps_done(out) + rng.randint(1, 12)
        while process.poll() is None and steps_done(out) < target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))  # into the step, a validation or a save
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 4  # that fell into the work
    finish(start(sweep, out))
    assert_same_results(out, whole)
    _, err = finish(start(sweep, out))
    assert err.count("done already") == 4 and "run 1 of 4" not in err


def test_two_processes_share_the_runs_of_a_sweep(undisturbed, tmp_path):
    sweep, whole = undisturbed
    out = tmp_path / "shared"
    table, err = finish(start(sweep, out, processes=2))
    assert_same_results(out, whole)
    assert f"{out / 'sweep.tsv'}\n" in table  # told by the last one to end; by both if they end together
    assert steps_done(out) == 4 * STEPS  # nothing is done twice
    # Only the first process has a voice; it met runs of the other one.
    assert err.count("done already") + err.count("another process is at it") >= 1
    begun = sorted((path.stat().st_mtime_ns, path.parent.name) for path in out.glob("*/config.yaml"))
    assert {name for _, name in begun[:2]} == {"lr=0.001,rank=2,seed=42", "lr=0.01,rank=2,seed=42"}
