"""Convolutions with fewer multiplications against PyTorch's."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models import winograd_conv as winograd_conv
from selva.models.blocks import ConvMLP

BF16 = 1.5e-2  # relative; measured 8e-3, twice that of PyTorch's own bfloat16 convolutions


def frozen_mlp(dim: int = 32, width: int = 48, kernel_size: int = 3) -> ConvMLP:
    return ConvMLP(dim, width, kernel_size).requires_grad_(False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def with_gradient(call, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of ``call`` for ``x``, and the gradient of a fixed weighting of it."""
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach().float(), x.grad.float()


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_the_scheme_is_exact_but_for_rounding(tokens):
    """In float32, where it is not used, nothing but its algebra is left to differ."""
    mlp, x = frozen_mlp(), torch.randn(2, tokens, 32)
    f1, f2, f3 = (
        torch.stack((g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2))
        for g0, g1, g2 in (layer.weight.unbind(-1) for layer in (mlp.w1, mlp.w2, mlp.w3))
    )
    ours = with_gradient(lambda x: winograd_conv._GatedMLP.apply(x, f1, f2, f3), x)
    for found, expected in zip(ours, with_gradient(lambda x: mlp(x.mT).mT, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [6, 9])
def test_bfloat16_convolutions_and_their_gradients(tokens):
    x = torch.randn(3, tokens, 32)
    mlp, layer = frozen_mlp(), nn.Conv1d(32, 24, 3, padding=1).requires_grad_(False)
    half = x.bfloat16()
    for exact, call in (
        (with_gradient(lambda x: layer(x.mT).mT, x), lambda x: winograd_conv.conv(x, layer)),
        (with_gradient(lambda x: mlp(x.mT).mT, x), lambda x: winograd_conv.gated_mlp(x, mlp.w1, mlp.w2, mlp.w3)),
    ):
        for found, expected in zip(with_gradient(call, half), exact, strict=True):
            assert relative(found, expected) < BF16


def test_only_frozen_plain_bfloat16_convolutions_of_width_3_take_this_way():
    x = torch.randn(1, 32, 6)
    mlp = frozen_mlp()
    layers = (mlp.w1, mlp.w2, mlp.w3)
    assert winograd_conv.supports(x.bfloat16(), *layers) and not winograd_conv.supports(x, *layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert winograd_conv.supports(x, *layers)
        assert not winograd_conv.supports(x, frozen_mlp(kernel_size=7).w1)
        assert not winograd_conv.supports(x, nn.Conv1d(32, 32, 3, padding=1))  # trained: its weight needs a gradient
        with torch.no_grad():
            assert winograd_conv.supports(x, nn.Conv1d(32, 32, 3, padding=1))
    inject_lora(mlp, LoRAConfig(rank=2, targets=("w3",)))
    assert not winograd_conv.supports(x.bfloat16(), *layers)


def test_an_adapted_convolution_keeps_its_adapter():
    mlp = frozen_mlp()
    x = torch.randn(2, 32, 9)
    inject_lora(mlp, LoRAConfig(rank=4, targets=("w1",)))
    nn.init.normal_(mlp.w1.lora_B)
    exact = mlp(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(mlp(x).float(), exact) < BF16


def test_changed_weights_are_seen():
    """Merging an adapter writes into the weights; loading and casting replace them."""
    mlp, x = frozen_mlp(), torch.randn(2, 32, 8)

    def check() -> None:
        exact = copy.deepcopy(mlp).float()(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(mlp(x).float(), exact) < BF16

    check()
    mlp.w1.weight.add_(0.1)
    check()
    mlp.w2.weight.data = mlp.w2.weight.data + 0.1
    check()
    mlp.bfloat16()
    check()


def test_forgotten_weights_leave_memory_and_are_made_again():
    layer, x = nn.Conv1d(32, 24, 3, padding=1).requires_grad_(False), torch.randn(1, 8, 32).bfloat16()
    before = winograd_conv.conv(x, layer)
    kept = weakref.ref(winograd_conv.transformed(layer.weight))
    gc.collect()
    assert kept() is not None
    winograd_conv.forget()
    gc.collect()
    assert kept() is None
    assert torch.equal(winograd_conv.conv(x, layer), before)
