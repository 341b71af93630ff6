"""DoRA: the trained length of every row of the adapted weight (arXiv:2402.09353)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lora_toy import ALL, DIM, exported, train_a_little_
from torch import Tensor, nn

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora, remove_lora
from selva.lora.merge import Adapter, merge_adapter, merge_adapters, merged_adapters
from selva.lora.state import adapter_tensors, load_lora_state_, lora_parameters, lora_plus_groups, lora_state_dict

DORA = LoRAConfig(rank=3, alpha=5.0, targets=ALL, dora=True)
DORA_PISSA = LoRAConfig(rank=3, targets=ALL, dora=True, init="pissa")


def adapted_weight(layer: nn.Module, scale: float, norm_is_constant: bool) -> Tensor:
    """Return m (W + scale B A) / ||W + scale B A|| as the paper writes it, row by row."""
    update = torch.einsum("or...,ri...->oi...", layer.lora_B, layer.lora_A)
    direction = layer.weight + scale * update
    norms = direction.flatten(1).norm(dim=1)
    factor = layer.lora_magnitude / (norms.detach() if norm_is_constant else norms)
    return factor.view(-1, *(1,) * (direction.dim() - 1)) * direction


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_output_and_gradients_are_those_of_the_paper(x, kind, bias):
    options = {"padding": 4, "dilation": 2, "stride": 2, "bias": bias}
    plain = nn.Linear(DIM, 7, bias=bias) if kind == "linear" else nn.Conv1d(DIM, 7, 5, **options)
    model, x = nn.Sequential(plain), x if kind == "linear" else x.mT
    inject_lora(model, LoRAConfig(rank=3, alpha=6.0, targets=("0",), dora=True))
    train_a_little_(model)
    layer = model[0]
    weight = adapted_weight(layer, scale=2.0, norm_is_constant=True)
    if kind == "linear":
        expected = F.linear(x, weight, layer.bias)
    else:
        expected = F.conv1d(x, weight, layer.bias, padding=4, dilation=2, stride=2)
    torch.testing.assert_close(model(x), expected)
    # Section 4.3: the norm is a constant in the backward pass.
    parameters = lora_parameters(model)
    found = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), parameters), rtol=1e-4, atol=1e-4)
    assert len(found) == 3


@pytest.mark.parametrize("cfg", [DORA, DORA_PISSA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_adapter_changes_nothing(model, x, cfg, dtype):
    casted = copy.deepcopy(model).to(dtype)
    before = casted(x.to(dtype))
    inject_lora(casted, cfg)
    assert torch.equal(casted(x.to(dtype)), before)
    inject_lora(model, cfg)  # the lengths of rows that are rounded afterwards are others, and still nothing changes
    assert torch.equal(model.to(dtype)(x.to(dtype)), before)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_under_autocast(model, x, base):
    layer = model.linear1.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        inject_lora(model, DORA)
        assert torch.equal(layer(x), before)


def test_the_norm_is_taken_in_float32_even_under_autocast(model):
    inject_lora(model, DORA)
    train_a_little_(model)
    layer = model.blocks[0].linear1
    exact = (layer.weight + 5 / 3 * torch.einsum("orx,rik->oik", layer.lora_B, layer.lora_A)).flatten(1).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.adapted_norms(*layer.lora_factors())
    torch.testing.assert_close(found, exact)  # 1e-6: bfloat16 would be 1e-3
    assert not found.requires_grad


def test_the_output_stays_in_half_precision_and_close(model, x):
    inject_lora(model, DORA)
    train_a_little_(model)
    exact = model(x)
    found = model.to(torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    found.float().sum().backward()
    for parameter in lora_parameters(model):
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_rows_of_zeros_neither_break_nor_stay(x):
    model = nn.Sequential(nn.Linear(DIM, 4))
    nn.init.zeros_(model[0].weight)
    inject_lora(model, LoRAConfig(rank=2, targets=("0",), dora=True))
    assert torch.equal(model(x), model[0].bias.expand(2, 9, 4))
    target = x[..., :4] + x[..., 4:8]
    optimizer = torch.optim.Adam(lora_parameters(model), lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in lora_parameters(model))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_lengths_are_trained_and_the_base_keeps_every_bit(model, x):
    base = copy.deepcopy(model.state_dict())
    report = inject_lora(model, DORA)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{kind}" for name in report.wrapped for kind in ("lora_A", "lora_B", "lora_magnitude")}
    assert report.num_parameters == sum(p.numel() for p in lora_parameters(model))
    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    moved = model.linear1.lora_magnitude - model.linear1.lora_magnitude0
    assert moved.abs().min() > 0.05


def test_magnitudes_have_a_group_of_their_own_without_decay(model):
    inject_lora(model, DORA)
    groups = lora_plus_groups(model, lr=1e-3, ratio=4.0)
    assert [group["lr"] for group in groups] == [1e-3, 4e-3, 1e-3]
    assert groups[2]["weight_decay"] == 0.0 and "weight_decay" not in groups[0]
    assert groups[2]["params"][0] is model.blocks[0].attn.qkv.lora_magnitude
    assert [p for group in groups for p in group["params"]] == lora_parameters(model)


# -- state and export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [DORA, DORA_PISSA])
def test_the_state_is_restored_bit_for_bit_even_over_rounded_weights(model, x, cfg):
    other = copy.deepcopy(model).to(torch.bfloat16)
    inject_lora(model, cfg)
    train_a_little_(model)
    state = lora_state_dict(model)
    assert state["linear1.lora_magnitude0"].shape == (DIM,)
    inject_lora(other, cfg)
    load_lora_state_(other, state)
    assert torch.equal(other(x.bfloat16()), model.to(torch.bfloat16)(x.bfloat16()))


def test_an_average_brings_its_own_lengths(model):
    inject_lora(model, DORA)
    average = {"linear1.lora_magnitude": torch.full((DIM,), 2.5)}
    found = adapter_tensors(model, average)
    assert found["linear1.lora_magnitude"].tolist() == [2.5] * DIM
    assert torch.equal(found["blocks.0.linear1.lora_magnitude"], model.blocks[0].linear1.lora_magnitude)
    assert not any(key.endswith("magnitude0") for key in found)


def test_removing_leaves_the_plain_model(model, x):
    keys, before = list(model.state_dict()), model(x)
    inject_lora(model, DORA)
    train_a_little_(model)
    remove_lora(model)
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, -0.5])
def test_strength_is_the_way_from_the_base_weight_to_the_adapted_one(model, strength):
    plain = copy.deepcopy(model)
    inject_lora(model, DORA)
    train_a_little_(model)
    merge_adapter(plain, exported(model), strength)
    for name in ("linear1", "blocks.1.ffn.0"):
        layer = model.get_submodule(name)
        adapted = adapted_weight(layer, scale=5 / 3, norm_is_constant=True)
        expected = layer.weight + strength * (adapted - layer.weight)
        torch.testing.assert_close(plain.get_submodule(name).weight, expected)
    if strength == 1:  # the point of DoRA
        torch.testing.assert_close(plain.linear1.weight.norm(dim=1), model.linear1.lora_magnitude.abs())


def test_a_fresh_adapter_merges_to_the_base_within_rounding(model):
    plain = copy.deepcopy(model)
    inject_lora(model, DORA)
    merge_adapter(plain, exported(model))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=3e-7, atol=0)


def test_several_adapters_are_merged_at_once_and_not_after_one_another(model):
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    inject_lora(model, DORA)
    inject_lora(other, LoRAConfig(rank=2, targets=("linear1",)))
    train_a_little_(model)
    train_a_little_(other)
    dora, lora = exported(model), exported(other)
    first, second, third = (copy.deepcopy(plain) for _ in range(3))
    merge_adapters(first, [(dora, 0.5), (lora, 0.7)])
    merge_adapters(second, [(lora, 0.7), (dora, 0.5)])
    merge_adapter(third, dora, 0.5)
    merge_adapter(third, lora, 0.7)  # a plain adapter does not look at the weight
    torch.testing.assert_close(first.state_dict(), second.state_dict())
    torch.testing.assert_close(first.state_dict(), third.state_dict())
    with pytest.raises(ValueError, match=r"linear1 has another adapter merged already, but a DoRA adapter is relative"):
        merge_adapter(third, dora)
    with merged_adapters(plain, [(lora, 1.0)]):
        pass
    merge_adapter(plain, dora)


def test_it_is_not_trained_on_top_of_a_merged_adapter(model):
    other = copy.deepcopy(model)
    inject_lora(other, LoRAConfig(rank=2, targets=("linear1",)))
    merge_adapter(model, exported(other))
    with pytest.raises(ValueError, match=r"have another adapter merged: blocks.0.linear1, blocks.1.linear1, linear1"):
        inject_lora(model, DORA)
    assert not any("lora" in name for name, _ in model.named_parameters())
    inject_lora(model, LoRAConfig(targets=("attn.qkv",), dora=True))  # which nothing was merged into


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"linear1.lora_magnitude": torch.ones(DIM, 1)}, r"linear1: lora_magnitude \(12, 1\) does not fit lora_B"),
        ({"linear1.lora_magnitude": torch.ones(3)}, r"linear1: lora_magnitude \(3,\) does not fit lora_B"),
        ({"norm.lora_magnitude": torch.ones(3)}, "norm.lora_A is missing"),
        (
            {"linear1.lora_magnitude": torch.ones(DIM), "linear1.linear.weight": torch.ones(DIM, DIM)},
            "linear1 has a DoRA magnitude and a changed base weight",
        ),
    ],
)
def test_magnitudes_that_do_not_fit_are_refused(model, extra, message):
    tensors = {"linear1.lora_A": torch.ones(2, DIM), "linear1.lora_B": torch.ones(DIM, 2), **extra}
    with pytest.raises(ValueError, match=message):
        merge_adapter(model, Adapter(tensors))
