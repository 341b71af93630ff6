"""scripts/make_ema.py: what it writes and says, and mistakes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from scripts import make_ema
from selva.training.ema_snapshots import write_snapshots
from selva.training.power_ema import PowerEMA


@pytest.fixture
def run_dir(tmp_path):
    """Snapshots of a run of 100 steps."""
    parameter = nn.Parameter(torch.zeros(20))
    average = PowerEMA({"final_layer.conv.bias": parameter})
    for step in range(1, 101):
        parameter.data.copy_(torch.randn(20))
        average.update(step)
        if step % 5 == 0:
            write_snapshots(tmp_path / "run" / "ema_ckpts", average)
    return tmp_path / "run"


def test_a_file_and_how_good_it_is(run_dir, capsys):
    output = run_dir.parent / "made.pth"
    assert make_ema.main([str(run_dir), "--sigma_rel", "0.08", "--step", "80", "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(output)
    assert torch.load(output, weights_only=True)["final_layer.conv.bias"].shape == (20,)
    assert re.search(r"generator of width 0.08 at step 80, from \d+ of 40 snapshots, 3.0e-03 away from one", said.err)
    assert "far from the snapshots" not in said.err


def test_a_width_far_from_the_tracks_is_told(run_dir, capsys):
    assert make_ema.main([str(run_dir), "--sigma_rel", "0.005", "--output", str(run_dir / "a.pth")]) == 0
    assert "far from the snapshots" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--sigma_rel", "0.5"], "--sigma_rel: the width of an average is 0.5, expected more than 0 and at most 0.2887"),
    (["--sigma_rel", "nan"], "the width of an average is nan"),
    (["--sigma_rel", "0.08", "--step", "101"], "--step 101: the snapshots go up to step 100"),
    (["--sigma_rel", "0.08", "--output", "a.bin"], "--output a.bin: a generator is written as .pth or .safetensors"),
])
def test_mistakes_are_one_line(run_dir, capsys, arguments, message):
    output = [] if "--output" in arguments else ["--output", str(run_dir / "a.pth")]
    assert make_ema.main([str(run_dir), *arguments, *output]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""


def test_a_folder_without_snapshots(tmp_path, capsys):
    assert make_ema.main([str(tmp_path), "--sigma_rel", "0.08", "--output", str(tmp_path / "a.pth")]) == 1
    assert "no snapshots of averages there" in capsys.readouterr().err
