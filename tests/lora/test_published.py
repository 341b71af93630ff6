"""selva.lora.published: PiSSA trainings of ComfyUI-SelVA, continued over the unchanged base weights."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from lora_toy import Toy

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora, principal_factors
from selva.lora.layers import lora_layers
from selva.lora.merge import Adapter, merge_adapter
from selva.lora.published import continued_state
from selva.lora.state import adapter_tensors, load_lora_state_, lora_plus_groups, lora_state_dict

RANK, SCALE = 4, 4.0  # alpha 8 with rsLoRA
PISSA = LoRAConfig(RANK, 2 * RANK, rslora=True, init="pissa")


def published(model: Toy, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the tensors of a PiSSA training that has moved a little, as ComfyUI-SelVA writes them."""
    tensors = {}
    for name, layer in model.named_modules():
        if name.endswith("attn.qkv"):
            a, b = principal_factors(layer.weight, RANK)
            tensors[f"{name}.lora_A"] = (-a + 0.02 * torch.randn_like(a)).to(dtype)  # the signs are anyone's choice
            tensors[f"{name}.lora_B"] = (-b + 0.02 * torch.randn_like(b)).to(dtype)
            tensors[f"{name}.linear.weight"] = (layer.weight.detach() - SCALE * b @ a).to(dtype)
            if layer.bias is not None:
                tensors[f"{name}.linear.bias"] = layer.bias.detach().to(dtype)
    return tensors


def there(model: Toy, tensors: dict[str, torch.Tensor]) -> Toy:
    """Return the adapted model as it is trained there: a standard adapter over the changed base weights."""
    changed = copy.deepcopy(model)
    factors = {key: value for key, value in tensors.items() if ".lora_" in key}
    changed.load_state_dict({**model.state_dict(), **{
        key.replace(".linear.", "."): value for key, value in tensors.items() if key not in factors}})
    inject_lora(changed, LoRAConfig(RANK, 2 * RANK, rslora=True))
    load_lora_state_(changed, factors)
    return changed


def here(model: Toy, tensors: dict[str, torch.Tensor]) -> Toy:
    adapted = copy.deepcopy(model)
    inject_lora(adapted, PISSA)
    load_lora_state_(adapted, continued_state(adapted, tensors, "step.pt"))
    return adapted


def test_the_same_training_goes_on(model, x):
    tensors = published(model)
    runs = [there(model, tensors), here(model, tensors)]
    torch.testing.assert_close(runs[1](x), runs[0](x), rtol=1e-4, atol=2e-5)  # W_res is several times W
    assert (runs[0](x) - model(x)).abs().max() > 0.01
    for run in runs:
        optimizer = torch.optim.AdamW(lora_plus_groups(run, 1e-2), weight_decay=0.0)
        for _ in range(4):
            optimizer.zero_grad()
            (run(x) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(runs[1](x), runs[0](x), rtol=1e-4, atol=2e-5)
    factors, expected = (lora_state_dict(run) for run in reversed(runs))
    for key, value in expected.items():
        torch.testing.assert_close(factors[key], value, rtol=1e-4, atol=1e-4)
    # The start values are near the factors, not their mirror image, so that weight decay leads back to the start.
    assert all((layer.lora_A - layer.lora_A0).abs().max() < 0.3 for _, layer in lora_layers(runs[1]))
    merged = copy.deepcopy(model)
    merge_adapter(merged, Adapter(adapter_tensors(runs[1]), {}))  # the scale is folded in, the rank doubled
    torch.testing.assert_close(merged(x), runs[1](x), rtol=1e-5, atol=2e-6)


def test_rounded_base_weights_are_said(model, x, caplog):
    tensors = published(model, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        adapted = here(model, tensors)
    assert "step.pt: its changed base weights are rounded" in caplog.text
    torch.testing.assert_close(adapted(x), there(model, tensors)(x), rtol=0.05, atol=0.05)
    caplog.clear()
    here(model, published(model))
    assert not caplog.text


def test_the_weights_of_another_base_model_are_refused(model):
    tensors = published(model)
    torch.manual_seed(5)
    other = Toy()
    with pytest.raises(ValueError, match=r"step\.pt: its PiSSA .*attn\.qkv\.linear\.bias is not .*--variant"):
        here(other, tensors)
    own_biases = {key: value for key, value in model.state_dict().items() if key.endswith("bias")}
    other.load_state_dict({**other.state_dict(), **own_biases})
    with pytest.raises(ValueError, match=r"attn\.qkv\.linear\.weight was not made from this base model \("):
        here(other, tensors)
    key = next(key for key in tensors if key.endswith("linear.weight"))
    with pytest.raises(ValueError, match=rf"{key} is \(2, 2\), here it is"):
        here(model, {**tensors, key: torch.zeros(2, 2)})


def test_factors_of_other_files_are_left_as_they_are(model):
    inject_lora(model, LoRAConfig(2))
    state = lora_state_dict(model)
    assert continued_state(model, state, "step.pt") == state
