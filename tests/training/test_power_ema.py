"""Averages by power functions: the reference's numbers, synthesis beside direct tracking, exact resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from selva.training.power_ema import PowerEMA, decay, exponent, synthesis_weights
from selva.utils.errors import UserError

CASES = ("five_snapshots", "recipe_steps", "earlier_target", "forty_snapshots", "full_run")


@pytest.fixture(scope="module")
def case(golden):
    return golden("base_training")


def follow(values, sigma_rels, every=1, at=()):
    """Return {step: value of every track} of a parameter that takes these values one after the other."""
    parameter = nn.Parameter(torch.zeros(1))
    average, seen = PowerEMA({"x": parameter}, sigma_rels, every), {}
    for step, value in enumerate(values, 1):
        parameter.data.fill_(value)
        average.update(step)
        if step in at:
            seen[step] = [float(track["x"]) for track in average.tracks]
    return seen


def test_exponents_and_decays(case):
    widths = case.stored["ema/sigma_rel"]
    case.check("ema/gamma", torch.tensor([exponent(float(width)) for width in widths], dtype=torch.float64))
    steps = case.stored["ema/beta_step"]
    case.check("ema/beta", torch.tensor(
        [[decay(int(u), exponent(width)) for u in steps] for width in (0.05, 0.1)], dtype=torch.float64))


def test_tracks(case):
    steps = case.stored["ema/track_step"].tolist()
    seen = follow(case.inputs()["ema_sequence"].tolist(), (0.05, 0.1), at=steps)
    case.check("ema/tracked", torch.tensor([seen[step] for step in steps]).T)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sigma_rel", [0.05, 0.08, 0.15])
def test_synthesis(case, name, sigma_rel):
    config = case.config["ema"]["synthesis"][name]
    snapshots = list(zip(config["snapshot_steps"], config["snapshot_sigma_rel"], strict=True))
    weights = synthesis_weights(snapshots, config["target_step"], sigma_rel)
    case.check(f"ema/weights/{name}/{sigma_rel}", torch.from_numpy(weights))
    if f"ema/synthesised/{name}/{sigma_rel}" in case.stored:
        seen = follow(case.inputs()["ema_sequence"].tolist(), (0.05, 0.1), at=config["snapshot_steps"])
        values = [seen[step][0 if width == 0.05 else 1] for step, width in snapshots]
        case.check(f"ema/synthesised/{name}/{sigma_rel}", torch.tensor([float(np.dot(weights, values))]))


@pytest.mark.parametrize("sigma_rel, limit", [(0.08, 4e-5), (0.15, 8e-5)])
def test_a_third_width_is_what_tracking_it_gives(sigma_rel, limit):
    """The error is that of one step's noise of deviation 1, over many parameters."""
    noise = torch.randn(1000, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    parameter = nn.Parameter(torch.zeros(500))
    tracked, direct, snapshots = PowerEMA({"x": parameter}), PowerEMA({"x": parameter}, (sigma_rel,)), []
    for step in range(1, 1001):
        parameter.data.copy_(noise[step - 1])
        tracked.update(step)
        direct.update(step)
        if step % 25 == 0:
            snapshots += [(step, width, track["x"].double().clone())
                          for width, track in zip(tracked.sigma_rels, tracked.tracks, strict=True)]
    weights = synthesis_weights([(step, width) for step, width, _ in snapshots], 1000, sigma_rel)
    result = sum(w * values for w, (_, _, values) in zip(weights, snapshots, strict=True))
    error = (result - direct.average["x"]).square().mean().sqrt()
    assert 0 < error < limit


def test_only_one_in_so_many_updates_counts():
    """With one in 4, the average of a ramp is as far behind as with all; the published rule, step by step."""
    values, gamma, expected = list(range(1, 202)), exponent(0.1), 1.0
    for u in range(5, 202, 4):
        kept = ((1 - 1 / (u + 1)) ** (gamma + 1) * (1 - 1 / (u + 5)) ** (gamma + 1)) ** 2
        expected = kept * expected + (1 - kept) * u
    (sparse,) = follow(values, (0.1,), every=4, at=(201,))[201]
    (dense,) = follow(values, (0.1,), at=(201,))[201]
    assert sparse == pytest.approx(expected, rel=1e-5)
    assert sparse == pytest.approx(dense, rel=0.01)


def test_constants_are_not_averaged_and_kept():
    fixed, moving = nn.Parameter(torch.full((2,), 0.3), requires_grad=False), nn.Parameter(torch.zeros(2))
    average = PowerEMA({"fixed": fixed, "moving": moving})
    average.update(1)
    assert set(average.average) == {"moving"}
    assert torch.equal(average.values(1)["fixed"], fixed) and list(average.values(1)) == ["fixed", "moving"]


def test_restored_averages_go_on_exactly():
    parameter = nn.Parameter(torch.zeros(5))
    first = PowerEMA({"x": parameter})
    noise = torch.randn(20, 5)
    stored = None
    for step in range(1, 21):
        parameter.data.copy_(noise[step - 1])
        first.update(step)
        if step == 10:
            stored = {**first.state(), "tracks": [{k: v.clone() for k, v in track.items()} for track in first.tracks]}
    second = PowerEMA({"x": parameter})
    second.restore(stored)
    for step in range(second.step + 1, 21):
        parameter.data.copy_(noise[step - 1])
        second.update(step)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(first.tracks, second.tracks, strict=True))
    assert not torch.equal(first.tracks[0]["x"], first.tracks[1]["x"])


@pytest.mark.parametrize("widths", [(0.05,), (0.05, 0.1, 0.2), (0.05, 0.2)])
def test_stored_averages_of_other_widths_are_refused(widths):
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="the stored averages are of the widths"):
        PowerEMA({"x": parameter}, widths).restore(PowerEMA({"x": parameter}).state())


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_widths_that_no_power_function_has(width):
    with pytest.raises(UserError, match=r"more than 0 and at most 0.2887"):
        exponent(width)


def test_the_average_is_in_the_model_for_a_while():
    parameter = nn.Parameter(torch.zeros(1))
    average = PowerEMA({"x": parameter})
    average.update(1)
    parameter.data.fill_(1.0)
    with average.applied():
        assert parameter.item() == 0
    assert parameter.item() == 1
