"""selva.training.rate_probe: the rate that a range test chooses, and that it leaves no trace."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator
from torch import Tensor

from selva.data.dataset import ListDataset
from selva.data.order import BucketBatchSampler
from selva.lora.state import lora_state_dict
from selva.training.rate_probe import PART, probe_rate, range_test
from selva.utils.distributed import World
from selva.utils.errors import UserError

DIM, RANK, STEPS = 24, 4, 300


class Regression:
    """A linear layer with an adapter that has to learn a change of rank 3 from noisy samples, four at a time."""

    def __init__(self, size: float, noise: float) -> None:
        self.noise = noise
        rng = torch.Generator().manual_seed(0)
        self.base = torch.randn(DIM, DIM, generator=rng) / DIM**0.5
        change = torch.randn(DIM, 3, generator=rng) @ torch.randn(3, DIM, generator=rng)
        self.target = self.base + size * change / DIM
        self.first = torch.randn(RANK, DIM, generator=rng) / DIM**0.5

    def fresh(self) -> list[Tensor]:
        return [self.first.clone().requires_grad_(), torch.zeros(DIM, RANK, requires_grad=True)]

    def batch(self, rng: torch.Generator, count: int = 4) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, DIM, generator=rng)
        return x, x @ self.target.T + self.noise * torch.randn(count, DIM, generator=rng)

    def loss(self, factors: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] @ (self.base + factors[1] @ factors[0]).T - batch[1]).square().mean()

    def trained(self, lr: float) -> float:
        """Return the loss on many samples after a training with this rate and a cosine."""
        factors, rng = self.fresh(), torch.Generator().manual_seed(5)
        optimizer = torch.optim.AdamW(factors, lr=lr, betas=CONFIG.betas, weight_decay=0.0)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / STEPS)) / 2 * min(1, (step + 1) / 10)
            optimizer.zero_grad()
            self.loss(factors, self.batch(rng)).backward()
            optimizer.step()
        with torch.no_grad():
            return self.loss(factors, self.batch(torch.Generator().manual_seed(77), 2000)).item()


def probed(problem: Regression) -> float:
    factors, rng = problem.fresh(), torch.Generator().manual_seed(9)
    fixed = [problem.batch(rng) for _ in range(4)]
    optimizer = torch.optim.AdamW([{"params": factors, "lr": 1.0}], betas=CONFIG.betas, weight_decay=0.0)
    return range_test(optimizer, [lambda own=own: problem.loss(factors, own) for own in fixed]).lr


@pytest.mark.parametrize(("size", "noise"), [(0.3, 0.3), (1.0, 0.3), (1.0, 1.0), (5.0, 0.3)])
def test_the_choice_is_about_the_best_of_a_grid(size, noise):
    """Within a factor of two, except of the largest change, for which all rates from 0.016 on are equally good."""
    problem = Regression(size, noise)
    losses = {lr: problem.trained(lr) for lr in (1e-3 * 2**power for power in range(9))}
    best, chosen = min(losses, key=losses.__getitem__), probed(problem)
    assert 1e-3 < best < 0.256  # not at an end of the grid
    assert size == 5 or best / 2 <= chosen <= 2 * best
    assert problem.trained(chosen) < losses[best] + 0.15 * (losses[1e-3] - losses[best])


def test_a_probe_is_repeatable_and_leaves_no_trace():
    config, clips = dataclasses.replace(CONFIG, batch_size=4, lr_probe=True), ListDataset(make_clips(6))
    generator = make_generator().train()
    before, state = lora_state_dict(generator), torch.get_rng_state()
    first = probe_rate(generator, clips, config, torch.float32, World())
    after = lora_state_dict(generator)
    assert all(torch.equal(before[key], after[key]) for key in before) and generator.training
    assert all(p.grad is None for p in generator.parameters()) and torch.equal(torch.get_rng_state(), state)
    assert probe_rate(generator, clips, dataclasses.replace(config, lr=7.0), torch.float32, World()) == first
    assert first.lr == PART * first.lowest_at and first.fallen > 0.05 and f"{first.steps} steps" in first.reason
    assert first.at_the_end and "still falling" in first.reason  # random weights bear any rate
    plus = probe_rate(generator, clips, dataclasses.replace(config, lora_plus_ratio=64.0), torch.float32, World())
    assert plus.fallen != first.fallen  # what B does with the rate counts too


def spoilt(clips, *numbers):
    """Return the clips, those of these numbers with latents that are not finite."""
    return ListDataset([dataclasses.replace(clip, mean=torch.full_like(clip.mean, math.nan)) if number in numbers
                        else clip for number, clip in enumerate(clips)])


def test_a_batch_whose_loss_is_not_finite_is_left_out(caplog):
    """A training leaves out its update; in the first round of the probe it was the end, and the rate 6e-6."""
    config, clips = dataclasses.replace(CONFIG, batch_size=1), make_clips(6)
    order = BucketBatchSampler(clips, 1, config.seed)
    drawn = [order.draw()[0].index for _ in range(5)]
    found = [probe_rate(make_generator(), spoilt(clips, drawn[place]), config, torch.float32, World())
             for place in (0, 3)]
    assert all(one.lr > 1e-3 and one.steps > 20 for one in found)
    names = [clips[drawn[place]].id for place in (0, 3)]
    assert all(f"the loss of {name} is not finite, so another batch is taken" in caplog.text for name in names)


def test_too_few_batches_to_measure_on_are_an_error():
    generator, clips = make_generator().train(), spoilt(make_clips(4), *range(4))
    with pytest.raises(UserError, match=r"the loss of 12 of 12 batches is not finite, expected at most 8; .*fp32"):
        probe_rate(generator, clips, dataclasses.replace(CONFIG, batch_size=2), torch.float32, World())
    assert generator.training


def test_gradients_that_are_not_finite_at_the_lowest_rates_are_an_error():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 1.0}])
    with pytest.raises(UserError, match=r"not finite after 1 step at rates from 1e-05 on.*--precision fp32"):
        range_test(optimizer, [lambda: (1 + weight.abs().sqrt()).sum()] * 4)  # whose slope at 0 is infinite
