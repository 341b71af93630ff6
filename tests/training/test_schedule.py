"""selva.training.schedule: the learning rate of every step."""

from __future__ import annotations

import dataclasses
import re

import pytest
from small_run import CONFIG

from selva.training.config import TrainConfig
from selva.training.schedule import learning_rate, multistep_rate, schedule_problem


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


def test_milestones_and_factor_of_ones_own():
    config = TrainConfig(lr=1.0, warmup_steps=2, steps=20, lr_schedule="multistep", lr_milestones=(10, 0.25),
                         lr_factor=0.5)
    assert [learning_rate(k, config) for k in (6, 7, 11, 12)] == [1.0, 0.5, 0.5, 0.25]
    assert schedule_problem(config) is None
    for wrong in ({"lr_milestones": (0.0,)}, {"lr_milestones": ()}, {"lr_factor": 0.0}, {"lr_factor": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(config, **wrong)


@pytest.mark.parametrize("steps, warmup, told", [
    (2000, 100, None), (1000, 100, "falls only once"), (500, 100, "never falls"), (300, 100, "never falls"),
    (2000, 600, "never falls"), (2000, 199, None), (2000, 200, "falls only once"),
])
def test_a_multistep_that_never_falls_is_told(steps, warmup, told):
    config = TrainConfig(lr=1.0, warmup_steps=warmup, steps=steps, lr_schedule="multistep")
    problem = schedule_problem(config)
    assert problem is None if told is None else told in problem
    falls = len({round(learning_rate(k, config), 6) for k in range(warmup, steps)}) - 1
    assert {None: 2, "falls only once": 1, "never falls": 0}[told] == falls
    assert schedule_problem(dataclasses.replace(config, lr_schedule="cosine")) is None


def test_the_warm_up_that_is_advised_is_one_that_helps():
    """Also for a few steps only, where there may be none."""
    advised = 0
    for steps in range(1, 40):
        for warmup in range(0, 12):
            config = TrainConfig(steps=steps, warmup_steps=warmup, lr_schedule="multistep")
            found = re.search(r"--warmup_steps below (-?\d+)", schedule_problem(config) or "")
            if found:
                advised += 1
                assert int(found[1]) > 0
                assert schedule_problem(dataclasses.replace(config, warmup_steps=int(found[1]) - 1)) is None
    assert advised > 100


def test_rates_of_mmaudio(golden):
    case = golden("base_training")
    schedule, training = case.config["schedule"], case.config["training"]
    steps = case.stored["schedule/step"].tolist()
    published = (schedule["learning_rate"], schedule["linear_warmup_steps"])
    for name, marks in (("learning_rate", schedule["lr_schedule_steps"]), ("constant", [])):
        rates = [multistep_rate(k, *published, marks) for k in steps]
        assert rates == pytest.approx(case.stored[f"schedule/{name}"].tolist(), rel=1e-12), name
    rates = [multistep_rate(k, training["learning_rate"], training["linear_warmup_steps"],
                            training["lr_schedule_steps"]) for k in range(5)]
    assert rates == pytest.approx(training["learning_rates"], rel=1e-12)
