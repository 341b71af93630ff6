"""selva.training.condition_cache: the losses of the features, and no cache where an adapter changes the projections."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator

from selva.data.dataset import ClipWindow, ListDataset, collate
from selva.lora.config import LoRAConfig
from selva.training.condition_cache import ConditionCache, can_cache
from selva.training.objective import flow_loss, sample_noise

FP32 = torch.float32


def losses(model, batch, drop_video=False, drop_text=False, clip_features="use") -> torch.Tensor:
    noise = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    size = len(batch.mean)
    noise = dataclasses.replace(
        noise, drop_video=torch.tensor([drop_video] * size), drop_text=torch.tensor([False] * (size - 1) + [drop_text])
    )
    with torch.no_grad():
        return flow_loss(model, batch, noise, dataclasses.replace(CONFIG, clip_features=clip_features), FP32)


@pytest.mark.parametrize(
    "dropped", [{}, {"drop_video": True}, {"drop_text": True}, {"clip_features": "empty"}], ids=lambda d: str(d)
)
def test_the_loss_is_that_of_the_features(dropped):
    model, clips = make_generator(LoRAConfig(rank=2)).eval(), make_clips(3)
    cache = ConditionCache(model, ListDataset(clips), FP32)
    for _ in range(2):  # computed, then remembered
        found = losses(model, cache.load([ClipWindow(2, 0), ClipWindow(0, 0)]), **dropped)
        torch.testing.assert_close(found, losses(model, collate([clips[2], clips[0]]), **dropped))
    assert not torch.allclose(found, losses(model, collate([clips[1], clips[0]]), **dropped))


def test_sound_without_pictures_gets_the_empty_video():
    model, clips = make_generator(LoRAConfig(rank=2)).eval(), make_clips(2)
    nan = {"clip_f": torch.full_like(clips[1].clip_f, torch.nan), "sync_f": torch.full_like(clips[1].sync_f, torch.nan)}
    clips[1] = dataclasses.replace(clips[1], has_video=False, **nan)
    found = losses(model, ConditionCache(model, ListDataset(clips), FP32).load([ClipWindow(0, 0), ClipWindow(1, 0)]))
    torch.testing.assert_close(found, losses(model, collate(clips)))
    assert torch.isfinite(found).all()


def test_a_clip_is_read_once_and_does_not_depend_on_its_batch(monkeypatch):
    model, clips = make_generator(LoRAConfig(rank=2)).eval(), ListDataset(make_clips(3))
    read = []
    clip = clips.clip
    monkeypatch.setattr(clips, "clip", lambda index, window: read.append(index) or clip(index, window))
    cache = ConditionCache(model, clips, FP32)
    alone = cache.load([ClipWindow(1, 0)]).conditions
    batch = cache.load([ClipWindow(0, 0), ClipWindow(1, 0), ClipWindow(2, 0)]).conditions
    assert read == [1, 0, 2]
    again = ConditionCache(model, clips, FP32).load([ClipWindow(2, 0), ClipWindow(1, 0)]).conditions
    for one, three, two in zip(alone.tensors(), batch.tensors(), again.tensors(), strict=True):
        assert torch.equal(one[0], three[1]) and torch.equal(one[0], two[1])


@pytest.mark.parametrize(
    ("target", "expected"),
    [("attn.qkv", True), ("t_embed.mlp.0", True), ("text_input_proj.0", False), ("clip_cond_proj", False)],
)
def test_an_adapted_projection_is_not_remembered(target, expected):
    model = make_generator(LoRAConfig(rank=2, targets=(target,)))
    assert can_cache(model, ListDataset(make_clips()), FP32) is expected


def test_a_large_set_is_not_remembered(monkeypatch):
    model, clips = make_generator(), ListDataset(make_clips(4))
    cache = ConditionCache(model, clips, FP32)
    batch = cache.load([ClipWindow(i, 0) for i in range(4)])
    size = sum(x.nbytes for x in (*batch.conditions.tensors(), batch.mean, batch.std))
    monkeypatch.setattr("selva.training.condition_cache.MAX_BYTES", size)
    assert can_cache(model, clips, FP32)
    monkeypatch.setattr("selva.training.condition_cache.MAX_BYTES", size - 1)
    assert not can_cache(model, clips, FP32)
