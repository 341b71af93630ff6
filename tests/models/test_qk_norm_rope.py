"""Queries, keys and values of the heads against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selva.models.blocks import rotary_table
from selva.models.qk_norm_rope import RMS_EPS, qk_norm_rope

HEADS, DIM = 3, 8
CPU = torch.device("cpu")


def by_definition(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
    q, k, v = qkv.unflatten(-1, (HEADS, DIM, 3)).transpose(1, 2).unbind(-1)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt() * weight
        (even, odd), (cos, sin) = (x[..., 0::2], x[..., 1::2]), rotary
        results.append(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2))
    return [*results, v]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("step", [0.0, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_heads_and_their_gradients(dtype, tolerance, step, compiled):
    cos, sin = rotary_table(6, DIM, step, CPU)
    qkv = torch.randn(2, 6, HEADS * DIM * 3).to(dtype)
    ours = [x.requires_grad_() for x in (qkv, torch.rand(DIM), torch.rand(DIM))]
    exact = [x.detach().double().requires_grad_() for x in ours]
    heads = torch.compile(qk_norm_rope, backend="aot_eager", fullgraph=True) if compiled else qk_norm_rope
    found = heads(*ours, (cos, sin))
    expected = by_definition(*exact, (cos.double(), sin.double()))
    towards = [torch.randn(2, HEADS, 6, DIM).to(dtype) for _ in range(3)]
    torch.autograd.backward(found, towards)
    torch.autograd.backward(expected, [x.double() for x in towards])
    for a, b in [*zip(found, expected, strict=True), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert a.shape == b.shape
        assert (a - b).norm() / b.norm() < tolerance
    assert [x.dtype for x in found] == [dtype] * 3


def test_products_depend_on_the_distance_only():
    ones, one_token = torch.ones(DIM), torch.randn(1, 1, HEADS * DIM * 3)
    q, k, _ = qk_norm_rope(one_token.expand(1, 12, -1), ones, ones, rotary_table(12, DIM, 1.0, CPU))
    torch.testing.assert_close(q.square().mean(-1), torch.ones(1, HEADS, 12))
    products = (q @ k.mT)[0, 0]
    torch.testing.assert_close(products.diagonal(-3), products[3, 0].expand(9), rtol=1e-4, atol=1e-4)
