"""Convolutions of width 3 along the tokens with two thirds of the multiplications, for bfloat16 on CPUs.

Two neighbouring outputs of a three-tap filter g take four products instead of six (Winograd's F(2, 3); Lavin and Gray,
arXiv:1509.09308, section 4.1). With d0 ... d3 the four inputs under both outputs:

    m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    m3 = (d1 - d3) g2
    y0 = m0 + m1 + m2      y1 = m1 - m2 - m3

Each product is a matrix product over the channels. The gradient of the input is a convolution with the taps in reverse,
which only exchanges m0 and m3: the transformed weights serve both directions, and are made once per layer because the
weights are frozen. A forward and backward pass of a gated MLP takes 0.75 of the time of three ``conv1d``; its rounding
error doubles (4e-3 to 8e-3 of the result), that of the whole small_16k grows from 2.2e-2 to 2.7e-2. Float32
convolutions are left alone: PyTorch runs them at twice the rate of float32 matrix products.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from selva.utils.device import computes_on_cpu

FORWARD, REVERSED = (0, 1, 2, 3), (3, 1, 2, 0)  # which products m0 ... m3 belong to; reversed: taps from last to first


def supports(x: Tensor, *layers: nn.Module) -> bool:
    """Return True if ``layers``, convolutions of ``x`` or of its images, should run through this module."""
    if torch.compiler.is_compiling() or not computes_on_cpu(x):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16 and all(map(_is_frozen_and_plain, layers))


def _is_frozen_and_plain(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv1d:  # an adapted layer has an adapter to add
        return False
    weight, shape = layer.weight, (layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups)
    frozen = not (weight.requires_grad and torch.is_grad_enabled()) and not weight.is_inference()
    return frozen and shape == ((3,), (1,), (1,), (1,), 1)


def conv(x: Tensor, layer: nn.Conv1d) -> Tensor:
    """Return the convolution of ``x`` (B, tokens, in) along the tokens, (B, tokens, out) in bfloat16."""
    y = _Conv.apply(x.to(torch.bfloat16), transformed(layer.weight))
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def gated_mlp(x: Tensor, w1: nn.Conv1d, w2: nn.Conv1d, w3: nn.Conv1d) -> Tensor:
    """Return ``w2(silu(w1 x) * w3 x)`` of ``x`` (B, tokens, dim), the same in bfloat16; the layers have no bias."""
    return _GatedMLP.apply(x.to(torch.bfloat16), *(transformed(layer.weight) for layer in (w1, w2, w3)))


# Parameter -> (the weight it held, its version, the transformed weights). Holding the weight keeps its memory from
# being given to another one, so that address and version tell whether it is still the same.
_known: MutableMapping[Tensor, tuple[Tensor, int, Tensor]] = WeakTensorKeyDictionary()


def transformed(weight: Tensor) -> Tensor:
    """Return (4, out, in) bfloat16, the factors of m0 ... m3 for a weight (out, in, 3); anew when it has changed."""
    known = _known.get(weight)
    if known is not None:
        held, version, factors = known
        if held.data_ptr() == weight.data_ptr() and version == weight._version:
            return factors
    with torch.no_grad():
        g0, g1, g2 = weight.float().unbind(-1)
        factors = torch.stack((g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)).to(torch.bfloat16)
    _known[weight] = weight.detach(), weight._version, factors
    return factors


def forget() -> None:
    """Free all transformed weights, which take a third more memory than the weights; made again when needed."""
    _known.clear()


def _tiles(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return (4, B * tiles, C), the inputs of the four products, of ``x`` (B, tokens, C); a tile is two outputs."""
    batch, tokens, channels = x.shape
    count = (tokens + 1) // 2
    pairs = F.pad(x, (0, 0, 1, 2 * count - tokens + 1)).view(batch, count + 1, 2, channels)
    d0, d1, d2, d3 = pairs[:, :-1, 0], pairs[:, :-1, 1], pairs[:, 1:, 0], pairs[:, 1:, 1]
    tiles = x.new_empty(4, batch, count, channels)
    for place, (operation, a, b) in zip(
        order, ((torch.sub, d0, d2), (torch.add, d1, d2), (torch.sub, d2, d1), (torch.sub, d1, d3)), strict=True
    ):
        operation(a, b, out=tiles[place])
    return tiles.flatten(1, 2)


def _outputs(products: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """Return (B, tokens, C) of the four products (4, B * tiles, C), overwritten here; ``shape`` is (B, tokens, ...)."""
    batch, tokens = shape[:2]
    m0, m1, m2, m3 = (products[place].unflatten(0, (batch, -1)) for place in order)
    y = products.new_empty(batch, m0.shape[1], 2, m0.shape[2])
    torch.add(m0.add_(m1), m2, out=y[:, :, 0])
    torch.sub(m1.sub_(m2), m3, out=y[:, :, 1])
    return y.flatten(1, 2)[:, :tokens]


def _forward(x: Tensor, factors: Tensor) -> Tensor:
    return _outputs(torch.bmm(_tiles(x, FORWARD), factors.mT), x.shape, FORWARD)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return _forward(x, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return _outputs(torch.bmm(_tiles(grad, REVERSED), factors), grad.shape, REVERSED), None


class _GatedMLP(torch.autograd.Function):
    """The gated MLP; keeps the results of the two inner convolutions, and computes the gate again when going back."""

    @staticmethod
    def forward(ctx, x: Tensor, f1: Tensor, f2: Tensor, f3: Tensor) -> Tensor:
        tiles = _tiles(x, FORWARD)
        gate, value = (_outputs(torch.bmm(tiles, f.mT), x.shape, FORWARD) for f in (f1, f3))
        ctx.save_for_backward(gate, value, f1, f2, f3)
        return _forward(F.silu(gate).mul_(value), f2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gate, value, f1, f2, f3 = ctx.saved_tensors
        grad_hidden = _outputs(torch.bmm(_tiles(grad, REVERSED), f2), grad.shape, REVERSED)
        grad_value = grad_hidden * F.silu(gate)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(value), gate)
        products = torch.bmm(_tiles(grad_gate, REVERSED), f1)
        products.baddbmm_(_tiles(grad_value, REVERSED), f3)
        return _outputs(products, grad.shape, REVERSED), None, None, None
