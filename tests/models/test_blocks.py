"""The building blocks against closed forms."""

from __future__ import annotations

import pytest
import torch

from selva.models.blocks import SelfAttention, attend, rotary_table


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_is_the_softmax_of_scaled_products(dtype, tolerance):
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    expected = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    result = attend(*(x.to(dtype) for x in (q, k, v)))
    assert result.dtype == dtype
    assert (result - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_the_gradient_of_its_definition(dtype):
    inputs = [torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3)]
    exact, ours = ([x.detach().to(d, copy=True).requires_grad_() for x in inputs] for d in (torch.float64, dtype))
    q, k, v = exact
    ((q @ k.mT / 2).softmax(-1) @ v).square().sum().backward()
    attend(*ours).square().sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad - b.grad).norm() / b.grad.norm() < (1e-5 if dtype == torch.float32 else 5e-2)


def test_projections_have_no_gaps_so_that_fused_attention_takes_them():
    q, k, v = SelfAttention(32, 2)(torch.randn(2, 5, 32), rotary_table(5, 16, 1.0, torch.device("cpu")))
    assert [x.stride(-1) for x in (q, k, v)] == [1, 1, 1]
