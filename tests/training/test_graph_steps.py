"""Training steps that are recorded as graphs equal those that are not, bit for bit, on the stand-in for CUDA graphs."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import logging
import weakref

import pytest
import small_run
import torch
from recorded_graph import RecordedGraphs
from small_run import make_clips, make_generator, spoil_latents

from selva.checkpoint import load_checkpoint, save_checkpoint
from selva.data.dataset import ListDataset
from selva.data.padding import Padding
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_state_dict
from selva.models.blocks import forget_tables
from selva.training.run import TrainingRun, graph_problem
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.graph import WARM_UPS, GraphedCalls

STEPS = 8
CONFIG = dataclasses.replace(small_run.CONFIG, steps=STEPS, warmup_steps=3, lr_schedule="cosine", ema_decay=0.9)
PLAIN, DROPOUT = LoRAConfig(rank=2), LoRAConfig(rank=2, dropout=0.3)
ACCUMULATED = dataclasses.replace(CONFIG, grad_accum=2)

CASES = {
    "dropout": (CONFIG, DROPOUT, torch.float32),
    "accumulated": (ACCUMULATED, DROPOUT, torch.float32),
    "bf16": (CONFIG, PLAIN, torch.bfloat16),
    "fp16": (CONFIG, PLAIN, torch.float16),
    "fp16 accumulated": (ACCUMULATED, PLAIN, torch.float16),
    "pissa": (dataclasses.replace(CONFIG, weight_decay=0.1), LoRAConfig(rank=2, init="pissa"), torch.float32),
    "dora": (dataclasses.replace(CONFIG, lora_plus_ratio=4.0), LoRAConfig(rank=2, dora=True), torch.float32),
    "conditions adapted": (CONFIG, LoRAConfig(rank=2, targets=("attn.qkv", "clip_cond_proj")), torch.float32),
}
SLOW = ("bf16", "fp16 accumulated", "dora")


def cases(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names or CASES]


@pytest.fixture(autouse=True)
def _a_smaller_generator(monkeypatch):
    monkeypatch.setattr(small_run, "SMALL", dataclasses.replace(small_run.SMALL, depth=2))


def make_run(
    config, lora, dtype, graphs: GraphedCalls | None, checkpointing: bool = False, padded: bool = False
) -> TrainingRun:
    torch.manual_seed(config.seed)
    clips = make_clips(4, 0.64) + make_clips(4, 0.96)
    mask = torch.arange(len(clips[0].mean)) > 12
    # With one of four padded, batches with padding and without alternate; both kinds have to be graphs of their own.
    clips[0] = dataclasses.replace(clips[0], padding=Padding(mask, torch.full((4,), 0.5))) if padded else clips[0]
    clips = ListDataset(clips)
    generator = make_generator(lora, dtype)
    generator.gradient_checkpointing = checkpointing
    run = TrainingRun(generator, clips, clips.subset([]), config, dtype, graphs=graphs)
    generator.train()
    return run


def graphs() -> GraphedCalls:
    return GraphedCalls(RecordedGraphs(), "training", required=True)


def train(run: TrainingRun, steps: int = STEPS) -> list[tuple[float, float]]:
    return [tuple(value.item() for value in run.train_step()) for _ in range(steps)]


def assert_same(found: TrainingRun, expected: TrainingRun) -> None:
    """Compare everything that a run has, bit for bit."""
    wanted = lora_state_dict(expected.generator)
    assert all(torch.equal(value, wanted[key]) for key, value in lora_state_dict(found.generator).items())
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        state, own = found.optimizer.state[one], expected.optimizer.state[other]
        assert set(state) == set(own) and all(torch.equal(state[key].float(), own[key].float()) for key in own)
    assert found.ema is not None and expected.ema is not None
    assert all(torch.equal(value, expected.ema.average[key]) for key, value in found.ema.average.items())
    assert found.scaler.state_dict() == expected.scaler.state_dict()


@pytest.mark.parametrize("case", cases())
def test_recorded_steps_equal_plain_ones(case):
    config, lora, dtype = CASES[case]
    recorded, plain = make_run(config, lora, dtype, graphs()), make_run(config, lora, dtype, None)
    assert train(recorded) == train(plain)
    assert_same(recorded, plain)
    assert recorded.graphs is not None
    assert recorded.graphs.num_graphs == (2 if config.grad_accum == 1 else 3)  # one per length, and the update
    assert recorded.graphs.backend.replays > 2


def test_recorded_steps_equal_plain_ones_with_checkpointing():
    config, lora, dtype = CONFIG, PLAIN, torch.float32
    recorded, plain = (make_run(config, lora, dtype, own, checkpointing=True) for own in (graphs(), None))
    assert train(recorded) == train(plain)
    assert_same(recorded, plain)
    assert recorded.graphs is not None and recorded.graphs.num_graphs == 2


def test_recorded_steps_leave_padding_out_as_plain_ones_do():
    config = dataclasses.replace(CONFIG, steps=14)
    recorded, plain = (make_run(config, PLAIN, torch.float32, own, padded=True) for own in (graphs(), None))
    assert train(recorded, 14) == train(plain, 14)
    assert_same(recorded, plain)
    assert recorded.graphs is not None and recorded.graphs.num_graphs == 3  # 0.96 s, and 0.64 s of both kinds


@pytest.mark.parametrize(("dtype", "grad_accum"), [(torch.float32, 2), (torch.float16, 1)])
def test_a_bad_gradient_is_skipped_in_a_recorded_step(dtype, grad_accum):
    runs = []
    for own in (graphs(), None):
        run = make_run(dataclasses.replace(CONFIG, grad_accum=grad_accum), PLAIN, dtype, own)
        train(run, 7)
        assert own is None or own.num_graphs == (2 if grad_accum == 1 else 3)
        before, load = lora_state_dict(run.generator), run.condition_cache.load
        spoil_latents(run)
        _, norm = train(run, 1)[0]
        assert norm != norm or norm == float("inf")
        assert all(torch.equal(value, before[key]) for key, value in lora_state_dict(run.generator).items())
        run.condition_cache.load = load
        train(run, 1)
        runs.append(run)
    assert_same(*runs)


@pytest.mark.parametrize("case", cases("accumulated", "fp16"))
def test_a_resumed_run_goes_on_exactly_with_graphs_or_without(tmp_path, case):
    config, lora, dtype = CASES[case]
    whole = make_run(config, lora, dtype, None)
    train(whole)
    first = make_run(config, lora, dtype, graphs())
    train(first, 6)
    path = tmp_path / "step.pt"
    save_checkpoint(path, first.generator, {"rank": 2}, step=first.step, optimizer=first.optimizer_state(),
                    extra=first.extra_state())
    for own in (graphs(), None):
        saved = load_checkpoint(path)  # read anew: a run goes on with the tensors themselves
        assert all(type(group["lr"]) is float for group in saved.optimizer["param_groups"])
        torch.manual_seed(99)
        run = make_run(config, lora, dtype, own)
        if own is not None:
            train(run, 6)  # has graphs, which must not be used for the state that comes now
            assert own.num_graphs
        run.restore(saved)
        train(run, STEPS - 6)
        assert_same(run, whole)


@pytest.mark.parametrize(("dtype", "grad_accum"), [(torch.float32, 2), (torch.float16, 1)])
def test_a_step_that_cannot_be_recorded_is_done_without(caplog, dtype, grad_accum):
    """And the state is the same as if nobody had tried."""
    config = dataclasses.replace(CONFIG, grad_accum=grad_accum)
    plain, own = make_run(config, PLAIN, dtype, None), GraphedCalls(RecordedGraphs(), "training")
    run = make_run(config, PLAIN, dtype, own)
    step = run.optimizer.step

    def reads_back(*args, **kwargs):
        assert all(p.grad.isfinite().all() for p in run.parameters)
        return step(*args, **kwargs)

    run.optimizer.step = reads_back
    with caplog.at_level(logging.WARNING):
        assert train(run) == train(plain)
    assert own.problem is not None and "reads a" in own.problem
    assert len([r for r in caplog.records if "without CUDA graphs" in r.message]) == 1
    assert_same(run, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_where_memory_ends_in_the_middle_of_a_step_beside_a_graph_it_is_done_without(caplog, dtype):
    """And the state is the same as if memory had been enough."""
    plain, own = make_run(CONFIG, PLAIN, dtype, None), GraphedCalls(RecordedGraphs(), "training")
    run = make_run(CONFIG, PLAIN, dtype, own)
    finish = run._finish

    def ends():
        if own.num_graphs and own.problem is None:
            run.scaler.unscale_(run.optimizer)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return finish()

    run._finish = ends
    assert train(run) == train(plain)
    assert own.problem is not None and own.num_graphs == 0 and "without CUDA graphs" in caplog.text
    assert_same(run, plain)
    assert make_run(ACCUMULATED, PLAIN, dtype, own).graphs.repeatable is False


def test_a_run_that_ends_is_gone_with_its_graphs_at_once():
    """Python looks for cycles seldom, and does not know how much of a device they hold."""
    importlib.import_module("torch._dynamo")  # or the first optimiser does, and leaves a cycle that holds its run
    gc.collect()
    gc.disable()
    try:
        own = graphs()
        run = make_run(CONFIG, PLAIN, torch.float32, own)
        train(run)
        left = [weakref.ref(one) for one in (run, run.optimizer, run.condition_cache, own)]
        assert own.num_graphs == 2
        del run, own
        assert [one() for one in left] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("case", ["dropout", "conditions adapted"])
def test_tables_that_were_forgotten_are_made_before_a_step_is_recorded(case):
    """Those of more lengths than are kept come and go."""
    config, lora, dtype = CASES[case]
    recorded, plain = make_run(config, lora, dtype, graphs()), make_run(config, lora, dtype, None)
    losses = []
    for _ in range(STEPS):
        forget_tables()
        losses += train(recorded, 1)
    assert losses == train(plain)
    assert_same(recorded, plain)
    assert recorded.graphs is not None and recorded.graphs.num_graphs == 2


@pytest.mark.parametrize("required", [False, True])
def test_with_dropout_a_step_that_cannot_be_recorded_ends_the_run(required):
    """PyTorch's generator of the device would refuse the next mask with an error that nobody understands."""
    run = make_run(CONFIG, DROPOUT, torch.float32, GraphedCalls(RecordedGraphs(), "training", required=required))
    update = run._update
    run._update = lambda norm: update(norm * float(norm > 0))
    with pytest.raises(UserError, match=r"reads a .*--lora_dropout.*Start again with --resume auto --cuda_graph off"):
        train(run)


def test_what_stands_against_recording_is_named():
    generator = make_generator(LoRAConfig(rank=2, dropout=0.1))
    assert graph_problem(generator) is None
    generator.gradient_checkpointing = 1
    assert "dropout" in graph_problem(generator)
    generator = make_generator(PLAIN)
    generator.gradient_checkpointing = True
    assert graph_problem(generator) is None
    assert "several processes" in graph_problem(generator, World(0, 2))


def test_few_steps_of_a_length_are_not_recorded():
    own = graphs()
    train(make_run(CONFIG, PLAIN, torch.float32, own), 2)
    assert own.num_graphs == 0 and own.backend.warm_ups == 2 <= 2 * WARM_UPS
