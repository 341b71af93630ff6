"""Snapshots of averages: MMAudio's files, thinning, which of them an average is made of, constants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from selva.training.ema_snapshots import (
    choose,
    find_snapshots,
    interval_of,
    read_mmaudio_track,
    snapshot_interval,
    thin_snapshots,
    weighted_sum,
    write_snapshots,
)
from selva.training.power_ema import PowerEMA, synthesis_weights
from selva.utils.errors import UserError

MMAUDIO = Path(__file__).parents[1] / "golden" / "base_checkpoint"


def average_at(step: int, value: float = 0.0, **more) -> PowerEMA:
    parameters = {"moving": nn.Parameter(torch.full((2, 2), value)),
                  "fixed": nn.Parameter(torch.full((3,), 0.3), requires_grad=False)}
    average = PowerEMA(parameters, **more)
    average.update(step)
    return average


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def test_files_of_mmaudio_are_read(golden):
    found = find_snapshots(MMAUDIO)
    assert [(one.path.name, one.step, one.sigma_rel) for one in found] == [("0.5.pt", 5, 0.05), ("1.5.pt", 5, 0.1)]
    tensors = read_mmaudio_track(found[1].path)
    weights = golden("base_training").weights()
    assert tensors.keys() == weights.keys()
    assert all(x.shape == weights[name].shape for name, x in tensors.items())


def test_ours_have_the_layout_of_theirs(tmp_path):
    average = average_at(7, 0.5)
    assert write_snapshots(tmp_path / "ema_ckpts", average) == [tmp_path / "ema_ckpts" / f"{i}.7.pt" for i in (0, 1)]
    content = torch.load(tmp_path / "ema_ckpts" / "1.7.pt", weights_only=True)
    theirs = torch.load(MMAUDIO / "ema_ckpts" / "1.5.pt", weights_only=True)
    assert content["_extra_state"] == {"initted": True, "step": 7} and theirs["_extra_state"].keys() == {
        "initted", "step"}
    assert set(content) == {"_extra_state", "ema_model.moving", "ema_model.fixed"}
    assert {name.split(".")[0] for name in theirs} == {name.split(".")[0] for name in content}
    assert torch.equal(content["ema_model.fixed"], torch.full((3,), 0.3))
    (first, _) = find_snapshots(tmp_path)
    assert torch.equal(read_mmaudio_track(first.path)["moving"], torch.full((2, 2), 0.5))


def test_the_widths_are_those_of_the_run(tmp_path):
    write_snapshots(tmp_path, average_at(3, sigma_rels=(0.2, 0.02)))
    assert [one.sigma_rel for one in find_snapshots(tmp_path)] == [0.2, 0.02]
    (tmp_path / "tracks.json").write_text(json.dumps({"sigma_rels": [0.2]}))
    with pytest.raises(UserError, match="snapshots of track 1 but 1 width;"):
        find_snapshots(tmp_path)
    (tmp_path / "tracks.json").write_text("{}")
    with pytest.raises(UserError, match=r"tracks.json: damaged"):
        find_snapshots(tmp_path)


def test_no_snapshots(tmp_path):
    with pytest.raises(UserError, match="no snapshots of averages there"):
        find_snapshots(tmp_path)


@pytest.mark.parametrize("steps, interval", [(1, 1), (39, 1), (40, 1), (41, 2), (2000, 50), (300_000, 7500)])
def test_interval(steps, interval):
    assert snapshot_interval(steps) == interval


def test_thinning_depends_on_the_newest_step_alone(tmp_path):
    def run(folder: Path, first: int, last: int) -> None:
        for step in range(first, last + 1):
            write_snapshots(folder, average_at(step))
            thin_snapshots(folder, every=1, kept=4)

    run(tmp_path / "whole", 1, 11)
    run(tmp_path / "stopped", 1, 9)
    run(tmp_path / "stopped", 6, 11)  # resumed from an earlier step
    expected = [f"{track}.{step}.pt" for track in (0, 1) for step in (11, 4, 8)]
    assert names(tmp_path / "whole") == names(tmp_path / "stopped") == expected
    assert names(tmp_path / "whole") != []


def test_a_snapshot_that_is_being_read_is_deleted_later(tmp_path, monkeypatch, caplog):
    for step in range(1, 6):
        write_snapshots(tmp_path, average_at(step))
    unlink = Path.unlink

    def busy(path: Path, *args, **kwargs) -> None:
        if path.name == "0.1.pt":
            raise PermissionError(13, "is being used by another process", str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", busy)
    thin_snapshots(tmp_path, every=1, kept=4)
    assert names(tmp_path) == ["0.1.pt", "0.2.pt", "0.4.pt", "0.5.pt", "1.2.pt", "1.4.pt", "1.5.pt"]
    assert "0.1.pt: not deleted" in caplog.text
    monkeypatch.undo()
    assert [path.name for path in thin_snapshots(tmp_path, every=1, kept=4)] == ["0.1.pt"]


@pytest.mark.parametrize("steps, interval", [
    ([5], 5), ([5, 10], 5), ([5, 10, 12], 5), ([10, 20, 30, 35], 10),  # 12 and 35: at the end of a run
])
def test_the_distance_of_what_is_there(tmp_path, steps, interval):
    for step in steps:
        write_snapshots(tmp_path, average_at(step))
    assert interval_of(tmp_path) == interval


def test_a_tracked_average_is_its_snapshot(tmp_path):
    for step in (5, 10, 15):
        write_snapshots(tmp_path, average_at(step))
    found = find_snapshots(tmp_path)
    ((one, factor),) = choose(found, 0.1, 10)
    assert one.path.name == "1.10.pt" and factor == pytest.approx(1)
    assert [one.step for one, _ in choose(found, 0.05)] == [15]
    assert len(choose(found, 0.08)) > 2
    for step in (16, 0):
        with pytest.raises(UserError, match=f"--step {step}: the snapshots go up to step 15"):
            choose(found, 0.05, step)


def test_constants_stay_exactly_what_they_are():
    """Element by element: the first of x never changes. What the factors lack to 1 goes to the first part."""
    parts = [(Path(str(i)), {"x": torch.tensor([0.3, float(i)])}, factor) for i, factor in ((1, 0.7), (2, 0.4))]
    result = weighted_sum(parts)["x"]
    assert result[0] == torch.tensor(0.3) and result[1] == pytest.approx(1.4)


def test_a_value_that_stays_beside_the_noise_does_not_grow():
    """Few snapshots, whose factors sum to 1.005 and 0.979, of weights of value 3 with noise of deviation 0.1."""
    for width in (0.08, 0.15):
        parameter = nn.Parameter(torch.zeros(200))
        tracked, direct, parts = PowerEMA({"x": parameter}), PowerEMA({"x": parameter}, (width,)), []
        for step in range(1, 1001):
            parameter.data.copy_(3 + 0.1 * torch.randn(200))
            tracked.update(step)
            direct.update(step)
            if step % 200 == 0:
                parts += [(step, w, t["x"].clone()) for w, t in zip(tracked.sigma_rels, tracked.tracks, strict=True)]
        factors = synthesis_weights([(step, w) for step, w, _ in parts], 1000, width)
        result = weighted_sum([(Path(str(step)), {"x": x}, f) for (step, _, x), f in zip(parts, factors, strict=True)])
        error = (result["x"] - direct.average["x"]).square().mean().sqrt()
        assert abs(factors.sum() - 1) > 4e-3 and error < 1e-3  # 1.5e-2 and 6e-2 without


def test_one_snapshot_is_copied():
    x = torch.randn(10)
    assert torch.equal(weighted_sum([(Path("a"), {"x": x}, 1.01)])["x"], x)


@pytest.mark.parametrize("other", [{"y": torch.zeros(2)}, {"x": torch.zeros(3)}])
def test_snapshots_of_different_runs(other):
    with pytest.raises(UserError, match=r"[ab]: is of another run than [ab]: .* differ in name or shape"):
        weighted_sum([(Path("a"), {"x": torch.zeros(2)}, 0.6), (Path("b"), other, 0.4)])


def test_other_files_are_no_snapshots(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "0.5.pt")
    with pytest.raises(UserError, match=r"0\.5\.pt: not a snapshot"):
        read_mmaudio_track(tmp_path / "0.5.pt")
