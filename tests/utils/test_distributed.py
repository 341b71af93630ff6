"""selva.utils.distributed: two processes that wait for each other, and whose runs are resumed exactly."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from selva.utils import distributed
from selva.utils.distributed import World, join_world

TESTS = Path(__file__).parents[1]


def start_two(code: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Start Python code, which knows ``folder``, in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "worker.py"
    script.write_text("import sys, time, pathlib\nimport torch\nimport selva.utils.distributed as d\n"
                      "folder = pathlib.Path(sys.argv[1])\n" + code, encoding="utf-8")
    processes = []
    for rank in range(2):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
                     "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
        processes.append(subprocess.Popen(
            [sys.executable, str(script), str(folder)], env={**os.environ, **{k: str(v) for k, v in variables.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return processes


def in_two_processes(code: str, folder: Path) -> list[str]:
    """Run Python code, which knows ``folder``, in two processes, and return what they print."""
    processes = start_two(code, folder)
    results = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    return [out.strip() for out, _ in results]


class Shared:
    """The store and the clock of several processes; whenever one of them sleeps, 100 s pass and ``each`` happens."""

    def __init__(self, each):
        self.values, self.now, self.each, self.sleeps = Counter(), 0.0, each, 0

    def add(self, key, amount):
        self.values[key] += amount
        return self.values[key]

    def monotonic(self):
        return self.now

    def sleep(self, _seconds):
        self.now, self.sleeps = self.now + 100, self.sleeps + 1
        self.each(self)


def test_the_others_wait_without_a_limit_while_rank_0_shows_life(monkeypatch):
    """A data set that takes rank 0 longer to encode than a collective may take: no barrier is met, here for 11 days."""
    def rank_0(shared):
        shared.add("selva/main_first/0/0/pulse", 1)
        if shared.sleeps == 10_000:
            shared.add("selva/main_first/0/0/done", 1)

    shared = Shared(rank_0)
    monkeypatch.setattr(distributed, "time", shared)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: pytest.fail("a barrier has a limit"))
    with World(1, 2, shared).main_first("encoding x"):
        assert shared.sleeps == 10_000


def test_the_others_do_not_wait_for_a_silent_rank_0(monkeypatch):
    shared = Shared(lambda shared: None)
    monkeypatch.setattr(distributed, "time", shared)
    with (pytest.raises(TimeoutError, match="encoding x: process 0 has shown no life for 600 s"),
          World(1, 2, shared).main_first("encoding x")):
        pytest.fail("nothing to go on with")


def test_rank_0_counts_up_and_waits_for_the_others(monkeypatch):
    """Where they cannot read its cache, they encode everything themselves."""
    def rank_1(shared):
        shared.add(f"selva/main_first/{number}/1/pulse", 1)
        if shared.sleeps % 1000 == 0:
            shared.add(f"selva/main_first/{number}/1/done", 1)

    monkeypatch.setattr(distributed, "PULSE_SEC", 0.001)
    shared = Shared(rank_1)
    monkeypatch.setattr(distributed, "time", shared)
    world = World(0, 2, shared)
    for number in range(2):
        with world.main_first("x"):
            while not shared.values[f"selva/main_first/{number}/0/pulse"]:
                pass
            assert not shared.values[f"selva/main_first/{number}/0/done"]
        assert shared.values[f"selva/main_first/{number}/0/done"] and shared.sleeps == 1000 * (number + 1)
    with pytest.raises(ValueError, match="no clip"), world.main_first("x"):
        raise ValueError("no clip")
    assert shared.values["selva/main_first/2/0/done"]


def test_where_rank_0_fails_the_others_go_on_to_fail_themselves(tmp_path):
    found = in_two_processes("""
d.PULSE_SEC = 0.1
with d.join_world(torch.device("cpu")) as world:
    try:
        with world.main_first("x"):
            raise ValueError("no clip")
    except ValueError as error:
        print(error)
""", tmp_path)
    assert found == ["no clip", "no clip"]


def test_processes_that_work_at_once_wait_for_each_other_alone(monkeypatch):
    """No process waits before its share; afterwards each waits for the other as long as that shows life."""
    def rank_0(shared):
        shared.add("selva/main_first/0/0/pulse", 1)
        if shared.sleeps == 1000:
            shared.add("selva/main_first/0/0/done", 1)

    shared = Shared(rank_0)
    monkeypatch.setattr(distributed, "time", shared)
    with World(1, 2, shared).at_once("encoding x"):
        assert shared.sleeps == 0
    assert shared.sleeps == 1000


def test_a_single_process_waits_for_nobody():
    with World().main_first("x"), World().at_once("x"):
        pass
    with World().agreement() as ask:
        assert [ask(False), ask(True), ask(False)] == [False, True, False]
    with join_world(torch.device("cpu")) as world:
        assert world == World() and world.is_main


def test_all_processes_stop_at_the_same_step_one_after_the_first_was_asked_to(tmp_path):
    found = in_two_processes("""
