"""Several processes: they compute what one does, whole or sharing the model, and go on from each other's state."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from selva.training.base.checkpoint import all_checkpoints, read_numbers, step_of
from selva.utils.torchrun import process_environment

STEPS_BETWEEN_KILLS = 12
WORKER = Path(__file__).parents[2] / "base_worker.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(size: int, job: dict) -> list[subprocess.Popen]:
    port, root = free_port(), WORKER.parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return [
        subprocess.Popen([sys.executable, str(WORKER), json.dumps(job)], stderr=subprocess.PIPE, text=True,
                         env={**environment, **process_environment(rank, size, port)})
        for rank in range(size)
    ]


def train(size: int, folder: Path, **job) -> dict:
    """Train with ``size`` processes; return the result, and the ids of the rows of every step in their order."""
    folder.mkdir(exist_ok=True)
    processes = start(size, {"folder": str(folder), **job})
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, errors
    result = torch.load(folder / "result.pt")
    by_rank = [json.loads((folder / f"ids_{rank}.json").read_text()) for rank in range(size)]
    result["ids"] = [[name for one in rows for name in one] for rows in zip(*by_rank, strict=True)]
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(1, tmp_path_factory.mktemp("alone") / "run", steps=4)


def test_two_processes_do_what_one_does(alone, tmp_path):
    two = train(2, tmp_path / "two", steps=4)
    assert two["ids"] == alone["ids"]
    for name in ("losses", "norms", "bins"):
        torch.testing.assert_close(two[name], alone[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(two["weights"], alone["weights"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two["average"], alone["average"], rtol=1e-6, atol=1e-6)


def test_sharing_the_model_changes_nothing(alone, tmp_path):
    """Nor do validations between the steps, for which the averages are gathered."""
    two = train(2, tmp_path / "two", steps=4, shard="fsdp2", validate=True)
    assert two["ids"] == alone["ids"]
    for name in ("losses", "norms", "bins"):
        torch.testing.assert_close(two[name], alone[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two["average"], alone["average"], rtol=1e-5, atol=1e-5)


def test_a_validation_of_a_shared_model_in_bf16_is_of_the_weights_of_now(tmp_path):
    train(2, tmp_path / "two", steps=3, shard="fsdp2", bf16=True, validate=True)  # it validates again, and compares


@pytest.mark.parametrize("before, shard, after, shard_after", [
    (2, "none", 3, "none"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (2, "none", 1, "none"), (2, "fsdp2", 1, "none"), (1, "none", 2, "fsdp2"))),
])
def test_another_number_of_processes_goes_on(alone, tmp_path, before, shard, after, shard_after):
    first = train(before, tmp_path / "run", steps=2, shard=shard)
    second = train(after, tmp_path / "run", steps=2, shard=shard_after, resume=True)
    assert first["ids"] + second["ids"] == alone["ids"]
    torch.testing.assert_close(first["losses"] + second["losses"], alone["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(second["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second["average"], alone["average"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_process_that_is_gone_ends_all_by_its_name(tmp_path, by):
    started = time.monotonic()
    processes = start(2, {"folder": str(tmp_path), "steps": 400, "die": 1, "by": by})
    try:
        _, error = processes[0].communicate(timeout=100)
        assert processes[0].returncode == 1
        assert time.monotonic() - started < 100  # of which the start takes some
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "process 1 on" in error and "Start again with --resume auto" in error


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_kills_lose_nothing(tmp_path, size):
    """A checkpoint is written after every step, so most of the kills meet one on its way."""
    whole = train(size, tmp_path / "whole", until=STEPS_BETWEEN_KILLS)
    rng, reached, kills = np.random.default_rng(0), 0, 0
    folder = tmp_path / "killed"
    folder.mkdir()
    while reached < STEPS_BETWEEN_KILLS:
        processes = start(size, {"folder": str(folder), "until": STEPS_BETWEEN_KILLS, "resume": True})
        wanted, began = reached + int(rng.integers(1, 4)), time.monotonic()
        while reached < wanted and time.monotonic() - began < 120 and processes[0].poll() is None:
            time.sleep(0.01)
            reached = max([step_of(path) or 0 for path in all_checkpoints(folder / "checkpoints")], default=0)
        time.sleep(float(rng.random()) * 0.2)  # into the middle of the next one
        for process in processes:
            process.kill()
            process.communicate()
        found = all_checkpoints(folder / "checkpoints")
        now = max([step_of(path) or 0 for path in found], default=0)
        assert now >= reached and all(read_numbers(path)["step"] == step_of(path) for path in found)
        reached, kills = now, kills + 1
    assert kills >= 3
    killed = train(size, folder, until=STEPS_BETWEEN_KILLS, resume=True)
    assert all(torch.equal(value, killed["weights"][name]) for name, value in whole["weights"].items())
    assert all(torch.equal(value, killed["average"][name]) for name, value in whole["average"].items())
