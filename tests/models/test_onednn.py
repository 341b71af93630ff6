"""Linear and attention layers through oneDNN: the numbers of PyTorch's own, and when they are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selva.models import onednn
from selva.models.onednn import Linear, MultiheadAttention, linear, use_onednn_


@pytest.fixture
def pointwise_calls(monkeypatch):
    """Count what goes to oneDNN directly, in float32 on every processor that can."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        pytest.skip("a processor without AVX-512 or a PyTorch without oneDNN")
    calls, original = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(onednn, "onednn_dtypes", lambda: frozenset({torch.float32, torch.bfloat16}))
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: (calls.append(args[3]), original(*args))[1]
    )
    return calls


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_linear_layer_through_onednn_is_the_same_layer(pointwise_calls, shape, gelu, bias):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    expected = layer.double()(x.double())
    expected = (F.gelu(expected) if gelu else expected).float()
    layer.float()
    torch.testing.assert_close(linear(x, layer.weight, layer.bias, gelu), expected, rtol=1e-5, atol=1e-6)
    with_gaps = x.repeat_interleave(2, dim=-1)[..., ::2]
    torch.testing.assert_close(linear(with_gaps, layer.weight, layer.bias, gelu), expected, rtol=1e-5, atol=1e-6)
    layer.to(torch.bfloat16)
    half = linear(x.bfloat16(), layer.weight, layer.bias, gelu)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
    assert pointwise_calls == ["gelu" if gelu else "none"] * 3


def test_gradients_and_autocast_take_the_ordinary_path(pointwise_calls):
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    use_onednn_(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and pointwise_calls == []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert pointwise_calls == []
    with torch.no_grad():
        layer(x)
    assert pointwise_calls == ["none"]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_attention_is_that_of_pytorch(pointwise_calls, same, masked, gradients):
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    network = nn.ModuleDict({"attn": theirs, "fc": nn.Linear(2, 2)})
    names, tokens = list(network.state_dict()), torch.randn(2, 6, 24)
    query = tokens if same else torch.randn(2, 4, 24)
    mask = torch.full((query.shape[1], 6), -torch.inf).triu_(1) if masked else None
    with torch.set_grad_enabled(gradients):
        expected = theirs(query, tokens, tokens, need_weights=False, attn_mask=mask)[0]
        use_onednn_(network)
        found = network["attn"](query, tokens, tokens, need_weights=False, attn_mask=mask)[0]
    assert type(network["attn"]) is MultiheadAttention and type(network["fc"]) is Linear
    assert list(network.state_dict()) == names
    assert bool(pointwise_calls) is not gradients
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("capability", "processor", "expected"),
    [
        ("AVX512", "vendor_id : AuthenticAMD", {torch.float32, torch.bfloat16}),
        ("AVX512", "vendor_id : GenuineIntel", {torch.bfloat16}),
        ("AVX2", "vendor_id : AuthenticAMD", set()),
    ],
)
def test_float32_goes_to_onednn_only_where_mkl_is_slow(monkeypatch, capability, processor, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(onednn.Path, "exists", lambda path: True)
    monkeypatch.setattr(onednn.Path, "read_text", lambda path: processor)
    assert onednn.onednn_dtypes.__wrapped__() == expected
