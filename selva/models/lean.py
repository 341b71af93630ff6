"""Operations of frozen networks that keep for the backward pass no more than it reads; the same numbers, bit for bit.

PyTorch keeps the input of every convolution, which only the gradient of its weights needs, and of ``silu(a) * b`` a, b
and silu(a). With an adapter beside frozen weights, that is a fifth of what a step keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def silu_mul(gate: Tensor, value: Tensor) -> Tensor:
    """Return ``silu(gate) * value``, of two tensors of one shape and type; keeps the two."""
    if torch.compiler.is_compiling() or gate.dtype != value.dtype:
        return F.silu(gate) * value
    return _SiluMul.apply(gate, value)


def frozen_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)`` of (B, in, tokens); a convolution whose weights get no gradient does not keep ``x``."""
    if type(layer) is not nn.Conv1d or torch.compiler.is_compiling() or not _is_frozen(layer, x):
        return layer(x)
    return _FrozenConv.apply(x.to(layer.weight.dtype), layer.weight, layer.bias, layer)


def one_more_(scale: Tensor) -> Tensor:
    """Return ``1 + scale``, in the memory of ``scale`` where no gradient needs the number that was there."""
    return 1 + scale if scale.requires_grad else scale.add_(1)


def _is_frozen(layer: nn.Conv1d, x: Tensor) -> bool:
    """Return True where only ``x`` may get a gradient, and the layer computes in the type of its weight."""
    if not (torch.is_grad_enabled() and x.requires_grad) or any(p.requires_grad for p in layer.parameters()):
        return False
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return layer.weight.dtype == dtype and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv1d) -> Tensor:
        ctx.save_for_backward(weight)
        assert not isinstance(layer.padding, str), layer.padding
        ctx.settings = layer.stride, layer.padding, layer.dilation, layer.groups
        ctx.size, ctx.strides = x.shape, x.stride()
        return F.conv1d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Its numbers are not read, but its strides choose the kernel: that of the ordinary backward pass.
        x = torch.empty_strided(ctx.size, ctx.strides, dtype=weight.dtype, device=weight.device)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0], groups, (True, False, False))
        return grad_x, None, None, None
