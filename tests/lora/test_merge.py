"""Finished adapters on a small model: merging, strength, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lora_toy import ALL, DIM, Toy, assert_same_change, exported, train_a_little_

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.merge import Adapter, merge_adapter, merge_adapters, merged_adapters
from selva.lora.state import adapter_tensors

CONFIGS = {
    "plain": LoRAConfig(rank=3, targets=ALL),
    "scaled": LoRAConfig(rank=3, alpha=5.0, targets=ALL, rslora=True),
    "ranks": LoRAConfig(rank=2, targets=ALL, target_ranks={"linear1": 5, "ffn.0": 1}),
    "pissa": LoRAConfig(rank=3, targets=ALL, init="pissa"),
    "dora": LoRAConfig(rank=3, alpha=5.0, targets=ALL, dora=True),
    "dora_pissa": LoRAConfig(rank=3, targets=ALL, dora=True, init="pissa"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_equals_unmerged(model, x, name):
    plain = copy.deepcopy(model)
    before = plain(x)
    inject_lora(model, CONFIGS[name])
    train_a_little_(model)
    merge_adapter(plain, exported(model))
    assert (plain(x) - before).abs().max() > 0.1
    assert_same_change(plain(x), model(x), before)


def test_the_exported_adapter_has_one_rank(model):
    inject_lora(model, CONFIGS["ranks"])
    train_a_little_(model)
    tensors = adapter_tensors(model)
    assert {value.shape[0] for key, value in tensors.items() if key.endswith("lora_A")} == {5}
    assert {value.shape[1] for key, value in tensors.items() if key.endswith("lora_B")} == {5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_strength_zero_leaves_every_bit(model, name, dtype):
    plain = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        plain.linear1.weight[0] = -0.0  # adding a positive zero would flip its sign bit
    before = copy.deepcopy(plain.state_dict())
    inject_lora(model, CONFIGS[name])
    train_a_little_(model)
    merge_adapter(plain, exported(model), strength=0.0)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key]) and torch.equal(value.signbit(), before[key].signbit())


def test_strength_is_linear_in_the_weights_and_adapters_add_up(model):
    """Pitfall E5: several adapters at once."""
    plain = copy.deepcopy(model)
    inject_lora(model, CONFIGS["scaled"])
    train_a_little_(model)
    adapter = exported(model)
    other = Adapter({key: 2 * value for key, value in adapter.tensors.items()}, {"alpha": 1.5}, source="other")
    base = plain.linear1.weight.detach().clone()
    merge_adapter(plain, adapter, 0.5)
    merge_adapter(plain, other, -2.0)
    delta = adapter.tensors["linear1.lora_B"] @ adapter.tensors["linear1.lora_A"]
    torch.testing.assert_close(plain.linear1.weight, base + 0.5 * delta - 2.0 * (4 * 1.5 / 3) * delta)


def test_merging_into_a_half_precision_model_rounds_once(model):
    plain = copy.deepcopy(model).to(torch.bfloat16)
    base = plain.linear1.weight.detach().float()
    inject_lora(model, CONFIGS["plain"])
    train_a_little_(model)
    adapter = exported(model)
    merge_adapters(plain, [(adapter, 0.5), (adapter, 0.25)])
    delta = adapter.tensors["linear1.lora_B"] @ adapter.tensors["linear1.lora_A"]
    expected = base + 0.5 * delta + 0.25 * delta
    assert torch.equal(plain.linear1.weight, expected.to(torch.bfloat16))


def test_a_merge_can_be_taken_back_bit_for_bit(model, x):
    plain = copy.deepcopy(model).to(torch.bfloat16)
    before = copy.deepcopy(plain.state_dict())
    inject_lora(model, CONFIGS["plain"])
    train_a_little_(model)
    with merged_adapters(plain, [(exported(model), 1.0)]):
        assert not torch.equal(plain.linear1.weight, before["linear1.weight"])
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    with pytest.raises(KeyboardInterrupt), merged_adapters(plain, [(exported(model), 0.3)]):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def published_pissa(model: Toy, name: str = "blocks.0.attn.qkv", scale: float = 4.0) -> Adapter:
    """A PiSSA file as ComfyUI-SelVA writes it: scale alpha / sqrt(rank), residual base weight, moved factors."""
    layer = model.get_submodule(name)
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    a, b = s[:4].sqrt()[:, None] * vh[:4], u[:, :4] * s[:4].sqrt()
    return Adapter(
        {
            f"{name}.lora_A": a + 0.01, f"{name}.lora_B": b - 0.01,
            f"{name}.linear.weight": layer.weight.detach() - scale * b @ a,
            f"{name}.linear.bias": layer.bias.detach() + 0.5,
        },
        {"rank": 4, "alpha": 8.0, "use_rslora": True}, source="pissa.pt",
    )


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_published_pissa_adapter_blends_from_the_base_weight(model, strength):
    """Pitfall E7: converted to an update of W first."""
    adapter = published_pissa(model)
    assert adapter.is_pissa
    layer = model.blocks[0].attn.qkv
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    a, b = adapter.factors("blocks.0.attn.qkv")
    adapted = adapter.tensors["blocks.0.attn.qkv.linear.weight"] + 4.0 * b @ a
    merge_adapter(model, adapter, strength)
    torch.testing.assert_close(layer.weight, weight + strength * (adapted - weight))
    torch.testing.assert_close(layer.bias, bias + strength * 0.5)


def test_pissa_adapters_merge_with_others_in_any_order_but_not_after_them(model):
    other = copy.deepcopy(model)
    inject_lora(other, LoRAConfig(rank=2))
    train_a_little_(other)
    pissa, plain = published_pissa(model), exported(other)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    merge_adapters(first, [(plain, 0.7), (pissa, 0.5)])
    merge_adapter(second, pissa, 0.5)
    merge_adapter(second, plain, 0.7)
    torch.testing.assert_close(first.state_dict(), second.state_dict())
    with pytest.raises(ValueError, match=r"pissa.pt: .*another adapter merged already"):
        merge_adapter(first, pissa)
    with merged_adapters(model, [(plain, 1.0)]):
        pass
    merge_adapter(model, pissa)  # the block gave the base weights back


def test_an_adapter_can_be_trained_on_top_of_a_merged_one(model, x):
    """Pitfall E5."""
    first = copy.deepcopy(model)
    inject_lora(first, CONFIGS["plain"])
    train_a_little_(first)
    merge_adapter(model, exported(first))
    before = model(x)
    inject_lora(model, CONFIGS["plain"])
    assert torch.equal(model(x), before)


def test_merging_reports_everything_that_does_not_fit_and_changes_nothing(model):
    """Pitfall H4: no tensor is left out silently."""
    before = copy.deepcopy(model.state_dict())
    a, b = torch.ones(2, DIM), torch.ones(DIM, 2)
    adapter = Adapter(
        {
            "linear1.lora_A": a, "linear1.lora_B": b,
            "absent.lora_A": a, "absent.lora_B": b,
            "blocks.0.norm.lora_A": a, "blocks.0.norm.lora_B": b,
            "blocks.0.attn.qkv.lora_A": a, "blocks.0.attn.qkv.lora_B": b,
            "blocks.1.linear1.lora_A": a, "blocks.1.linear1.lora_B": b,
        },
        source="dog.pt",
    )
    with pytest.raises(ValueError) as error:
        merge_adapter(model, adapter)
    for part in (
        "dog.pt: the model has no layer absent",
        "blocks.0.norm is a LayerNorm",
        "blocks.0.attn.qkv: the adapter is for a weight of (12, 12), the model's is (36, 12)",
        "blocks.1.linear1: the adapter is for a weight of (12, 12), the model's is (12, 12, 3)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"linear1.lora_A": torch.ones(2, DIM)}, "linear1.lora_B is missing"),
        ({"linear1.lora_A": torch.ones(2, DIM), "linear1.lora_B": torch.ones(DIM, 3)}, "do not fit together"),
        ({"linear1.weight": torch.ones(DIM, DIM)}, "linear1.weight is no LoRA tensor"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(model, tensors, message):
    """Pitfall H4: missing and foreign keys are errors."""
    with pytest.raises(ValueError, match=message):
        merge_adapter(model, Adapter(tensors))


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_must_be_a_number(model, strength):
    adapter = Adapter({"linear1.lora_A": torch.ones(2, DIM), "linear1.lora_B": torch.ones(DIM, 2)})
    with pytest.raises(ValueError, match="strength must be a finite number"):
        merge_adapter(model, adapter, strength)


def test_long_lists_of_problems_are_cut(model):
    tensors = {f"no.{i}.lora_{f}": torch.ones(2, 2) for i in range(30) for f in "AB"}
    with pytest.raises(ValueError, match=r"no\.9 and 20 more"):
        merge_adapter(model, Adapter(tensors))
