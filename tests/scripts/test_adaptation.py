"""A new sound can be taught to the built-in model: the adaptation figure of the benchmark at a reduced size."""

from __future__ import annotations

import json

import pytest

from benchmarks import tiny_quality


@pytest.mark.slow
def test_a_gong_is_learned_and_nothing_else_forgotten(tmp_path):
    assert tiny_quality.main([
        "--only", "adaptation", "--sounds", "gong", "--clips", "12", "--count", "2", "--output",
        str(tmp_path / "figures.json"), "--document", str(tmp_path / "model.md"), "--device", "cpu",
    ]) == 0
    gong = json.loads((tmp_path / "figures.json").read_text())["adaptation"]["gong"]
    # Six scenes of a gong and twenty of what it knew: wide margins around the goals of docs/tiny_model.md.
    assert gong["before"]["class_accuracy"] <= 0.2
    assert gong["after"]["class_accuracy"] >= 0.5
    assert gong["after"]["timing_f1"] >= gong["before"]["timing_f1"] - 0.2
    assert gong["known_after"]["class_accuracy"] >= gong["known_before"]["class_accuracy"] - 0.3
    assert gong["strength_0_is_the_base_model"]
