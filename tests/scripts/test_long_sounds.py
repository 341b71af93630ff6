"""benchmarks/long_sounds.py: figures at the joins of long sounds and elsewhere."""

from __future__ import annotations

import json
import math

import pytest
import torch
from script_args import TINY

from benchmarks import long_sounds


def test_a_cut_shows_in_every_figure_and_steady_sound_in_none():
    """Noise that turns into a louder tone after 2 s."""
    noise = 0.01 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    tone = 0.1 * torch.sin(2 * math.pi * 440 * torch.arange(32_000) / 16_000)
    figures = long_sounds.seam_figures(torch.cat([noise, tone]), 16_000, [1.0, 2.0, 3.0])
    level, spectrum, onset = (figures[name] for name in long_sounds.MEASURES)
    assert level[1] == pytest.approx(20 - 3.01, abs=0.3) and max(level[0], level[2]) < 1
    assert spectrum[1] > 20 and max(spectrum[0], spectrum[2]) < 5
    assert onset[1] > 1 and max(onset[0], onset[2]) < 1


def test_a_small_comparison(tmp_path, capsys):
    out = tmp_path / "long.json"
    arguments = ["--duration", "2", "--window", "1.28", "--overlap", "0.32", "--num_steps", "2", "--num_seeds", "1"]
    assert long_sounds.main([*TINY, *arguments, "--output", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [row["method"] for row in rows] == ["windows", "one pass", "cut"] and rows[0]["joins"] == 2
    assert len({row["at_joins"]["level"] for row in rows}) == 3  # three different sounds


def test_a_clip_that_fits_a_window_has_no_joins(tmp_path, capsys):
    assert long_sounds.main([*TINY, "--duration", "8", "--output", str(tmp_path / "x.json")]) == 1
    assert "8 s is not longer than a window of 8 s" in capsys.readouterr().err
