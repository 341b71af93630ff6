"""Watching what is learned by heart, and whether the adapter does anything at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator

from selva.data.dataset import ListDataset
from selva.lora.config import LoRAConfig
from selva.lora.layers import lora_layers
from selva.lora.state import adapter_off, lora_state_dict
from selva.training.loop import fit
from selva.training.memorisation import Watch, area_under_curve, spread
from selva.training.objective import clip_losses
from selva.training.run import TrainingRun
from selva.utils.metrics_log import MetricsFile


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    assert area_under_curve([2, 3], [0, 1]) == 1 and area_under_curve([0], [1, 2]) == 0
    assert area_under_curve([1, 1], [1]) == 0.5 and area_under_curve([0, 2], [1]) == 0.5
    assert area_under_curve([1, 4], [0, 2, 3]) == pytest.approx(4 / 6)


def test_numbers_are_spread_over_all():
    assert spread(10, 4) == [0, 3, 6, 9] and spread(2, 4) == [0, 1] and spread(5, 1) == [0] and spread(0, 3) == []


@pytest.mark.parametrize("lora", [
    LoRAConfig(rank=2, dropout=0.1), LoRAConfig(rank=2, init="pissa"), LoRAConfig(rank=2, dora=True),
])
def test_with_the_adapter_off_the_base_model_speaks(lora):
    clips = ListDataset(make_clips(2))
    generator = make_generator(lora)
    fresh = clip_losses(generator, clips, CONFIG, torch.float32)
    with torch.no_grad():
        for _, layer in lora_layers(generator):
            for name in layer.lora_names():
                if not name.endswith("0"):  # start values are never trained
                    layer.get_parameter(name).add_(0.1)
    held = lora_state_dict(generator)
    moved = clip_losses(generator, clips, CONFIG, torch.float32)
    with adapter_off(generator):
        assert torch.equal(clip_losses(generator, clips, CONFIG, torch.float32), fresh)
    assert not torch.equal(moved, fresh)
    assert torch.equal(clip_losses(generator, clips, CONFIG, torch.float32), moved)
    assert all(torch.equal(value, held[key]) for key, value in lora_state_dict(generator).items())


def test_an_adapter_that_does_nothing_is_told_once_after_the_warm_up(caplog):
    clips = make_clips(5)
    watch = Watch(make_generator(), ListDataset(clips[1:]), ListDataset(clips[:1]), CONFIG, torch.float32)
    held_out = clip_losses(watch.generator, watch.val_clips, CONFIG, torch.float32)
    row = watch.row(CONFIG.warmup_steps, held_out)
    assert row == {"train_drop": 0, "val_drop": 0, "member_auc": 0.5, "velocity_change": 0}
    assert "no effect" not in caplog.text
    watch.row(CONFIG.warmup_steps + 1, held_out)
    watch.row(CONFIG.warmup_steps + 2, held_out)
    assert caplog.text.count("the adapter has no effect") == 1


def test_clips_that_are_learned_by_heart_are_told_from_others(caplog):
    """Noise that nothing predicts can only be learned by heart."""
    clips = make_clips(6)
    train, held_out = ListDataset(clips[:2]), ListDataset(clips[2:])
    config = dataclasses.replace(CONFIG, steps=60, lr=2e-2, latent="mode", null_prob=0.0, val_every=60,
                                 timestep_mode="logit_normal")  # the middle levels, where most can be learned by heart
    generator = make_generator(LoRAConfig(rank=8, targets=("attn.qkv", "linear1", "ffn.w2")))
    run = TrainingRun(generator, train, held_out, config, torch.float32)
    run.watch = Watch(generator, train, held_out, config, torch.float32)
    metrics = MetricsFile()
    fit(run, metrics, on_checkpoint=lambda r: None, on_best=lambda r: None)
    first, last = (next(row for row in rows if "train_drop" in row) for rows in (metrics.rows, metrics.rows[::-1]))
    assert first["step"] == 0 and first["train_drop"] == 0
    assert last["step"] == 60 and last["train_drop"] > 0.1 and last["train_drop"] > 2 * last["val_drop"]
    assert last["member_auc"] == 1 and last["velocity_change"] > 1e-3 and "no effect" not in caplog.text
