"""Adapters on small models: injection, training, state and export."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lora_toy import ALL, DIM, make_toy, train_a_little_
from torch import Tensor, nn

from selva.checkpoint import load_adapter, save_adapter
from selva.lora.config import LoRAConfig
from selva.lora.inject import check_ranks, inject_lora, remove_lora
from selva.lora.layers import LoRALinear, lora_layers
from selva.lora.state import (
    adapter_tensors,
    load_lora_state_,
    lora_parameters,
    lora_plus_groups,
    lora_state_dict,
    start_from_adapter_,
)
from selva.models.generator import Generator
from selva.models.variants import VARIANTS

# -- injection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["standard", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(model, x, init, dtype):
    """Pitfalls D4 and E2: also with PiSSA over a bfloat16 base, whose weights stay as they are."""
    model, x = model.to(dtype), x.to(dtype)
    before, weights = model(x), copy.deepcopy(model.state_dict())
    inject_lora(model, LoRAConfig(rank=4, targets=ALL, init=init))
    assert torch.equal(model(x), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_the_report_names_what_was_wrapped_and_what_was_skipped(model):
    """Pitfall E1: a target reaches convolutions too."""
    report = inject_lora(model, LoRAConfig(rank=4, targets=ALL, target_ranks={"linear1": 2}))
    assert report.wrapped == [
        "blocks.0.attn.qkv", "blocks.0.linear1", "blocks.0.ffn.0",
        "blocks.1.attn.qkv", "blocks.1.linear1", "blocks.1.ffn.0", "linear1",
    ]
    kinds = [(layer.kind, layer.rank, layer.in_features, layer.out_features) for layer in report.layers[:3]]
    assert kinds == [("linear", 4, 12, 36), ("conv1d", 2, 12, 12), ("conv1d", 4, 12, 16)]
    assert report.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "7 layers adapted (3 linear, 4 conv1d)" in report.summary()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora" in name}
    assert shapes["blocks.0.linear1.lora_A"] == (2, 12, 3) and shapes["blocks.0.linear1.lora_B"] == (12, 2, 1)
    assert shapes["blocks.0.attn.qkv.lora_A"] == (4, 12) and shapes["blocks.0.attn.qkv.lora_B"] == (36, 4)


def test_matching_modules_that_cannot_be_adapted_are_reported(model):
    """Pitfall E1: nothing is skipped silently."""
    model.blocks[1].ffn = nn.Linear(DIM, DIM)
    model.blocks[0].linear1 = nn.Conv1d(DIM, DIM, 3, groups=3)
    report = inject_lora(model, LoRAConfig(rank=2, targets=("ffn", "linear1")))
    assert report.wrapped == ["blocks.1.linear1", "blocks.1.ffn", "linear1"]
    reasons = dict(report.skipped)
    assert reasons["blocks.0.ffn"] == "a Sequential, neither nn.Linear nor nn.Conv1d"
    assert reasons["blocks.0.linear1"] == "a convolution in 3 groups"
    assert "2 matching modules skipped" in report.summary()


def test_the_notice_tells_what_is_skipped_and_what_would_load_elsewhere(model):
    plain = copy.deepcopy(model)
    assert inject_lora(plain, LoRAConfig()).notice == []
    plain = copy.deepcopy(model)
    plain.blocks[0].linear1 = nn.Conv1d(DIM, DIM, 3, groups=3)
    plain.blocks[1].linear1 = nn.Linear(DIM, DIM)
    plain.linear1 = nn.Conv1d(DIM, DIM, 1)
    skipped, refused = inject_lora(plain, LoRAConfig(targets=("attn.qkv", "linear1"))).notice
    assert skipped == "matched by a target but not adapted, being a convolution in 3 groups: blocks.0.linear1"
    assert refused == (
        "ComfyUI-SelVA will refuse this adapter: 1 of 4 adapted layers is a convolution; "
        "trained with the targets attn.qkv 1.linear1 it would load there"
    )
    only_convolutions = inject_lora(copy.deepcopy(model), LoRAConfig(targets=("ffn.0",))).notice
    assert only_convolutions == ["ComfyUI-SelVA will refuse this adapter: 2 of 2 adapted layers are convolutions"]
    with_dora = inject_lora(model, LoRAConfig(dora=True)).notice
    assert with_dora == [
        "ComfyUI-SelVA will refuse this adapter: it uses DoRA; trained without DoRA it would load there"
    ]


@pytest.mark.parametrize("preset", ["attn", "attn+mlp", "all", "all+text"])
def test_the_targets_for_elsewhere_reach_the_linear_layers_and_nothing_else(preset):
    def inject(targets):
        with torch.device("meta"):
            return inject_lora(Generator(VARIANTS["small_16k"].generator), LoRAConfig(rank=1, targets=targets))

    report = inject((preset,))
    linear = inject(tuple(report.linear_targets()))
    assert linear.wrapped == [layer.name for layer in report.layers if layer.kind == "linear"]
    assert {layer.kind for layer in linear.layers} == {"linear"} and linear.notice == []


def test_a_subclass_with_its_own_forward_is_left_alone(model):
    class Transposing(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mT).mT

    model.blocks[0].linear1 = Transposing(DIM, DIM, 1)
    report = inject_lora(model, LoRAConfig(targets=("linear1",)))
    assert report.skipped == [("blocks.0.linear1", "a Transposing, neither nn.Linear nor nn.Conv1d")]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("attn.qvk",), r"No layers matched target=\['attn.qvk'\].*attn.qkv"),
        (("attn.qkv", "linear2"), r"target=\['linear2'\].*linear1"),
        (("ffn",), r"ffn.*Matched but cannot be adapted: blocks.0.ffn \(a Sequential"),
        (("grouped",), "a convolution in 2 groups"),
    ],
)
def test_a_target_that_fits_nothing_says_what_would(model, targets, message):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(targets=targets))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_injection_is_refused_until_the_first_is_removed(model, x):
    before = model(x)
    inject_lora(model, LoRAConfig(targets=ALL))
    train_a_little_(model)
    with pytest.raises(ValueError, match="has adapters already"):
        inject_lora(model, LoRAConfig())
    remove_lora(model)
    assert torch.equal(model(x), before)
    assert not any("lora" in name for name, _ in model.named_parameters()) and type(model.linear1) is nn.Linear
    inject_lora(model, LoRAConfig(init="pissa", rank=2))


def test_pissa_with_more_directions_than_a_layer_has_is_refused(model):
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv has rank at most 12, asked for 13"):
        inject_lora(model, LoRAConfig(rank=13, init="pissa"))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_start_follows_the_seed_and_the_usual_bounds(model):
    other = copy.deepcopy(model)
    inject_lora(model, LoRAConfig(rank=64, targets=ALL), torch.Generator().manual_seed(5))
    torch.rand(3)  # the global generator has no say
    inject_lora(other, LoRAConfig(rank=64, targets=ALL), torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(model), lora_parameters(other), strict=True))
    for layer, fan_in in ((model.blocks[0].attn.qkv, DIM), (model.blocks[0].ffn[0], 7 * DIM)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_B.count_nonzero() == 0


def test_base_weights_keep_their_names_objects_and_hooks(model, x):
    """Pitfall E6: adapted in place, with no second copy of the base."""
    keys, weight = list(model.state_dict()), model.linear1.weight
    calls = []
    model.linear1.register_forward_hook(lambda *_: calls.append(1))
    inject_lora(model, LoRAConfig(targets=ALL))
    assert [key for key in model.state_dict() if "lora" not in key] == keys
    assert model.linear1.weight is weight and isinstance(model.linear1, nn.Linear)
    model(x)
    assert calls == [1]


# -- numerics ---------------------------------------------------------------------------------------------------------


def test_the_formula(x):
    layer = nn.Sequential(nn.Linear(DIM, 5))
    inject_lora(layer, LoRAConfig(rank=3, alpha=6, targets=("0",)))
    train_a_little_(layer)
    lora = layer[0]
    expected = x @ lora.weight.T + lora.bias + 2 * (x @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 2, "dilation": 2}, {"stride": 2}, {"padding": 1, "padding_mode": "circular", "bias": False}],
)
def test_a_convolution_equals_one_with_the_summed_kernel(x, options):
    conv = nn.Sequential(nn.Conv1d(DIM, 7, 3, **options))
    inject_lora(conv, LoRAConfig(rank=2, alpha=3, targets=("0",)))
    train_a_little_(conv)
    summed = copy.deepcopy(conv)
    a, b = conv[0].lora_A, conv[0].lora_B
    remove_lora(summed)
    with torch.no_grad():
        summed[0].weight += 1.5 * torch.einsum("orx,rik->oik", b, a)
    torch.testing.assert_close(conv(x.mT), summed(x.mT))


def test_pissa_starts_at_the_largest_directions_and_trains_as_the_paper_says(model, x):
    """Pitfall E2: at scale 1, W + B A - B0 A0 in float32."""
    weight = model.linear1.weight.detach().clone()
    inject_lora(model, LoRAConfig(rank=3, targets=("linear1",), init="pissa"))
    layer = model.linear1
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, u[:, :3] * s[:3] @ vh[:3])
    residual = weight - (layer.lora_B @ layer.lora_A).detach()
    train_a_little_(model)
    z = torch.randn(4, DIM)
    torch.testing.assert_close(layer(z), z @ (residual + layer.lora_B @ layer.lora_A).T)
    # ... and so do its gradients
    layer(z).square().sum().backward()
    found = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    (z @ (residual + b @ a).T).square().sum().backward()
    torch.testing.assert_close(found, (a.grad, b.grad))


def test_only_the_factors_learn_and_the_base_keeps_every_bit(model, x):
    base = copy.deepcopy(model.state_dict())
    inject_lora(model, LoRAConfig(rank=2, targets=ALL))
    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-2), weight_decay=0.1)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in model.state_dict() if name.endswith(("lora_A", "lora_B"))}


def test_factors_stay_in_float32_whatever_the_base_is_cast_to(model, x):
    """Pitfall D1: also when the whole model is cast."""
    inject_lora(model, LoRAConfig(rank=2, targets=ALL, init="pissa"))
    train_a_little_(model)
    before = lora_state_dict(model)
    model.to(torch.bfloat16)
    assert model.linear1.weight.dtype == torch.bfloat16
    after = lora_state_dict(model)
    assert all(after[key].dtype == torch.float32 and torch.equal(after[key], before[key]) for key in before)
    out = model(x.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_runs_the_adapter_in_half_precision(model, x, base):
    inject_lora(model, LoRAConfig(rank=2, targets=ALL))
    train_a_little_(model)
    exact = model(x)
    layer = model.linear1.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    # bfloat16 has 8 bits, and the error grows through the layers
    torch.testing.assert_close(model(x.bfloat16()).float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


def test_dropout_only_while_training(model, x):
    inject_lora(model, LoRAConfig(rank=2, targets=ALL, dropout=0.5))
    train_a_little_(model)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_without_dropout_no_random_number_is_drawn(model, x):
    inject_lora(model, LoRAConfig(rank=2, targets=ALL))
    model.train()
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_plus_scales_the_rate_of_b(model):
    inject_lora(model, LoRAConfig(rank=2, targets=ALL))
    group_a, group_b = lora_plus_groups(model, lr=1e-3, ratio=16.0)
    assert (group_a["lr"], group_b["lr"]) == (1e-3, 16e-3)
    assert group_a["params"] + group_b["params"] == lora_parameters(model)
    assert group_b["params"][0] is model.blocks[0].attn.qkv.lora_B


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["standard", "pissa"])
def test_the_state_is_restored_bit_for_bit(model, x, init):
    cfg = LoRAConfig(rank=3, targets=ALL, init=init)
    other = copy.deepcopy(model)
    inject_lora(model, cfg)
    train_a_little_(model)
    state = lora_state_dict(model)
    inject_lora(other, cfg)
    load_lora_state_(other, state)
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        lora_parameters(model)[0].zero_()
    assert state["blocks.0.attn.qkv.lora_A"].count_nonzero()  # a copy


def test_a_state_that_does_not_fit_names_everything_and_changes_nothing(model):
    inject_lora(model, LoRAConfig(rank=3, targets=ALL))
    state = lora_state_dict(model)
    before = copy.deepcopy(state)
    state.pop("linear1.lora_B")
    state["linear9.lora_A"] = torch.zeros(3, 4)
    state["blocks.0.linear1.lora_A"] = torch.zeros(2, 12, 3)
    state["blocks.0.attn.qkv.lora_A"] += 1
    with pytest.raises(ValueError) as error:
        load_lora_state_(model, state)
    for part in ("linear1.lora_B is missing", "linear9.lora_A belongs to no adapted layer", "(2, 12, 3), expected (3"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in lora_state_dict(model).items())


def test_an_average_can_be_exported_in_place_of_the_current_values(model):
    inject_lora(model, LoRAConfig(rank=2, init="pissa"))
    train_a_little_(model)
    average = {key: value / 2 for key, value in lora_state_dict(model).items() if key.endswith(("lora_A", "lora_B"))}
    found = adapter_tensors(model, average)
    name = "blocks.0.attn.qkv"
    start = model.get_submodule(name)
    product = average[f"{name}.lora_B"] @ average[f"{name}.lora_A"] - start.lora_B0 @ start.lora_A0
    torch.testing.assert_close(found[f"{name}.lora_B"] @ found[f"{name}.lora_A"], product)
    with pytest.raises(ValueError, match=r"no adapted layer: elsewhere"):
        adapter_tensors(model, {"elsewhere.lora_A": torch.zeros(2, 2)})


def test_a_copy_of_an_adapted_model_is_independent(model, x):
    inject_lora(model, LoRAConfig(rank=2))
    twin = copy.deepcopy(model)
    train_a_little_(twin)
    assert isinstance(twin.blocks[0].attn.qkv, LoRALinear)
    assert not torch.equal(twin(x), model(x))


# -- starting at a finished adapter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("before", [{"rslora": True, "rank": 3}, {"rank": 3, "target_ranks": {"linear1": 1}},
                                    {"rank": 3, "dora": True}, {"rank": 1, "init": "pissa"}], ids=str)
def test_a_model_starts_at_a_finished_adapter_and_can_learn_in_every_direction(x, before, rank, tmp_path):
    first = make_toy()
    inject_lora(first, LoRAConfig(targets=ALL, **before))
    with torch.no_grad():
        for parameter in lora_parameters(first):
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(tmp_path / "a.pt", first, {})
    second = make_toy()
    inject_lora(second, LoRAConfig(targets=ALL, rank=rank, alpha=2.0, dora=bool(before.get("dora"))))
    assert start_from_adapter_(second, load_adapter(tmp_path / "a.pt")) == []
    torch.testing.assert_close(second(x), first(x), rtol=1e-4, atol=1e-5)
    second(x).square().sum().backward()
    for name, layer in lora_layers(second):
        assert layer.lora_B.grad.any(), name
        assert layer.lora_A.flatten(1).any(1).all(), name  # a direction whose A and B are zero would never move


def test_what_a_finished_adapter_has_no_place_for_is_named(tmp_path):
    first = make_toy()
    inject_lora(first, LoRAConfig(targets=("attn.qkv", "ffn.0"), rank=3, dora=True))
    with torch.no_grad():
        for parameter in lora_parameters(first):
            parameter.add_(torch.randn_like(parameter))
    save_adapter(tmp_path / "a.pt", first, {})
    adapter, second = load_adapter(tmp_path / "a.pt"), make_toy()
    inject_lora(second, LoRAConfig(targets=("attn.qkv",), rank=2))
    before = lora_state_dict(second)
    with pytest.raises(ValueError, match=r"a.pt: .*blocks.0.attn.qkv has rank 3, here it is 2 \(--rank\).*"
                                         r"blocks.0.ffn.0 has no adapter here \(--target\)"):
        start_from_adapter_(second, adapter)
    assert all(torch.equal(value, before[key]) for key, value in lora_state_dict(second).items())
    third = make_toy()
    inject_lora(third, LoRAConfig(targets=ALL, rank=3))
    with pytest.raises(ValueError, match=r"has a DoRA magnitude \(--dora\)"):
        start_from_adapter_(third, adapter)
    fourth = make_toy()
    inject_lora(fourth, LoRAConfig(targets=ALL, rank=3, dora=True))
    assert start_from_adapter_(fourth, adapter) == ["blocks.0.linear1", "blocks.1.linear1", "linear1"]


def test_a_rank_above_the_size_of_a_layer_is_named(model):
    check_ranks(model, LoRAConfig(rank=12, targets=ALL))
    with pytest.raises(ValueError, match=r"blocks.0.linear1 has rank at most 12, asked for 13.*--rank"):
        check_ranks(model, LoRAConfig(rank=12, targets=ALL, target_ranks={"linear1": 13}))
