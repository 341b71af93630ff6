"""Parameters of an adapted model: for the optimiser, for resuming, and in the form that adapter files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selva.lora.config import MAX_PROBLEMS
from selva.lora.layers import lora_layers, update_factors
from selva.lora.merge import MAGNITUDE_SUFFIX, Adapter, padded_to_one_rank
from selva.utils.errors import UserError
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
    magnitudes with ``lr``, and without weight decay, which would pull them to zero instead of to the base model. So it
    would the factors of PiSSA, whose decay is :func:`decay_to_start_`.
    """
    layers = [layer for _, layer in lora_layers(model)]
    magnitudes = [layer.lora_magnitude for layer in layers if layer.lora_magnitude is not None]
    own_decay = {"weight_decay": 0.0} if any(layer.lora_A0 is not None for layer in layers) else {}
    groups = [
        {"params": [layer.lora_A for layer in layers], "lr": lr, **own_decay},
        {"params": [layer.lora_B for layer in layers], "lr": lr * ratio, **own_decay},
    ]
    return [*groups, {"params": magnitudes, "lr": lr, "weight_decay": 0.0}] if magnitudes else groups


@torch.no_grad()
def decay_to_start_(model: nn.Module, of_a: Tensor | float, of_b: Tensor | float) -> None:
    """Take PiSSA's factors a part of the way back to their start values, in place; others are left alone.

    The decoupled weight decay of an adapter that starts at W's principal directions: it acts on A - A0 and B - B0,
    which change the model, and not on the directions themselves.

    Args:
        of_a, of_b: the part of the way for A and for B: learning rate times decay.
    """
    for _, layer in lora_layers(model):
        for factor, start, part in ((layer.lora_A, layer.lora_A0, of_a), (layer.lora_B, layer.lora_B0, of_b)):
            if start is not None:
                factor.add_((start - factor) * part)


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
        raise UserError(f"these adapter tensors do not fit the adapted model: {listed(problems, MAX_PROBLEMS)}")
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Return a context in which ``model`` computes exactly what the base model does, whatever its adapters hold.

    They hold their start values meanwhile (of which the update is nothing), and what they held comes back at the end.
    """
    held = lora_state_dict(model)
    try:
        with torch.no_grad():
            for _, layer in lora_layers(model):
                if layer.lora_A0 is not None and layer.lora_B0 is not None:
                    layer.lora_A.copy_(layer.lora_A0)
                    layer.lora_B.copy_(layer.lora_B0)
                else:
                    layer.lora_B.zero_()
                if layer.lora_magnitude is not None and layer.lora_magnitude0 is not None:
                    layer.lora_magnitude.copy_(layer.lora_magnitude0)
        yield
    finally:
        load_lora_state_(model, held)


@torch.no_grad()
def start_from_adapter_(model: nn.Module, adapter: Adapter) -> list[str]:
    """Put a finished adapter into the fresh adapters of ``model``, in place; return the layers that it does not change.

    The update of every weight becomes that of the adapter. Directions beyond the adapter's rank stay fresh: their B is
    zero, so they change nothing yet and can be trained.

    Raises:
        ValueError: names every layer that the adapter changes and that has no place for it; nothing is changed then.
    """
    if adapter.is_pissa:
        raise UserError(f"{adapter.source}: holds changed base weights (PiSSA as published), no run can start there; "
                         "give an adapter that was trained with --init standard")
    layers, problems = dict(lora_layers(model)), []
    used = {name: _used_factors(*adapter.factors(name)) for name in adapter.layer_names()}
    for name, (a, b) in used.items():
        if name not in layers:
            problems.append(f"{name} has no adapter here (--target)")
            continue
        layer, magnitude = layers[name], adapter.tensors.get(name + MAGNITUDE_SUFFIX)
        if (b.shape[0], *a.shape[1:]) != tuple(layer.weight.shape):
            problems.append(f"{name} is for a weight of {(b.shape[0], *a.shape[1:])}, here it is "
                            f"{tuple(layer.weight.shape)}")
        elif len(a) > len(layer.lora_A):
            problems.append(f"{name} has rank {len(a)}, here it is {len(layer.lora_A)} (--rank)")
        elif magnitude is not None and layer.lora_magnitude is None:
            problems.append(f"{name} has a DoRA magnitude (--dora)")
    if problems:
        raise UserError(f"{adapter.source}: a run with these settings cannot start at this adapter: "
                         f"{listed(problems, MAX_PROBLEMS)}")
    for name, (a, b) in used.items():
        layer, rank = layers[name], len(a)
        layer.lora_A[:rank] = a
        layer.lora_B[:, :rank] = b * (adapter.scale(name) / layer.lora_scale)
        if layer.lora_magnitude is not None:  # without one, a row has the length that its update gives it
            magnitude = adapter.tensors.get(name + MAGNITUDE_SUFFIX)
            layer.lora_magnitude.copy_(layer.adapted_norms(*layer.lora_factors()) if magnitude is None else magnitude)
    return [name for name in layers if name not in used]


def _used_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B without the directions that change nothing, such as those that fill up to a common rank."""
    used = a.flatten(1).any(1) & b.flatten(2).any(2).any(0) if b.dim() > 2 else a.flatten(1).any(1) & b.any(0)
    return a[used], b[:, used]


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
        raise UserError(f"these tensors belong to no adapted layer: {listed(foreign, MAX_PROBLEMS)}")
    state = {**current, **(state or {})}
    pairs = {}
    for name, layer in lora_layers(model):
        starts = state.get(f"{name}.lora_A0"), state.get(f"{name}.lora_B0")
        a, b = update_factors(state[f"{name}.lora_A"], state[f"{name}.lora_B"], *starts)
        # With scale 1 the tensor itself, so that a file with both forms stores it once.
        pairs[name] = a, b if layer.lora_scale == 1 else b * layer.lora_scale
    magnitudes = {key: value for key, value in state.items() if key.endswith(MAGNITUDE_SUFFIX)}
    return {**padded_to_one_rank(pairs), **magnitudes}
