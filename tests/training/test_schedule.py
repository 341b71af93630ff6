"""selva.training.schedule: the learning rate of every step."""

from __future__ import annotations

import dataclasses

import pytest
from small_run import CONFIG

from selva.training.config import TrainConfig
from selva.training.schedule import learning_rate


def test_warm_up_starts_above_zero_and_ends_at_the_rate():
    """Pitfall F1."""
    config = dataclasses.replace(CONFIG, lr=1.0, warmup_steps=4)
    assert [learning_rate(k, config) for k in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


SCHEDULES = {
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "cosine": [0.5, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381],
    "cosine_restarts": [0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0, 0.8536, 0.5, 0.1464],
    "multistep": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    config = TrainConfig(lr=1.0, warmup_steps=1, steps=9, lr_schedule=schedule, lr_cycles=2)
    assert [learning_rate(k, config) for k in range(9)] == pytest.approx(SCHEDULES[schedule], abs=1e-4)


def test_multistep_is_that_of_the_base_model():
    """MMAudio: 300 000 updates, 1000 of warm-up, a tenth at 240 000 and again at 270 000 counted after it."""
    config = TrainConfig(lr=1.0, warmup_steps=1000, steps=300_000, lr_schedule="multistep")
    found = [learning_rate(k, config) for k in (0, 999, 1000, 240_999, 241_000, 270_999, 271_000)]
    assert found == pytest.approx([1 / 1001, 1000 / 1001, 1.0, 1.0, 0.1, 0.1, 0.01])
