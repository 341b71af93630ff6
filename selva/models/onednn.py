"""Layers of frozen networks that run at the rate of the processor: :func:`use_onednn_` gives them to a network.

PyTorch multiplies float32 matrices with MKL, which leaves the AVX-512 units of AMD processors unused; oneDNN, with
which PyTorch multiplies bfloat16 matrices anyway, does not. Only the last bits differ: 5e-7 of the size in float32.
Nothing changes on other devices, under autocast or where a gradient may be wanted.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes in which this processor multiplies matrices faster when oneDNN is asked for it directly.

    Measured on an AMD processor with AVX-512 and layers 768 to 5120 wide: float32 175 to 195 GFLOP/s per thread instead
    of 95; bfloat16 by a tenth, because a call leaves out what PyTorch does around it. Intel's MKL needs no help.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return frozenset()
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return frozenset({torch.bfloat16} | ({torch.float32} if "AuthenticAMD" in processor else set()))


def goes_to_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return True if :func:`linear` multiplies these two by oneDNN directly, which knows no gradients."""
    return (
        x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in onednn_dtypes()
        and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias`` (..., out), through the exact GELU if ``gelu``; ``x`` is (..., in)."""
    if goes_to_onednn(x, weight):
        # The only door to oneDNN's linear layer that takes ordinary tensors; torch.compile goes through it too.
        activation, kind = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, activation, [], kind)
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` (batch first) through :func:`linear`, in float32; in half precision it is PyTorch's.

    For the pictures of CLIP in float32 this takes 0.56 of PyTorch's time, in bfloat16 it would take 1.2 times as long.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return (B, l, dim) and None; ``query`` is (B, l, dim), ``key`` and ``value`` are one and the same tensor.

        Args:
            attn_mask: (l, keys), added to the scores.
        """
        assert key is value and not need_weights
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query.dtype != torch.float32 or not goes_to_onednn(query, weight):
            return super().forward(query, key, value, need_weights=False, attn_mask=attn_mask)[0], None
        if query is key:
            q, k, v = linear(query, weight, bias).chunk(3, dim=-1)
        else:
            q = linear(query, weight[:dim], bias[:dim])
            k, v = linear(key, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, ·, c)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)
        return linear(attended, self.out_proj.weight, self.out_proj.bias), None


def use_onednn_(network: nn.Module) -> None:
    """Let the linear and attention layers of ``network`` be those above; parameters and their names stay."""
    faster = {nn.Linear: Linear, nn.MultiheadAttention: MultiheadAttention}
    for layer in network.modules():
        layer.__class__ = faster.get(type(layer), type(layer))
