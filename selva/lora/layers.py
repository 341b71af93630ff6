"""Linear layers and 1-D convolutions with a low-rank adapter, as :func:`selva.lora.inject.inject_lora` makes them.

    y = W x + b + scale * B(A x)        (LoRA, Hu et al., arXiv:2106.09685; scale = alpha / rank)

Knows ``nn.Module`` and none of our networks. An adapted layer keeps its place, its class relation (a ``LoRALinear`` is
an ``nn.Linear``) and its parameters ``weight`` and ``bias``, and gains ``lora_A`` and ``lora_B``. So the base model's
keys stay the published ones, and ``<layer>.lora_A`` is at once the parameter's name and its key in an adapter file.

    layer     lora_A            lora_B              lora_magnitude (DoRA only)
    Linear    (rank, in)        (out, rank)         (out,)
    Conv1d    (rank, in, k)     (out, rank, 1)      (out,)      a convolution of the same kernel, then a pointwise one
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.lora.merge import magnitude_excess, per_row


class LoRALayer(nn.Module):
    """Base class of the adapted layers. Made only by :func:`inject_lora`, from a layer that exists.

    Factors are float32 and stay so when the model is cast: a step of 1e-4 is lost in most bfloat16 weights. Each
    forward pass casts them to the type of its input.

    With PiSSA the frozen ``lora_A0`` and ``lora_B0`` hold the start values, and the layer computes

        W x + B A x - B0 A0 x  =  W x + (B - B0) A x + B0 (A - A0) x

    in the form on the right: W is never changed, and small differences are taken in float32 instead of between two
    large half-precision products. It is also an ordinary adapter of twice the rank.

    With DoRA (Liu et al., arXiv:2402.09353) the rows of the adapted weight W + dW, dW = scale * B A, get the trained
    lengths ``lora_magnitude`` m, which start at the lengths m0 of the rows of W. With y as above the layer returns

        b + m / n (y - b)  =  y + (m / n - 1) (y - b),      n = ||W + dW||, taken as a constant (section 4.3),

    in the form on the right, where a fresh adapter adds exactly nothing: n is computed from the stored m0 and from
    what B A adds to it, so m = n as long as B A = 0, whatever device or type the model has moved to since.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter | None
    lora_B0: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    lora_magnitude0: nn.Parameter | None
    lora_scale: float
    lora_dropout: float

    def lora_names(self) -> list[str]:
        return [name for name, value in self._parameters.items() if name.startswith("lora_") and value is not None]

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors whose product is the update of W, before the scale."""
        return update_factors(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def lora_input(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.lora_dropout, self.training)

    def with_magnitude(self, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return the output ``y`` of W + dW after DoRA has changed the lengths of its rows; without DoRA, ``y``.

        Args:
            down, up: :meth:`lora_factors`.
        """
        if self.lora_magnitude is None:
            return y
        excess = magnitude_excess(self.lora_magnitude, self.adapted_norms(down, up)).to(y.dtype)  # (out,)
        num_trailing = self.weight.dim() - 2  # axes of y after its channels
        of_weight = y if self.bias is None else y - per_row(self.bias.to(y.dtype), num_trailing)
        return y + per_row(excess, num_trailing) * of_weight

    @torch.no_grad()
    def adapted_norms(self, down: Tensor, up: Tensor) -> Tensor:
        """Return (out,) float32 lengths of the rows of W + dW, from ||W||^2 + 2 <W, dW> + ||dW||^2.

        Without the product B A, which is as large as W.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            down, up = down.flatten(1), self.lora_scale * up.flatten(1)  # (rank, in * k), (out, rank)
            along = self.weight.float().flatten(1) @ down.T  # (out, rank)
            added = ((2 * along + up @ (down @ down.T)) * up).sum(1)  # (out,)
            assert self.lora_magnitude0 is not None, "only DoRA asks for these lengths"
            return (self.lora_magnitude0.square() + added).clamp(min=0).sqrt()

    def _apply(self, fn, recurse: bool = True):
        """Move or cast the layer, but keep the factors in float32."""
        masters = {name: self.get_parameter(name).detach() for name in self.lora_names()}
        super()._apply(fn, recurse)
        for name, master in masters.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != torch.float32:
                parameter.data = master.to(parameter.device)
        return self


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer on (..., in) with an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.lora_factors()
        hidden = F.linear(self.lora_input(x), down.to(x.dtype)) * self.lora_scale  # (..., rank)
        y = F.linear(x, self.weight, self.bias) + F.linear(hidden, up.to(hidden.dtype))  # (..., out)
        return self.with_magnitude(y, down, up)


class LoRAConv1d(LoRALayer, nn.Conv1d):
    """A convolution on (B, in, tokens) with an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.lora_factors()
        # The base class's own convolution, so that stride, padding and dilation are those of W.
        hidden = self._conv_forward(self.lora_input(x), down.to(x.dtype), None) * self.lora_scale  # (B, rank, tokens)
        y = self._conv_forward(x, self.weight, self.bias) + F.conv1d(hidden, up.to(hidden.dtype))  # (B, out, tokens)
        return self.with_magnitude(y, down, up)


# Exact classes: a subclass may do something else in its forward, which the adapter would then miss.
ADAPTED_CLASS: dict[type[nn.Module], type[LoRALayer]] = {nn.Linear: LoRALinear, nn.Conv1d: LoRAConv1d}
PARAMETERS = ("lora_A", "lora_B", "lora_A0", "lora_B0", "lora_magnitude", "lora_magnitude0")  # of an adapted layer
KIND: dict[type[LoRALayer], str] = {LoRALinear: "linear", LoRAConv1d: "conv1d"}


def update_factors(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is ``B A - B0 A0``; ``a`` and ``b`` themselves when there are no start values.

    Args:
        a, a0: (rank, in[, k]).  b, b0: (out, rank[, 1]).

    Returns:
        (2 rank, in[, k]) and (out, 2 rank[, 1]) with start values.
    """
    if a0 is None or b0 is None:
        return a, b
    return torch.cat((a, a - a0)), torch.cat((b - b0, b0), dim=1)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Yield (name, layer) of the adapted layers in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module
