"""Adapter settings, target presets and their texts on the command line."""

from __future__ import annotations

import math

import pytest

from selva.lora import (
    LoRAConfig,
)


@pytest.mark.parametrize(
    ("cfg", "scale"),
    [
        (LoRAConfig(rank=4), 1.0),
        (LoRAConfig(rank=4, alpha=8), 2.0),
        (LoRAConfig(rank=4, alpha=8, rslora=True), 4.0),
        (LoRAConfig(rank=64, rslora=True), 2.0),  # alpha 16
    ],
)
def test_scale(cfg, scale):
    assert cfg.scale() == scale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"alpha": math.nan}, "alpha must be a positive number"),
        ({"targets": "attn.qkv"}, "targets must be a list"),
        ({"targets": ()}, "targets must be a list"),
        ({"targets": ("",)}, "targets must be a list"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "svd"}, "init must be one of standard, pissa"),
        ({"init": "pissa", "alpha": 8}, "scale 1"),
        ({"init": "pissa", "rslora": True, "rank": 4}, "scale 1"),
        ({"target_ranks": {"linear1": 4}}, "not among the targets"),
        ({"target_ranks": {"attn.qkv": 0}}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"rank .*; dropout"):
        LoRAConfig(rank=-1, dropout=2.0)


@pytest.mark.parametrize(
    "cfg",
    [
        LoRAConfig(),
        LoRAConfig(rank=8, alpha=3.0, targets=("a", "b"), dropout=0.1, rslora=True, target_ranks={"b": 2}),
        LoRAConfig(init="pissa"),
    ],
)
def test_settings_survive_the_meta(cfg):
    assert LoRAConfig.from_meta({"rank": 99, "lora_config": cfg.to_dict()}) == cfg


def test_settings_are_read_from_a_published_meta():
    meta = {"rank": 4, "alpha": 8.0, "target": ["attn.qkv"], "use_rslora": True, "lora_dropout": 0.1, "steps": 3}
    assert LoRAConfig.from_meta(meta) == LoRAConfig(4, 8.0, ("attn.qkv",), dropout=0.1, rslora=True)
    with pytest.raises(ValueError, match="no alpha, target"):
        LoRAConfig.from_meta({"rank": 4})


def test_the_longest_matching_target_gives_the_rank():
    cfg = LoRAConfig(rank=9, targets=("qkv", "text_block.attn.qkv"), target_ranks={"qkv": 2, "text_block.attn.qkv": 5})
    assert (cfg.rank_of("b.text_block.attn.qkv"), cfg.rank_of("b.latent_block.attn.qkv")) == (5, 2)


