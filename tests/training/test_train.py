"""selva.training.train: the sentence about a run. What a run does is tested with the script and with the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from selva.training.train import TrainingResult

BEST = Path("run/adapter_best.pt")


FELL = "the loss of the held-out clips fell from 0.9000 to "


@pytest.mark.parametrize("losses, best, verdict", [
    ((), None, "no clips were held out, so listen to the samples to judge it"),
    (((0, 0.9), (3, 0.7), (9, 0.8)), BEST, f"{FELL}0.7000 at step 3, kept as adapter_best.pt"),
    (((0, 0.9), (3, 0.7), (9, 0.8)), None, f"{FELL}0.7000 at step 3"),
    (((0, 0.9), (9, 0.8)), BEST, f"{FELL}0.8000 at step 9"),
    (((0, 0.6), (9, 0.8)), None, "the loss of the held-out clips never fell below the 0.6000 at step 0"),
])
def test_the_verdict_says_how_it_went(losses, best, verdict):
    result = TrainingResult(Path("run/adapter_final.pt"), None, 9, losses, best)
    assert result.verdict == f"trained to step 9; {verdict}"
