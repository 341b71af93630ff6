"""selva.utils.graph: calls that are recorded equal those that are not, and what cannot be recorded runs without."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import pytest
import torch
from recorded_graph import RecordedGraphs
from torch import Tensor

from selva.utils import graph
from selva.utils.errors import Terminated, UserError
from selva.utils.graph import WARM_UPS, GraphedCalls, graphed_calls, leaves, with_leaves


@dataclass(frozen=True)
class Pair:
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Item:
    pair: Pair
    name: str
    last: Tensor


def make_item(value: float, length: int = 3) -> Item:
    return Item(Pair(torch.full((length,), value), torch.arange(length) + value), "a", torch.tensor(value))


def make_calls(**more) -> tuple[GraphedCalls, RecordedGraphs]:
    backend = RecordedGraphs()
    return GraphedCalls(backend, "test", **more), backend


def test_tensors_of_nested_dataclasses_can_be_exchanged():
    item = make_item(2.0)
    found = list(leaves(item))
    assert [x.tolist() for x in found] == [[2, 2, 2], [2, 3, 4], 2]
    doubled = with_leaves(item, iter([2 * x for x in found]))
    assert doubled.name == "a" and doubled.pair.second.tolist() == [4, 6, 8] and doubled.last == 4
    assert item.last == 2


def test_recorded_calls_give_what_plain_ones_do():
    state = torch.zeros(3)

    def function(item: Item) -> tuple[Tensor, ...]:
        state.add_(item.pair.first * item.last)
        return state * 2, item.pair.second.sum()

    calls, backend = make_calls()
    expected = torch.zeros(3)
    results = []
    for number in range(1, 7):
        item = make_item(float(number))
        expected = expected + item.pair.first * item.last
        found = calls("kind", function, item)
        torch.testing.assert_close(found, (expected * 2, item.pair.second.sum()), rtol=0, atol=0)
        results.append((found[0], expected * 2))
    assert backend.warm_ups == WARM_UPS and backend.replays == 6 - WARM_UPS and calls.num_graphs == 1
    for found, wanted in results:  # each call's results stay when the next one overwrites the graph's
        assert torch.equal(found, wanted)


def test_numbers_of_the_host_are_fixed_when_recorded():
    """The stand-in is as strict as a GPU: otherwise tests on the CPU would prove nothing."""
    calls, _ = make_calls()
    seen = [calls("kind", lambda x, factor=factor: (x * factor,), torch.ones(1))[0].item() for factor in range(1, 6)]
    assert seen == [1, 2, 3, 3, 3]


def test_every_kind_and_shape_has_its_own_graph():
    calls, _ = make_calls()
    for _ in range(WARM_UPS + 2):
        for kind, factor in (("a", 1), ("b", 2)):
            for length in (2, 3):
                (found,) = calls(kind, lambda x, factor=factor: (x * factor,), torch.ones(length))
                assert found.tolist() == [factor] * length
    assert calls.num_graphs == 4
    calls.clear()
    assert calls.num_graphs == 0


def test_random_numbers_go_on_as_without_a_graph():
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.nn.functional.dropout(x, 0.5),)

    calls, backend = make_calls()
    torch.manual_seed(5)
    plain = [function(torch.ones(50))[0] for _ in range(6)]
    torch.manual_seed(5)
    assert all(torch.equal(calls("kind", function, torch.ones(50))[0], wanted) for wanted in plain)
    torch.manual_seed(5)  # counts for a recorded call too
    assert torch.equal(calls("kind", function, torch.ones(50))[0], plain[0]) and backend.replays > 0


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x: (x * float(x.sum()),), "reads a number back"),
    (lambda x: (x if x.sum() > 0 else -x,), "reads a"),
    (lambda x: (x + torch.tensor([1.0, 2.0]),), "copies numbers of the host"),
])
def test_what_cannot_be_recorded_runs_without(function, reason, caplog):
    recovered, (calls, backend) = [], make_calls()
    with caplog.at_level(logging.WARNING):
        results = [calls("kind", function, torch.full((2,), float(i)), recover=lambda: recovered.append(1))[0]
                   for i in range(6)]
    assert all(torch.equal(found, function(torch.full((2,), float(i)))[0]) for i, found in enumerate(results))
    assert backend.replays == 0 and recovered == [1] and reason in calls.problem
    (record,) = caplog.records
    assert record.message.startswith("the test runs without CUDA graphs") and reason in record.message


def test_a_failed_recording_is_an_error_where_graphs_are_required():
    calls, _ = make_calls(required=True)
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph: .* reads a number back"):
        for _ in range(WARM_UPS + 1):
            calls("kind", lambda x: (x * float(x.sum()),), torch.ones(2))


class BadlyEnding(RecordedGraphs):
    """A device that refuses to end a recording in the middle of which something was raised."""

    def record(self, function):
        try:
            return super().record(function)
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 -- as PyTorch


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Terminated])
def test_an_interruption_while_recording_is_no_failure_to_record(interruption):
    def function(x: Tensor) -> tuple[Tensor, ...]:
        called.append(1)
        if len(called) > WARM_UPS:
            raise interruption
        return (x,)

    called, calls = [], GraphedCalls(BadlyEnding(), "test")
    with pytest.raises(interruption):
        for _ in range(WARM_UPS + 1):
            calls("kind", function, torch.ones(1))
    assert calls.problem is None and len(called) == WARM_UPS + 1


class Crowded(RecordedGraphs):
    """A device whose memory ends in the middle of a second kind of call, if that of a first one is kept by a graph."""

    graphs = 0

    def warm_up(self, function):
        outputs = super().warm_up(function)
        if self.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return outputs

    def record(self, function):
        self.graphs += 1
        return super().record(function)


@pytest.mark.parametrize("repeatable", [True, False])
def test_where_memory_ends_beside_a_graph_calls_run_without(caplog, repeatable):
    state = torch.zeros(())

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (state.add_(1) * x,)

    calls = GraphedCalls(Crowded(), "test")
    calls.draws, calls.repeatable = True, repeatable  # numbers can be drawn on, as nothing was recorded
    for _ in range(WARM_UPS + 1):
        calls("kind", function, torch.ones(1))
    assert calls.num_graphs == 1
    if not repeatable:
        with pytest.raises(torch.OutOfMemoryError):
            calls("kind", function, torch.ones(2))
        return
    (found,) = calls("kind", function, torch.ones(2), recover=lambda: state.sub_(1))
    assert found.tolist() == [WARM_UPS + 2] * 2 and calls.num_graphs == 0
    assert calls.problem is not None and "out of memory" in caplog.text


def test_memory_that_ends_without_a_graph_is_an_error():
    backend = Crowded()
    backend.graphs = 1  # of somebody else
    calls = GraphedCalls(backend, "test")
    with pytest.raises(torch.OutOfMemoryError):
        calls("kind", lambda x: (x + 1,), torch.ones(1))
    assert calls.problem is None


def test_what_a_failed_recording_has_left_is_freed_before_the_call_is_done_without():
    left: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> tuple[Tensor, ...]:
        activations = x * 2
        alive = [one() is not None for one in left]
        left.append(weakref.ref(activations))
        if len(left) == WARM_UPS + 1:
            float(activations)
        return (torch.full((), float(sum(alive))) if len(left) > WARM_UPS + 1 else activations,)

    calls, _ = make_calls()
    results = [calls("kind", function, torch.ones(()))[0].item() for _ in range(WARM_UPS + 1)]
    assert calls.problem is not None and results[-1] == 0


def test_kinds_beyond_the_limit_run_without(monkeypatch, caplog):
    monkeypatch.setattr(graph, "MOST_GRAPHS", 1)
    calls, _ = make_calls()
    with caplog.at_level(logging.INFO):
        for i in range(5):
            for length in (1, 2, 3):
                (found,) = calls("kind", lambda x: (x + 1,), torch.full((length,), float(i)))
                assert found.tolist() == [i + 1] * length
    assert calls.num_graphs == 1 and len(caplog.records) == 1 and calls.problem is None


def test_what_a_graph_reads_lives_as_long_as_it():
    calls, _ = make_calls()
    kept = []
    for _ in range(WARM_UPS + 2):
        calls("kind", lambda x: (x + 1,), torch.ones(1), keep=lambda: kept.append(1) or kept)
    assert kept == [1]  # asked for once, when it was recorded


def test_the_choice_of_graphs(caplog):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert graphed_calls("off", cuda, "training") is None and graphed_calls("auto", cpu, "training") is None
    with pytest.raises(UserError, match="--cuda_graph on: no CUDA graph is possible here: the device is cpu"):
        graphed_calls("on", cpu, "training")
    with pytest.raises(UserError, match="possible here: two processes"):
        graphed_calls("on", cuda, "training", "two processes")
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        assert graphed_calls("auto", cuda, "training", "two processes") is None
    assert [record.message for record in caplog.records] == ["the training runs without CUDA graphs: two processes"]