with d.join_world(torch.device("cpu")) as world:
    with world.agreement() as ask:
        answers = [ask(world.rank == 1 and step >= 2) for step in range(6)]  # only one of them is asked, at step 2
    with world.agreement() as ask:
        again = [ask(False) for step in range(3)]
    print(answers, any(again))
""", tmp_path)
    assert found == ["[False, False, False, True, True, True] False"] * 2


def test_two_processes_of_which_one_is_asked_to_stop_save_at_the_same_step(tmp_path):
    found = in_two_processes("""
import dataclasses
from small_run import CONFIG, make_clips, make_generator
from selva.data.dataset import ListDataset
from selva.training.loop import fit
from selva.training.run import TrainingRun
from selva.utils.metrics_log import MetricsFile

with d.join_world(torch.device("cpu")) as world:
    clips = ListDataset(make_clips(6))
    run = TrainingRun(make_generator(), clips, clips.subset([]), dataclasses.replace(CONFIG, steps=50), torch.float32,
                      world)
    saved = []
    finished = fit(run, MetricsFile(), on_checkpoint=lambda r: saved.append(r.step), on_best=lambda r: None,
                   should_stop=lambda: world.rank == 1 and run.step >= 4)
    print(finished, saved)
""", tmp_path)
    assert found == ["False [3, 5]"] * 2


FAILING = """
import selva.training.train as training
import selva.utils.watch as watch
from selva import cli
from selva.training.config import RunConfig
from selva.utils.errors import UserError
from selva.weights.config import GeneratorModelConfig

watch.PULSE_SEC = 0.2

def failing(config, settings, device, world, *rest):
{body}
training._train = failing

@cli.entry_point
def main(argv=None):
    config = RunConfig(data_dir=[folder], output_dir=folder / "run", precision="fp32",
                       model=GeneratorModelConfig(variant="tiny_16k", device="cpu"))
    training.train(config)
    return 0

cli.leave(main([]))
"""


def ended(body: str, folder: Path) -> list[str]:
    """Return what two processes say, both of which are to fail at a training that is nothing but ``body``."""
    processes = start_two(FAILING.format(body=body), folder)
    try:
        errors = [process.communicate(timeout=60)[1] for process in reversed(processes)]
    finally:
        for process in processes:
            process.kill()
    assert [process.wait() for process in processes] == [1, 1]
    return errors[::-1]


@pytest.mark.parametrize("error", ["UserError('no such clip')", "KeyError('no such clip')"])
def test_an_error_in_one_process_ends_both_with_its_message(tmp_path, error):
    """Whatever messages are on their way: one that waits for those of the others would wait for two hours."""
    waiting, failing = ended(f"""
    if world.rank == 0:
        time.sleep(1000)  # as in a message through NCCL
    for group in (None, world.hosts):
        d.dist.all_reduce(torch.ones(3), group=group, async_op=True)  # nobody answers
    raise {error}
""", tmp_path)
    assert "no such clip" in failing and ("please report" in failing) is error.startswith("KeyError")
    assert "process 1 on" in waiting and "no such clip" in waiting and "--resume auto" in waiting


def test_an_error_in_rank_0_at_the_end_is_known_to_those_that_are_done(tmp_path):
    failing, done = ended("""
    if world.rank == 0:
        time.sleep(2)
        raise UserError("disk full")
""", tmp_path)
    assert "disk full" in failing and "process 0" in done and "--resume auto" in done


def test_dropout_under_two_processes_is_resumed_exactly(tmp_path):
    """Each has its own masks, of which rank 0's step file knows nothing."""
    first, second = in_two_processes("""
import dataclasses
from small_run import CONFIG, make_clips, make_generator
from selva.checkpoint import load_checkpoint, save_checkpoint
from selva.data.dataset import ListDataset
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_state_dict
from selva.training.run import TrainingRun

config = dataclasses.replace(CONFIG, grad_accum=2)
path = folder / "adapter_step00002.pt"

def make(world):
    torch.manual_seed(config.seed + world.rank)
    clips = ListDataset(make_clips(6))
    model = make_generator(LoRAConfig(rank=2, dropout=0.5)).train()
    torch.manual_seed(config.seed + world.rank)
    return TrainingRun(model, clips, clips.subset([]), config, torch.float32, world)

with d.join_world(torch.device("cpu")) as world:
    whole = make(world)
    for step in range(4):
        whole.train_step()
        if step == 1 and world.is_main:
            save_checkpoint(path, whole.generator, {}, step=2, optimizer=whole.optimizer.state_dict(),
                            extra=whole.extra_state())
    world.wait()
    parts = make(world)
    parts.restore(load_checkpoint(path))
    for _ in range(2):
        parts.train_step()
    one, two = lora_state_dict(whole.generator), lora_state_dict(parts.generator)
    print(all(torch.equal(one[key], two[key]) for key in one), float(sum(x.abs().sum() for x in one.values())))
""", tmp_path)
    assert first.startswith("True") and first == second
