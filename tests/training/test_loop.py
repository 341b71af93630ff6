"""selva.training.loop: rows, checkpoints, the best step, patience, and the reasons to stop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from device_behind import DeviceBehind
from small_run import CONFIG, make_clips, make_generator, make_run, spoil_latents

from selva.data.dataset import ListDataset
from selva.lora.config import LoRAConfig
from selva.training import loop
from selva.training.loop import fit
from selva.training.objective import validate
from selva.training.run import TrainingRun
from selva.utils.metrics_log import MetricsFile


def test_training_stops_when_no_gradient_is_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("selva.training.loop.MAX_BAD_STEPS", 4)
    run = make_run(dataclasses.replace(CONFIG, steps=50), val=0)
    spoil_latents(run)
    with pytest.raises(ValueError, match="last checkpoint is intact"):
        fit(run, MetricsFile(tmp_path / "m.jsonl"), on_checkpoint=lambda r: None, on_best=lambda r: None)


def test_training_lowers_the_loss_of_what_it_sees(tmp_path):
    """One clip can be learned by heart."""
    clips = make_clips(1)
    config = dataclasses.replace(CONFIG, steps=120, lr=2e-2, latent="mode", null_prob=0.0, log_every=50)
    clips = ListDataset(clips)
    generator = make_generator(LoRAConfig(rank=8, targets=("attn.qkv", "linear1", "ffn.w2")))
    run = TrainingRun(generator, clips, clips.subset([]), config, torch.float32)
    before = sum(validate(run.generator, clips, config, torch.float32))
    fit(run, MetricsFile(tmp_path / "m.jsonl"), on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert sum(validate(run.generator, clips, config, torch.float32)) < 0.7 * before


def test_the_best_step_is_reported_when_it_happens(tmp_path):
    run, best = make_run(), []
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    fit(run, metrics, on_checkpoint=lambda r: None, on_best=lambda r: best.append(r.step))
    steps, losses = metrics.series("val_loss")
    assert steps == [0, 3, 6]
    lowest = float("inf")
    expected = []
    for step, loss in zip(steps, losses, strict=True):
        if loss < lowest:
            lowest = loss
            expected += [step] if step else []
    assert best == expected and run.best_val_loss == lowest


def fake_validations(monkeypatch, losses):
    values = iter(losses)
    monkeypatch.setattr("selva.training.run.validate", lambda *args: [next(values)])


def test_a_model_that_cannot_see_the_held_out_clips_is_not_trained(monkeypatch):
    fake_validations(monkeypatch, [float("nan")])
    run = make_run()
    with pytest.raises(ValueError, match="not finite before the first step"):
        fit(run, MetricsFile(), on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert run.step == 0


def test_patience_ends_the_run_and_saves(tmp_path, monkeypatch, caplog):
    fake_validations(monkeypatch, [3.0, 2.0, 2.5, 2.4, 2.3])
    run, saved = make_run(dataclasses.replace(CONFIG, steps=50, val_every=2, patience=2, save_every=100)), []
    caplog.set_level("INFO", "selva")
    assert fit(run, MetricsFile(), on_checkpoint=lambda r: saved.append(r.step), on_best=lambda r: None)
    assert run.step == 6 and saved == [6] and run.best_step == 2 and "no better validation loss" in caplog.text


@pytest.mark.parametrize("learns", [True, False])
def test_overfitting_is_said_with_the_step_to_go_back_to(monkeypatch, caplog, learns):
    """Held-out clips get worse: overfitting only if the training loss falls meanwhile."""
    fake_validations(monkeypatch, [3.0, 2.0, 2.1, 2.2, 2.3, 2.4])
    run = make_run(dataclasses.replace(CONFIG, steps=10, val_every=2))
    losses = iter(range(10, 0, -1) if learns else range(1, 11))

    def step():
        run.step += 1
        return torch.tensor(float(next(losses))), torch.tensor(1.0)

    monkeypatch.setattr(run, "train_step", step)
    fit(run, MetricsFile(), on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert ("overfitting" in caplog.text and "go back to step 2" in caplog.text) is learns


def test_rows_and_checkpoints_come_at_their_steps(tmp_path):
    run, saved = make_run(dataclasses.replace(CONFIG, steps=7)), []
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert fit(run, metrics, on_checkpoint=lambda r: saved.append(r.step), on_best=lambda r: None)
    assert saved == [3, 6, 7] and metrics.series("loss")[0] == list(range(1, 8))
    assert MetricsFile(metrics.path).rows == metrics.rows


def test_the_seconds_of_steps_count_the_wait_for_the_device(monkeypatch, caplog):
    run, metrics, told = make_run(dataclasses.replace(CONFIG, steps=7)), MetricsFile(), []
    monkeypatch.setattr(loop, "time", DeviceBehind(monkeypatch, run))
    caplog.set_level("INFO", "selva")
    fit(run, metrics, on_checkpoint=lambda r: None, on_best=lambda r: None,
        more=lambda run, steps, seconds: told.append((steps, seconds)) or {})
    assert metrics.series("sec_per_step") == (list(range(1, 8)), [1.0] * 7)
    assert sum(steps for steps, _ in told) == 7 and all(steps == seconds for steps, seconds in told)
    assert "1.00 s/step, 3 s left" in caplog.text


def test_stopping_saves_first(tmp_path):
    """Pitfall F8: whatever was done since the last checkpoint."""
    run, saved = make_run(dataclasses.replace(CONFIG, steps=50)), []
    finished = fit(run, MetricsFile(tmp_path / "m.jsonl"), on_checkpoint=lambda r: saved.append(r.step),
                   on_best=lambda r: None, should_stop=lambda: run.step >= 4)
    assert not finished and saved == [3, 4] and run.step == 4


@pytest.mark.parametrize("resumed", [False, True])
def test_overfitting_is_seen_whatever_the_log_interval_is(monkeypatch, caplog, resumed):
    """Three validations before the first log line; and in a run whose metrics begin after its best step."""
    fake_validations(monkeypatch, [3.0, 2.0, 2.1, 2.2, 2.3, 2.4])
    run = make_run(dataclasses.replace(CONFIG, steps=10, val_every=2, log_every=100))
    if resumed:
        run.step, run.best_step, run.best_val_loss = 2, 2, 1.0
    losses = iter(range(10, 0, -1))

    def step():
        run.step += 1
        return torch.tensor(float(next(losses))), torch.tensor(1.0)

    monkeypatch.setattr(run, "train_step", step)
    metrics = MetricsFile()
    fit(run, metrics, on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert "go back to step 2" in caplog.text
    assert metrics.series("loss")[0] == list(range(3 if resumed else 1, 11))


def test_rows_are_complete_at_every_step_file(tmp_path):
    """Else a run that is killed and resumed has a hole in its metrics."""
    run, seen = make_run(dataclasses.replace(CONFIG, log_every=100)), []
    metrics = MetricsFile()
    fit(run, metrics, on_checkpoint=lambda r: seen.append((r.step, metrics.last_step)), on_best=lambda r: None)
    assert seen == [(3, 3), (6, 6)]


def test_a_run_whose_patience_has_ended_does_not_go_on():
    run = make_run(dataclasses.replace(CONFIG, patience=2))
    run.step, run.worse_in_a_row = 3, 2
    assert fit(run, MetricsFile(), on_checkpoint=lambda r: None, on_best=lambda r: None) and run.step == 3
