import json

import pytest
import torch
from torch import nn

from toyworld.training.loop import LoopConfig, Task, learning_rate, train

CONFIG = LoopConfig(steps=12, lr=0.01, batch_size=4, warmup_steps=2, log_every=3, val_every=6, save_every_sec=0.0)


class Line(Task):
    """Fit y = 2 x + 1; can be told to stop in the middle, as if the machine had."""

    network: nn.Linear

    def __init__(self, stop_after: int | None = None) -> None:
        torch.manual_seed(0)
        self.network, self.left = nn.Linear(1, 1), stop_after

    def loss(self, rng, batch_size):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((batch_size, 1))).float()
        return (self.network(x) - 2 * x - 1).square().mean(), {"mean_x": x.mean()}

    def validate(self):
        return {"slope": self.network.weight.item()}


def weights(task: Task) -> torch.Tensor:
    return nn.utils.parameters_to_vector(task.network.parameters()).detach()


def test_a_line_is_learned_and_the_metrics_say_so(tmp_path):
    task = Line()
    train(task, LoopConfig(steps=400, lr=0.05, batch_size=16, warmup_steps=5, log_every=100, val_every=200,
                           weight_decay=0.0), tmp_path, torch.device("cpu"))
    assert (weights(task) - torch.tensor([2.0, 1.0])).abs().max() < 0.05
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"] and [("slope" in row) for row in rows] == [False, True, False, True]


@pytest.mark.parametrize("stopped_after", [1, 5, 11])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, stopped_after):
    whole, first, second = Line(), Line(stopped_after), Line()
    train(whole, CONFIG, tmp_path / "whole", torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        train(first, CONFIG, tmp_path / "parts", torch.device("cpu"))
    train(second, CONFIG, tmp_path / "parts", torch.device("cpu"))
    assert torch.equal(weights(second), weights(whole))


def test_restarting_forgets(tmp_path):
    train(Line(), CONFIG, tmp_path, torch.device("cpu"))
    again, fresh = Line(), Line()
    train(again, CONFIG, tmp_path, torch.device("cpu"), resume=False)
    train(fresh, CONFIG, tmp_path / "fresh", torch.device("cpu"))
    assert torch.equal(weights(again), weights(fresh))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_result_is_the_average(tmp_path):
    """With an average that cannot move, training ends where it began."""
    task, before = Line(), weights(Line())
    train(task, LoopConfig(steps=5, lr=0.1, batch_size=4, ema_decay=0.0), tmp_path / "a", torch.device("cpu"))
    moved = weights(task)
    task = Line()
    train(task, LoopConfig(steps=5, lr=0.1, batch_size=4, ema_decay=0.9), tmp_path / "b", torch.device("cpu"))
    assert not torch.equal(moved, before) and 0 < (weights(task) - before).norm() < (moved - before).norm()


def test_the_rate_rises_holds_and_falls_to_zero():
    config = LoopConfig(steps=100, lr=1.0, batch_size=1, warmup_steps=9, decay_fraction=0.5)
    rates = [learning_rate(step, config) for step in (0, 8, 9, 49, 75, 99)]
    assert rates == pytest.approx([0.1, 0.9, 1.0, 1.0, 0.5, 0.02])


def test_a_loss_that_is_not_finite_ends_the_stage(tmp_path):
    task = Line()
    task.network.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="gradient of step 0 is not finite"):
        train(task, CONFIG, tmp_path, torch.device("cpu"))
