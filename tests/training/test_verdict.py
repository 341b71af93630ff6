"""The verdict: which word follows from which figures, what it costs, and which prompts are foreign."""

from __future__ import annotations

import dataclasses
import math

import pytest
from small_run import CONFIG

from selva.training.verdict import ADVICE, PLANS, Verdict, VerdictFigures, foreign_prompts, judge, plan_verdict

GOOD = VerdictFigures(held_out=True, num_clips=4, moved_db=12.0, nearer_db=5.0, onset_f1_before=0.5, onset_f1_after=0.8,
                      foreign_moved_db=4.0, train_drop=0.3, val_drop=0.25, velocity_change=0.4)


@pytest.mark.parametrize(("change", "word"), [
    ({}, "learned"),
    ({"velocity_change": 5e-4}, "hardly any effect"),
    ({"moved_db": 0.5}, "hardly any effect"),
    ({"train_drop": -0.1, "val_drop": -0.2}, "got worse"),
    ({"val_drop": 0.05}, "learned by heart"),
    ({"val_drop": -0.1}, "learned by heart"),
    ({"foreign_moved_db": 11.0}, "has taken over"),
    ({"foreign_moved_db": 11.0, "val_drop": 0.0}, "learned by heart"),
    ({"held_out": False, "val_drop": None}, "learned"),
    ({"moved_db": None, "nearer_db": None, "foreign_moved_db": None}, "learned"),
])
def test_figures_lead_to_a_word(change, word):
    figures = dataclasses.replace(GOOD, **change)
    assert judge(figures) == word
    line = Verdict(word, ADVICE[word], figures, (), (), 0.0).line()
    assert line.startswith(f"verdict: {word}: 4 ") and "\n" not in line
    assert ("; try " in line) is (word != "learned")
    assert ("nothing was held out" in line) is (figures.val_drop is None)


def test_the_line_holds_the_figures():
    line = Verdict("learned", "", dataclasses.replace(GOOD, nearer_db=-2.0), (), (), 0.0).line()
    assert line == ("verdict: learned: 4 held-out clips moved 12.0 dB, 2.0 dB further from the recordings, onset F1 "
                    "0.50 -> 0.80, foreign prompts moved 4.0 dB, loss of training clips -30.0 %, of held-out clips "
                    "-25.0 %")


def test_a_verdict_costs_less_than_a_share_of_the_training():
    long, medium = (dataclasses.replace(CONFIG, steps=steps, batch_size=4) for steps in (2000, 400))
    plan = plan_verdict(long, 10, 0.1)
    assert plan is not None and (plan.num_clips, plan.num_steps) == PLANS[0] and 0 < plan.share < 0.1
    smaller = plan_verdict(medium, 10, 0.1)
    assert smaller is not None and (smaller.num_clips, smaller.num_steps) in PLANS[1:] and smaller.share < 0.1
    assert plan_verdict(CONFIG, 10, 0.1) is None  # six steps
    assert plan_verdict(CONFIG, 1, math.inf).num_clips == 1
    assert plan_verdict(long, 10, 0.1, recomputes=True).share == pytest.approx(plan.share * 3 / 4)


def test_foreign_prompts_are_those_to_preserve_and_never_what_is_taught():
    many = [f"sound {i}" for i in range(20)]
    assert foreign_prompts(many, ["a gong"]) == [many[i] for i in (0, 5, 10, 14, 19)]
    found = foreign_prompts(["a gong"], ["a big bell", "Dog"])
    assert len(found) == 5 and found[0] == "a gong" and not any("bell" in prompt for prompt in found)
