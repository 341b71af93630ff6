"""Averages made after the training beside those that a run has tracked, of adapters and of generators."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_run
from torch import nn

from selva.checkpoint import load_adapter
from selva.training.ema_snapshots import write_snapshots
from selva.training.power_ema import PowerEMA
from selva.training.run_folder import RunFolder
from selva.training.synthesis import make_average
from selva.utils.errors import UserError
from selva.weights.load import read_checkpoint


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    """A run of 40 steps, and the adapter that its average of width 0.15 is."""
    folder = tmp_path_factory.mktemp("run")
    run = make_run(dataclasses.replace(CONFIG, steps=40, ema="power", ema_sigma_rel=(0.05, 0.1, 0.15)))
    tracked = run.ema
    out = RunFolder(folder, {"variant": "small"})
    out.open(None)
    for _ in range(40):
        run.train_step()
        out.save_averages(run)
    expected = {name: x.clone() for name, x in load_adapter(folder / "ema_ckpts" / "2.40.pt").tensors.items()}
    for path in folder.glob("ema_ckpts/2.*.pt"):
        path.unlink()
    assert len(tracked.tracks) == 3
    return folder, expected


def test_an_adapter_of_a_third_width(adapter_run, tmp_path):
    folder, expected = adapter_run
    made = make_average(folder, 0.15, tmp_path / "made.pt")
    adapter = load_adapter(made.path)
    assert made.adapter and (made.step, made.found) == (40, 80) and made.error < 1e-2
    assert (adapter.meta["step"], adapter.meta["sigma_rel"], adapter.meta["variant"]) == (40, 0.15, "small")
    other = load_adapter(folder / "ema_ckpts" / "1.40.pt").tensors
    for name, x in expected.items():
        between = (x - other[name]).norm()
        assert (adapter.tensors[name] - x).norm() <= 0.04 * between, name  # far nearer than the next width
    assert any((x - other[name]).norm() > 0 for name, x in expected.items())


def test_a_tracked_width_is_copied(adapter_run, tmp_path):
    folder, _ = adapter_run
    made = make_average(folder, 0.1, tmp_path / "made.safetensors", step=20)
    snapshot = load_adapter(folder / "ema_ckpts" / "1.20.pt").tensors
    found = load_adapter(made.path).tensors
    assert made.used == 1 and all(torch.equal(x, found[name]) for name, x in snapshot.items())


NAMES = ("latent_mean", "sync_pos_emb", "final_layer.conv.weight")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_generator_of_a_third_width(tmp_path, suffix):
    parameters = {name: nn.Parameter(torch.zeros(50), requires_grad=name != "latent_mean") for name in NAMES}
    parameters["latent_mean"].data.copy_(torch.randn(50))
    average, direct = PowerEMA(parameters), PowerEMA(parameters, (0.08,))
    for step in range(1, 201):
        for name in NAMES[1:]:
            parameters[name].data.copy_(torch.randn(50))
        average.update(step)
        direct.update(step)
        if step % 5 == 0:
            write_snapshots(tmp_path / "ema_ckpts", average)
    made = make_average(tmp_path, 0.08, tmp_path / f"made{suffix}")
    found = read_checkpoint(made.path)
    assert not made.adapter and made.found == 80 and made.error < 1e-3
    assert torch.equal(found["latent_mean"], parameters["latent_mean"])  # copied, not averaged
    for name in NAMES[1:]:
        torch.testing.assert_close(found[name], direct.average[name], atol=5e-4, rtol=0)
        assert (found[name] - average.average[name]).abs().max() > 1e-2


def test_nothing_is_overwritten(adapter_run, tmp_path):
    (tmp_path / "made.pt").write_bytes(b"work")
    with pytest.raises(UserError, match="is there already"):
        make_average(adapter_run[0], 0.15, tmp_path / "made.pt")
    assert (tmp_path / "made.pt").read_bytes() == b"work"


@pytest.mark.parametrize("sigma_rel, near, far", [(0.07, 1e-4, 0.05), (0.2, 1e-3, 0.2)])
def test_the_error_says_how_far_a_result_is_from_a_tracked_one(sigma_rel, near, far):
    from selva.training.power_ema import synthesis_error, synthesis_weights

    for count, least, most in ((100, 0, near * 10), (3, far / 10, far * 10)):
        places = [(i * 1000 // count, width) for i in range(1, count + 1) for width in (0.05, 0.1)]
        step = 1000
        error = synthesis_error(places, synthesis_weights(places, step, sigma_rel), step, sigma_rel)
        assert least <= error <= most
    # against the response of averages to single steps
    noise, places, values = torch.eye(300), [], []
    parameter = nn.Parameter(torch.zeros(300))
    tracked, direct = PowerEMA({"x": parameter}), PowerEMA({"x": parameter}, (sigma_rel,))
    for step in range(1, 301):
        parameter.data.copy_(noise[step - 1])
        tracked.update(step)
        direct.update(step)
        if step % 60 == 0:
            places += [(step, 0.05), (step, 0.1)]
            values += [track["x"].double().clone() for track in tracked.tracks]
    weights = synthesis_weights(places, 300, sigma_rel)
    result = sum(w * x for w, x in zip(weights, values, strict=True))
    measured = float((result - direct.average["x"]).norm() / direct.average["x"].norm())
    assert synthesis_error(places, weights, 300, sigma_rel) == pytest.approx(measured, rel=0.1)
