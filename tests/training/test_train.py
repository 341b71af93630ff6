"""selva.training.train: the sentence about a run. What a run does is tested with the script and with the nodes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch

from selva.training import train as module
from selva.training.config import GeneratorModelConfig, RunConfig
from selva.training.run_folder import NotSaved
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


def test_a_run_that_could_not_be_saved_is_gone_with_its_error(tmp_path, monkeypatch):
    """Or a program around it would not get back what the run had on the device."""
    left = []

    def failing(*_):
        run = torch.ones(1)
        left.append(weakref.ref(run))
        raise NotSaved("no room")

    monkeypatch.setattr(module, "_train", failing)
    config = RunConfig(data_dir=[str(tmp_path)], output_dir=tmp_path / "out", model=GeneratorModelConfig(
        variant="tiny_16k", device="cpu"))
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(NotSaved):
            module.train(config)
        assert left[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("used", [True, False])
def test_the_peak_of_memory_is_that_of_the_run_not_of_those_before_it(tmp_path, monkeypatch, used):
    device, happened = torch.device("cuda", 1), []
    monkeypatch.setattr(module, "resolve_device", lambda name: device)
    monkeypatch.setattr(module, "resolve_precision", lambda name, device: name)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", happened.append)
    monkeypatch.setattr(module, "_train", lambda *_: happened.append("trained"))
    module.train(RunConfig(data_dir=[str(tmp_path)], output_dir=tmp_path / "out", precision="fp32",
                           model=GeneratorModelConfig(variant="tiny_16k")))
    assert happened == ([device] if used else []) + ["trained"]
