"""selva.models.lean: the numbers of PyTorch's own operations, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selva.models.blocks import ConvMLP, FusedBlock
from selva.models.lean import frozen_conv, one_more_, silu_mul
from selva.training.memory import LiveStorages

TYPES = (torch.float32, torch.bfloat16)


def grads(function, *inputs, seed=1):
    """Return the result and the gradients of the inputs, for a random gradient of the result."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = function(*inputs)
    towards = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result.dtype)
    result.backward(towards)
    return [result.detach(), *(x.grad for x in inputs)]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and a.any()


@pytest.mark.parametrize("dtype", TYPES)
def test_gates_are_those_of_pytorch_bit_for_bit(dtype):
    gate, value = torch.randn(2, 3, 40).to(dtype), torch.randn(2, 3, 40).to(dtype)
    assert_same(grads(silu_mul, gate, value), grads(lambda a, b: F.silu(a) * b, gate, value))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("channel_last", [False, True])
def test_convolutions_are_those_of_pytorch_bit_for_bit(dtype, kernel, channel_last):
    layer = nn.Conv1d(24, 16, kernel, padding=kernel // 2).to(dtype).requires_grad_(False)
    x = (torch.randn(2, 30, 24).mT if channel_last else torch.randn(2, 24, 30)).to(dtype)
    assert_same(grads(lambda x: frozen_conv(layer, x), x), grads(layer, x))


def test_autocast_is_followed():
    layer = nn.Conv1d(8, 8, 3).to(torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 8, 9)
        assert_same(grads(lambda x: frozen_conv(layer, x), x), grads(layer, x))
        single = nn.Conv1d(8, 8, 3).requires_grad_(False)  # its weight has another type than the result
        assert_same(grads(lambda x: frozen_conv(single, x), x), grads(single, x))


def test_a_convolution_that_is_trained_gets_its_gradient():
    layer = nn.Conv1d(8, 8, 3)
    frozen_conv(layer, torch.randn(2, 8, 9, requires_grad=True)).sum().backward()
    assert layer.weight.grad.any() and layer.bias.grad.any()


def test_one_more_overwrites_only_what_no_gradient_needs():
    x = torch.randn(3)
    assert torch.equal(one_more_(x.clone()), 1 + x)
    assert one_more_(x).data_ptr() == x.data_ptr()
    x = torch.randn(3, requires_grad=True)
    before = x.detach().clone()
    one_more_(x).sum().backward()
    assert torch.equal(x, before) and torch.equal(x.grad, torch.ones(3))


def test_what_a_gated_mlp_keeps():
    """The two products that it gates: neither its input nor the gated product, of which only weights would profit."""
    mlp = ConvMLP(32, 256, 3).requires_grad_(False)
    x = torch.randn(1, 32, 512, requires_grad=True)
    with LiveStorages() as live:
        y = mlp(x * 2)
        assert live.total == (2 * 256 + 32) * 512 * 4 and y.requires_grad


@pytest.mark.parametrize("trained", [False, True])
def test_a_block_has_the_gradients_that_its_formulas_have(trained, monkeypatch):
    """Against the same block written out, also where the conditions are trained."""
    torch.manual_seed(0)
    block = FusedBlock(32, 2, 4.0).requires_grad_(False)
    for p in block.parameters():
        p.normal_(std=0.2)
    block.attn.qkv.weight.requires_grad_()
    x, c = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    rotary = torch.randn(9, 8), torch.randn(9, 8)
    conditions = (lambda c: c) if trained else torch.Tensor.detach

    def run():
        block.attn.qkv.weight.grad = None
        return [*grads(lambda x, c: block(x, conditions(c), rotary) + 0 * c, x, c), block.attn.qkv.weight.grad]

    found = run()
    monkeypatch.setattr("selva.models.blocks.frozen_conv", lambda layer, x: layer(x))
    monkeypatch.setattr("selva.models.blocks.silu_mul", lambda a, b: F.silu(a) * b)
    monkeypatch.setattr("selva.models.blocks.one_more_", lambda x: 1 + x)
    for one, two in zip(found, run(), strict=True):
        assert torch.equal(one, two)
