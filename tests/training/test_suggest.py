"""selva.training.suggest: the number of clips and the memory decide."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from selva.data.folder import FolderClip
from selva.training import suggest
from selva.training.memory import StepMemory
from selva.training.suggest import Suggestion, _by_machine, _by_number, as_yaml, fitting

GIB = 2**30
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("count, expected", [
    (3, {"rank": 16, "steps": 1500, "val_fraction": 0.0}), (12, {"rank": 16, "steps": 1500, "val_fraction": 0.15}),
    (50, {"rank": 16, "steps": 2000}), (300, {"rank": 32, "steps": 10_000, "lr_schedule": "cosine"}),
])
def test_the_number_of_clips_decides(count, expected):
    found = {one.name: one.value for one in _by_number(count)}
    assert {name: found.get(name) for name in expected} == expected
    assert ("lr_schedule" in found) == (count >= 100) and ("patience" in found) == (5 <= count < 20)


@pytest.mark.parametrize("count, preset", [(12, "few_clips"), (300, "long_run")])
def test_the_presets_and_the_suggestions_say_the_same(count, preset):
    settings = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8"))
    found = {one.name: one.value for one in _by_number(count)}
    common = settings.keys() & found.keys() - {"save_every", "val_every"}  # four checkpoints, however long the run
    assert {name: settings[name] for name in common} == {name: found[name] for name in common} and len(common) > 2


@pytest.mark.parametrize("plain, recomputed, expected", [
    (9, 20, {"batch_size": 4}),
    (2, 8, {"batch_size": 4, "grad_checkpointing": True}),
    (0, 2, {"batch_size": 2, "grad_accum": 2, "grad_checkpointing": True}),
    (3, 3, {"batch_size": 3, "grad_accum": 2}),
])
def test_the_memory_decides(plain, recomputed, expected):
    found = fitting(4, lambda checkpointing: recomputed if checkpointing else plain, 8 * GIB, 8.0)
    assert {one.name: one.value for one in found} == expected


@pytest.mark.parametrize("seconds, several", [((8.0, 9.0, 8.0), False), ((8.0, 3.0, 8.0), True)])
def test_the_memory_is_that_of_graphs_of_all_lengths(monkeypatch, seconds, several):
    clips = [FolderClip(str(one), Path(), Path(), "", "features", "", "", one, (64, 1024), (192, 768), None, "")
             for one in seconds]
    asked = []
    monkeypatch.setattr(suggest, "step_memory", lambda *args, **more: asked.append(more) or StepMemory(0, 0, 0))
    _by_machine("small_16k", {"rank": 4}, 8 * GIB, clips)
    assert asked and all(one["graphs"] and one["several_lengths"] is several for one in asked)


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match=r"not even one clip fits into 2\.0 GiB"):
        fitting(4, lambda _: 0, 2 * GIB, 8.0)


def test_every_line_has_a_reason():
    text = as_yaml([Suggestion("data_dir", ["a b"], "three clips"), Suggestion("rank", 8, "few")])
    assert yaml.safe_load(text) == {"data_dir": ["a b"], "rank": 8}
    assert "rank: 8  # few" in text and "data_dir:  # three clips" in text
