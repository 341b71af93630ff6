"""The verdict: which word follows from which figures, what it costs, and which prompts are foreign."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_run import CONFIG

from selva.training import verdict
from selva.training.verdict import (
    ADVICE,
    PLANS,
    Verdict,
    VerdictFigures,
    drawn_towards,
    foreign_prompts,
    judge,
    plan_verdict,
)

GOOD = VerdictFigures(held_out=True, num_clips=4, moved_db=12.0, nearer_db=5.0, onset_f1_before=0.5, onset_f1_after=0.8,
                      foreign_moved_db=4.0, train_drop=0.3, val_drop=0.25, velocity_change=0.4, foreign_drawn=0.05)


@pytest.mark.parametrize(("change", "word"), [
    ({}, "learned"),
    ({"velocity_change": 5e-4}, "hardly any effect"),
    ({"silent_after": 4, "moved_db": None}, "is silent"),
    ({"silent_after": 3}, "learned"),
    ({"moved_db": 0.5}, "hardly any effect"),
    ({"train_drop": -0.1, "val_drop": -0.2}, "got worse"),
    ({"val_drop": 0.05}, "learned by heart"),
    ({"val_drop": -0.1}, "learned by heart"),
    ({"foreign_moved_db": 14.0}, "learned"),  # another sound of the same kind, at other moments
    ({"foreign_drawn": 0.3}, "has taken over"),
    ({"foreign_drawn": -0.3}, "learned"),
    ({"foreign_drawn": 0.3, "val_drop": 0.0}, "learned by heart"),
    ({"held_out": False, "val_drop": None}, "learned"),
    ({"moved_db": None, "nearer_db": None, "foreign_moved_db": None, "foreign_drawn": None}, "learned"),
])
def test_figures_lead_to_a_word(change, word):
    figures = dataclasses.replace(GOOD, **change)
    assert judge(figures) == word
    line = Verdict(word, ADVICE[word], figures, (), (), 0.0).line()
    assert line.startswith(f"verdict: {word}: 4 ") and "\n" not in line
    assert ("; try " in line) is (word != "learned")
    assert ("nothing was held out" in line) is (figures.val_drop is None)


def test_silent_sounds_are_counted_and_named(caplog):
    rng = torch.Generator().manual_seed(2)
    noise, nothing = 0.1 * torch.randn(16_000, generator=rng), torch.zeros(16_000)
    heard = [verdict.HeardClip("a", "rain", 16_000, noise, nothing, noise),
             verdict.HeardClip("b", "rain", 16_000, nothing, noise, noise)]
    row = {"train_drop": 0.3, "val_drop": 0.3, "velocity_change": 0.4}
    for clips, silent, word in ((heard[:1], 1, "is silent"), (heard, 1, "learned"), (heard[1:], 0, "learned")):
        figures = verdict._figures(clips, heard, row, True)
        assert figures.silent_after == silent and figures.moved_db is None and judge(figures) == word
    verdict._warn_of_silence(heard)
    assert [line.split("silent sounds, made ")[1] for line in caplog.messages] == [
        "without the adapter: b", "with the adapter: a"]


def test_the_line_holds_the_figures():
    line = Verdict("learned", "", dataclasses.replace(GOOD, nearer_db=-2.0), (), (), 0.0).line()
    assert line == ("verdict: learned: 4 held-out clips moved 12.0 dB, 2.0 dB further from the recordings, onset F1 "
                    "0.50 -> 0.80, foreign prompts moved 4.0 dB, 5 % of their way to the taught sound, loss of "
                    "training clips -30.0 %, of held-out clips -25.0 %")


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


def test_foreign_sounds_are_drawn_to_the_taught_one_whenever_it_comes():
    """Noise in the upper band is taught; one in the lower band is foreign."""
    rate, rng = 16_000, torch.Generator().manual_seed(1)

    def noise(low, high, gain=0.1, begin=0):
        spectrum = torch.fft.rfft(torch.randn(2 * rate, generator=rng))
        hz = torch.fft.rfftfreq(2 * rate, 1 / rate)
        sound = gain * torch.fft.irfft(torch.where((hz >= low) & (hz < high), spectrum, 0))
        return torch.cat((torch.zeros(begin), sound))[: 2 * rate]

    taught, foreign = [noise(4000, 6000), noise(4000, 6000, 0.02, 8000)], noise(500, 1000)
    same = drawn_towards(taught, [(foreign, noise(500, 1000, 0.3, 6000))], rate)
    became = drawn_towards(taught, [(foreign, noise(4000, 6000, 0.3, 6000))], rate)
    both = drawn_towards(taught, [(foreign, noise(500, 6000))], rate)
    assert same is not None and became is not None and both is not None
    assert abs(same) < 0.05 and became > 0.9 and 0.1 < both < 0.9
    further = drawn_towards(taught, [(noise(2000, 3000), foreign)], rate)
    assert further is not None and further < 0
    silence = torch.zeros(rate)
    assert drawn_towards([silence], [(foreign, foreign)], rate) is None
    assert drawn_towards(taught, [(foreign, silence)], rate) is None
