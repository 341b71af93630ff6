"""selva.training.condition_cache: the losses of the features, and no cache where an adapter changes the projections."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator

from selva.data.dataset import ConcatDataset, ListDataset, NamedDataset, collate
from selva.data.order import ClipWindow, read_window
from selva.lora.config import LoRAConfig
from selva.training.condition_cache import ConditionCache, cache_bytes, can_cache
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


class Wordy(ListDataset):
    """Clips with three prompts each."""

    def num_prompts(self, index):
        return 3

    def prompt(self, index, number):
        return f"{number}", self.clips[index].text_f * (number + 1) + index


def test_a_clip_with_another_prompt_has_the_loss_of_that_prompt():
    model, clips = make_generator(LoRAConfig(rank=2)).eval(), Wordy(make_clips(3))
    cache = ConditionCache(model, clips, FP32)
    uses = [ClipWindow(2, 0, 1), ClipWindow(0, 0), ClipWindow(2, 0, 2), ClipWindow(1, 0, 1)]
    for _ in range(2):  # computed, then remembered
        found = losses(model, cache.load(uses))
        torch.testing.assert_close(found, losses(model, collate([read_window(clips, use) for use in uses])))
    alone = ConditionCache(model, clips, FP32).load(uses[2:3]).conditions
    for one, four in zip(alone.tensors(), cache.load(uses).conditions.tensors(), strict=True):
        assert torch.equal(one[0], four[2])


def test_the_room_for_prompts_is_counted(monkeypatch):
    model, clips = make_generator(), Wordy(make_clips(2))
    cache = ConditionCache(model, clips, FP32)
    cache.load([ClipWindow(index, 0, number) for index in range(2) for number in range(3)])
    rows = [x for *three, conditions, _ in cache._known.values() for x in (*three[:2], *conditions.tensors())]
    size = sum(x.nbytes for x in (*rows, *(x for text in cache._texts.values() for x in text)))
    assert cache_bytes(model, clips, FP32) == size


def test_a_clip_that_is_used_several_times_is_kept_once():
    model, clips = make_generator(), ListDataset(make_clips(2))
    often = ConcatDataset(NamedDataset(clips, "a").subset([0, 1, 0, 0]), ListDataset(make_clips(1)))
    cache = ConditionCache(model, often, FP32)
    cache.load([ClipWindow(index, 0) for index in range(5)])
    assert len(cache._known) == 3 and cache_bytes(model, often, FP32) == 3 * cache_bytes(model, clips, FP32) / 2
    batch, alone = cache.load([ClipWindow(3, 0)]), ConditionCache(model, clips, FP32).load([ClipWindow(0, 0)])
    assert all(map(torch.equal, batch.conditions.tensors(), alone.conditions.tensors()))


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
