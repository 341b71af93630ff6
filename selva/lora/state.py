"""Parameters of an adapted model: for the optimiser, for resuming, and in the form that adapter files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selva.lora.config import MAX_PROBLEMS
from selva.lora.layers import lora_layers, update_factors
from selva.lora.merge import MAGNITUDE_SUFFIX, padded_to_one_rank
from selva.utils.text import listed


def named_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters themselves behind the keys of :func:`lora_state_dict`."""
    return {
        f"{name}.{key}": layer.get_parameter(key) for name, layer in lora_layers(model) for key in layer.lora_names()
    }


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters: all A in module order, then all B, then with DoRA all magnitudes."""
    return [parameter for group in lora_plus_groups(model, lr=0.0) for parameter in group["params"]]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return optimiser groups: all A with ``lr``, all B with ``ratio * lr`` (LoRA+, arXiv:2402.12354).

    Always these two, A first, so that the optimiser state of a published step file fits. With DoRA a third: the
    magnitudes with ``lr``, and without weight decay, which would pull them to zero instead of to the base model.
    """
    layers = [layer for _, layer in lora_layers(model)]
    magnitudes = [layer.lora_magnitude for layer in layers if layer.lora_magnitude is not None]
    groups = [
        {"params": [layer.lora_A for layer in layers], "lr": lr},
        {"params": [layer.lora_B for layer in layers], "lr": lr * ratio},
    ]
    return [*groups, {"params": magnitudes, "lr": lr, "weight_decay": 0.0}] if magnitudes else groups


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters as they are trained, ``<layer>.lora_A`` and so on: copies on the CPU, float32, unscaled.

    Includes the start values of PiSSA and DoRA. What :func:`load_lora_state_` restores bit for bit; for use, see
    :func:`adapter_tensors`.
    """
    return {key: parameter.detach().to("cpu", copy=True) for key, parameter in named_factors(model).items()}


@torch.no_grad()
def load_lora_state_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the result of :func:`lora_state_dict` into the adapters of ``model``, in place.

    Raises:
        ValueError: names every tensor that is missing, left over or of another shape; nothing is copied then.
    """
    own = named_factors(model)
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} belongs to no adapted layer" for key in tensors if key not in own]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError(f"these adapter tensors do not fit the adapted model: {listed(problems, MAX_PROBLEMS)}")
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


def adapter_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return ``lora_A`` and ``lora_B`` of every adapted layer such that their plain product is the update of W.

    The scale is folded into B, PiSSA's start values are worked in (which doubles the rank), and smaller ranks are
    padded with zeros to one common rank: the form in which ComfyUI-SelVA reads every adapter right. With DoRA each
    layer's ``lora_magnitude`` comes along.

    Args:
        state: values to export instead of the current ones, with keys of :func:`lora_state_dict` (an average over the
            training, for instance).

    Raises:
        ValueError: ``state`` has tensors that the model has no place for.
    """
    current = lora_state_dict(model)
    foreign = [key for key in state or {} if key not in current]
    if foreign:
        raise ValueError(f"these tensors belong to no adapted layer: {listed(foreign, MAX_PROBLEMS)}")
    state = {**current, **(state or {})}
    pairs = {}
    for name, layer in lora_layers(model):
        starts = state.get(f"{name}.lora_A0"), state.get(f"{name}.lora_B0")
        a, b = update_factors(state[f"{name}.lora_A"], state[f"{name}.lora_B"], *starts)
        # With scale 1 the tensor itself, so that a file with both forms stores it once.
        pairs[name] = a, b if layer.lora_scale == 1 else b * layer.lora_scale
    magnitudes = {key: value for key, value in state.items() if key.endswith(MAGNITUDE_SUFFIX)}
    return {**padded_to_one_rank(pairs), **magnitudes}
