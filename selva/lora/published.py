"""Training of a published PiSSA adapter, continued: its changed base weights -> start values beside W, as ours keeps.

ComfyUI-SelVA trains A and B over a base weight that it has changed at the start, and we train the same function over
the base weight itself:

    W_res x + s B A x,  W_res = W - s B0 A0     there; s = alpha / rank, or alpha / sqrt(rank)
    W x + s (B A - B0 A0) x                     here, see :class:`selva.lora.layers.LoRALayer`

A, B, their gradients and the optimiser's state are the same in both. A0 and B0 follow from W - W_res.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from selva.lora.config import MAX_PROBLEMS
from selva.lora.inject import principal_factors
from selva.lora.layers import LoRALayer, lora_layers
from selva.lora.merge import RESIDUAL_SUFFIXES
from selva.utils.errors import UserError
from selva.utils.text import listed

log = logging.getLogger(__name__)

# Of the length of W and W_res together: what may be left of W - W_res beside its largest directions. Rounding to
# bfloat16 leaves at most half of it; the weights of another model leave hundreds of times as much.
MOST_REST = 2.0**-8
EXACT_REST = 2.0**-18  # what float32 leaves


@torch.no_grad()
def continued_state(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the factors of a step file with the start values of PiSSA, for :func:`selva.lora.state.load_lora_state_`.

    What W - W_res holds beside ``rank`` directions is rounding (to bfloat16, mostly) and is left out; the log says how
    much it is.

    Args:
        model: the adapted base model, with ``init="pissa"`` and the scale of the file.
        tensors: ``<layer>.lora_A`` (rank, in), ``.lora_B`` (out, rank), ``.linear.weight`` and ``.linear.bias``, as
            published; those of other step files are returned as they are.
        source: the file, for messages.

    Raises:
        ValueError: changed base weights do not belong to this base model; names the layers.
    """
    if not any(key.endswith(RESIDUAL_SUFFIXES) for key in tensors):
        return dict(tensors)
    state = {key: value for key, value in tensors.items() if not key.endswith(RESIDUAL_SUFFIXES)}
    problems, rests = [], []
    for name, layer in lora_layers(model):
        residual, bias = (tensors.get(name + suffix) for suffix in RESIDUAL_SUFFIXES)
        if residual is None:
            continue
        own = layer.weight.detach().float().cpu()
        if residual.shape != own.shape:
            problems.append(f"{name}.linear.weight is {tuple(residual.shape)}, here it is {tuple(own.shape)}")
            continue
        if not _is_own_bias(layer, bias):
            problems.append(f"{name}.linear.bias is not that of the base model")
            continue
        removed = own - residual.float()
        a0, b0 = principal_factors(removed / layer.lora_scale, len(layer.lora_A))
        rest = float((removed - layer.lora_scale * b0 @ a0).norm() / (own.norm() + residual.norm()))
        if rest > MOST_REST:
            problems.append(f"{name}.linear.weight was not made from this base model ({rest:.1%} of it does not fit)")
            continue
        signs = torch.where((a0 * state[f"{name}.lora_A"]).sum(1) < 0, -1.0, 1.0)  # a direction has two; take A's own
        state[f"{name}.lora_A0"], state[f"{name}.lora_B0"] = a0 * signs[:, None], b0 * signs
        rests.append(rest)
    if problems:
        raise UserError(f"{source}: its PiSSA base weights do not fit this model: {listed(problems, MAX_PROBLEMS)}; "
                        "give the --variant and the weights that it was trained on")
    if max(rests, default=0.0) > EXACT_REST:
        log.warning("%s: its changed base weights are rounded; the rounding (%.2g of their length) is left out, the "
                    "base model's own weights are used", source, max(rests))
    return state


def _is_own_bias(layer: LoRALayer, bias: Tensor | None) -> bool:
    if bias is None or layer.bias is None:
        return bias is None
    own = layer.bias.detach().float().cpu()
    largest = float(own.abs().max())
    return own.shape == bias.shape and torch.allclose(own, bias.float(), rtol=2.0**-7, atol=2.0**-7 * largest)


def published_targets(targets: tuple[str, ...], factors: Iterable[str]) -> tuple[str, ...]:
    """Return endings for the layers of a published file alone: its targets reach convolutions here, which it skips.

    Args:
        targets: as the file names them. factors: names of the tensors of its adapter.
    """
    layers = [key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")]
    longer = {t: [".".join(n.split(".")[-t.count(".") - 2 :]) for n in layers if n.endswith(t)] for t in targets}
    return tuple(dict.fromkeys(e for t in targets for e in ((t,) if t.endswith("attn.qkv") else longer[t])))
