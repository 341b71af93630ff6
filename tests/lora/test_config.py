"""Adapter settings, target presets and their texts on the command line."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from selva.lora.config import PRESETS, LoRAConfig, expand_targets, no_match_message, parse_targets
from selva.lora.inject import inject_lora
from selva.models.generator import Generator
from selva.models.variants import VARIANTS


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
    """Pitfall E3: alpha is the rank, and with rsLoRA a fixed 16, so that the update does not grow with the rank."""
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
        ({"target_ranks": {"linear1": 4}}, "not among the targets"),
        ({"target_ranks": {"attn.qkv": 0}}, "at least 1"),
        ({"target_ranks": {"attn": 4}}, r"target_ranks names 'linear1', which is not among"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_pissa_starts_with_scale_1_only():
    """Pitfall E2; a published PiSSA training with another scale may be continued."""
    assert LoRAConfig(init="pissa").start_problem() is None
    for settings in ({"alpha": 8}, {"rslora": True, "rank": 4}):
        assert "scale 1" in LoRAConfig(init="pissa", **settings).start_problem()


def test_the_flags_of_settings():
    cfg = LoRAConfig(8, 3.0, ("a", "b"), rslora=True, init="pissa", dora=True, target_ranks={"b": 2})
    assert cfg.flags() == "--rank 8 --alpha 3 --rslora --init pissa --dora --target a b:2"


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"rank .*; dropout"):
        LoRAConfig(rank=-1, dropout=2.0)


@pytest.mark.parametrize(
    "cfg",
    [
        LoRAConfig(),
        LoRAConfig(rank=8, alpha=3.0, targets=("a", "b"), dropout=0.1, rslora=True, target_ranks={"b": 2}),
        LoRAConfig(init="pissa"),
        LoRAConfig(targets=("attn", "w1"), target_ranks={"attn": 2, "linear1": 3}, dora=True),
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


def test_settings_of_a_newer_version_are_not_ignored():
    stored = {**LoRAConfig().to_dict(), "spectral": True}
    with pytest.raises(ValueError, match="settings unknown here: spectral"):
        LoRAConfig.from_meta({"lora_config": stored})


# -- presets ----------------------------------------------------------------------------------------------------------


def layer_kinds(variant: str) -> dict[str, type]:
    """Return the class of every linear layer and convolution of a generator by name."""
    with torch.device("meta"):
        model = Generator(VARIANTS[variant].generator)
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_preset_can_never_be_taken_for_an_ending(variant):
    assert not [name for name in layer_kinds(variant) if name.endswith(tuple(PRESETS))]


def test_presets_become_endings_each_once_and_in_order():
    assert expand_targets(["attn"]) == ("attn.qkv", "linear1")
    assert expand_targets(["w1", "attn", "attn+mlp", "attn.qkv"]) == (
        "w1", "attn.qkv", "linear1", "ffn.w1", "ffn.w2", "ffn.w3",
    )
    assert LoRAConfig(targets=("attn",)).targets == ("attn.qkv", "linear1")  # what files store, and others read


@pytest.mark.parametrize("variant", ["tiny_16k", "small_16k", "large_44k", "mmaudio_large_44k_v2"])
def test_presets_reach_what_they_say(variant):
    every = layer_kinds(variant)
    blocks = {name for name in every if name.startswith(("joint_blocks.", "fused_blocks."))}
    reached = {}
    for preset in PRESETS:
        with torch.device("meta"):
            model = Generator(VARIANTS[variant].generator)
        report = inject_lora(model, LoRAConfig(rank=1, targets=(preset,)))
        assert not report.skipped
        reached[preset] = set(report.wrapped)
    modulation = {name for name in blocks if "adaLN" in name}
    assert reached["attn"] == {name for name in blocks if name.endswith(("qkv", "linear1"))}
    assert reached["attn+mlp"] == blocks - modulation
    assert reached["all"] == blocks | {"final_layer.adaLN_modulation.1"}
    text = {name for name in every if name.startswith(("text_", "global_cond_mlp"))}
    assert reached["all+text"] == reached["all"] | text and len(text) == 8
    assert all(every[name] is nn.Linear for name in text)


def test_a_place_of_the_other_version_is_missed_unless_that_of_this_one_is_there():
    def inject(*targets: str):
        with torch.device("meta"):
            return inject_lora(Generator(VARIANTS["small_16k"].generator), LoRAConfig(rank=1, targets=targets))

    with pytest.raises(ValueError, match=r"No layers matched target=\['text_input_proj.2.w1'\]"):
        inject("attn.qkv", "text_input_proj.2.w1")
    assert inject("text_input_proj.1.w1", "text_input_proj.2.w1").wrapped == ["text_input_proj.1.w1"]


def test_the_rank_of_an_ending_goes_before_that_of_a_preset_and_a_small_preset_before_a_large_one():
    for targets in (("all", "attn", "linear1"), ("linear1", "attn", "all")):  # in whatever order
        ranks = {"all": 2, "attn": 3, "linear1": 4}
        cfg = LoRAConfig(rank=9, targets=targets, target_ranks={target: ranks[target] for target in targets})
        names = ("b.attn.qkv", "b.linear1", "b.ffn.w2", "b.adaLN_modulation.1")
        assert [cfg.rank_of(name) for name in names] == [3, 4, 2, 2]


# -- the command line -------------------------------------------------------------------------------------------------


def test_targets_are_read_from_the_command_line():
    assert parse_targets(["attn.qkv"]) == (("attn.qkv",), None)
    assert parse_targets(["attn.qkv", "linear1:4"]) == (("attn.qkv", "linear1"), {"linear1": 4})
    targets, ranks = parse_targets(["attn:8", "linear1:4", "linear1:4"])
    cfg = LoRAConfig(rank=16, targets=targets, target_ranks=ranks)
    assert (cfg.rank_of("x.attn.qkv"), cfg.rank_of("x.linear1")) == (8, 4)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("linear1:", "target 'linear1:' has the rank '', expected a whole number of at least 1"),
        ("linear1:four", "has the rank 'four'"),
        ("linear1:0", "has the rank '0'"),
        ("linear1:-4", "has the rank '-4'"),
        ("linear1:4.5", "has the rank '4.5'"),
        ("linear1:²", "has the rank '²'"),
        ("linear1:4:5", "has the rank '4:5'"),
        (":4", "target ':4' names no layers"),
        ("", "target '' names no layers"),
        ("attn.qkv", "target 'attn.qkv' is given twice, with rank 2 and with no rank"),
    ],
)
def test_a_target_that_cannot_be_read_is_named(item, message):
    with pytest.raises(ValueError, match=message):
        parse_targets(["attn.qkv:2", item])


def test_all_targets_that_cannot_be_read_are_named_at_once():
    with pytest.raises(ValueError, match=r"'a:x'.*'b:y'"):
        parse_targets(["a:x", "b:y"])


# -- targets that fit nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "offered"),
    [
        ("attn.qvk", "attn.qkv;"),
        ("linear2", "linear1, "),
        ("ffn", "ffn.w1, ffn.w2, ffn.w3;"),
        ("adaLN_modulation", "adaLN_modulation.1;"),
        ("text_block", "text_block.attn.qkv, text_block.adaLN_modulation.1, text_block.linear1, text_block.ffn.w1, "),
        ("joint_blocks.0.clip_block", "joint_blocks.0.clip_block.attn.qkv, "),
    ],
)
def test_endings_that_would_fit_are_offered(target, offered):
    names = list(layer_kinds("small_16k"))
    message = no_match_message(names, [target], [])
    start = f"No layers matched target=['{target}']; endings that would: "
    assert message.startswith(start)
    found = message.removeprefix(start).split(";")[0]
    assert all(any(name.endswith(ending) for name in names) for ending in found.split(" and ")[0].split(", "))
    assert message.removeprefix(start).startswith(offered)
    assert message.endswith("presets: attn, attn+mlp, all, all+text")
