"""Half-precision weights multiplied in float32, each made float32 only while it multiplies.

    stored bfloat16 (out, in) --float32, for one product--> y = x W^T + b          forward
                              --float32, for one product--> dL/dx = dL/dy W        backward

For processors without half-precision instructions and with little memory: frozen weights take half the room, and the
arithmetic, its speed and its precision are those of float32. Autocast would be the other way round: products in half
precision, which such a processor makes many times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_input
from torch.overrides import TorchFunctionMode

HALF_TYPES = (torch.bfloat16, torch.float16)


def computing_in(precision: torch.dtype, stored: torch.dtype, device_type: str) -> AbstractContextManager[Any]:
    """Return the context in which a network computes in ``precision``.

    Args:
        precision: of the products; half precision is autocast's.
        stored: type of the network's matrices.
    """
    if precision != torch.float32:
        return torch.autocast(device_type, dtype=precision)
    return Widening() if stored in HALF_TYPES else nullcontext()


class Widening(TorchFunctionMode):
    """Linear layers and 1-D convolutions of float32 inputs by half-precision weights, within the ``with`` block.

    For frozen weights: they get no gradient, and the backward pass keeps them as they are stored, not in float32. Under
    autocast it changes nothing.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear and _is_widened(args):
            return _linear(*args, **kwargs)
        if func is F.conv1d and _is_widened(args):
            return _conv1d(*args, **kwargs)
        return func(*args, **kwargs)


def _is_widened(args: Sequence[Any]) -> bool:
    if len(args) < 2 or args[0].dtype != torch.float32 or args[1].dtype not in HALF_TYPES:
        return False
    return not torch.is_autocast_enabled(args[0].device.type)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _WidenedLinear.apply(x, weight)
    return y if bias is None else y + bias.float()


def _conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    y: Tensor = _WidenedConv1d.apply(x, weight, (stride, padding, dilation, groups))
    return y if bias is None else y + bias.float()[:, None]


class _WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.float(), None


class _WidenedConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.shape = settings, x.shape
        return F.conv1d(x, weight.float(), None, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return conv1d_input(ctx.shape, weight.float(), grad, *ctx.settings), None, None
