"""selva.training.suggest: the number of clips and the memory decide."""

from __future__ import annotations

import pytest
import yaml

from selva.training.suggest import Suggestion, _by_number, as_yaml, fitting

GIB = 2**30


@pytest.mark.parametrize("count, expected", [
    (3, {"rank": 8, "val_fraction": 0.0}), (12, {"rank": 8, "lora_dropout": 0.1, "val_fraction": 0.15}),
    (50, {"rank": 16, "steps": 2000}), (300, {"rank": 32, "ema_decay": 0.999, "lr_schedule": "cosine"}),
])
def test_the_number_of_clips_decides(count, expected):
    found = {one.name: one.value for one in _by_number(count)}
    assert {name: found.get(name) for name in expected} == expected
    assert ("lora_dropout" in found) == (count < 20) and ("patience" in found) == (count >= 5)


@pytest.mark.parametrize("plain, recomputed, expected", [
    (9, 20, {"batch_size": 4}),
    (2, 8, {"batch_size": 4, "grad_checkpointing": True}),
    (0, 2, {"batch_size": 2, "grad_accum": 2, "grad_checkpointing": True}),
    (3, 3, {"batch_size": 3, "grad_accum": 2}),
])
def test_the_memory_decides(plain, recomputed, expected):
    found = fitting(4, lambda checkpointing: recomputed if checkpointing else plain, 8 * GIB, 8.0)
    assert {one.name: one.value for one in found} == expected


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match=r"not even one clip fits into 2\.0 GiB"):
        fitting(4, lambda _: 0, 2 * GIB, 8.0)


def test_every_line_has_a_reason():
    text = as_yaml([Suggestion("data_dir", ["a b"], "three clips"), Suggestion("rank", 8, "few")])
    assert yaml.safe_load(text) == {"data_dir": ["a b"], "rank": 8}
    assert "rank: 8  # few" in text and "data_dir:  # three clips" in text
