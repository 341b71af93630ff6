"""Low-rank adapters on linear layers and 1-D convolutions: inject, train, export. (Merging is in ``adapter.py``.)

    y = W x + b + scale * B(A x)        (LoRA, Hu et al., arXiv:2106.09685; scale = alpha / rank)

Knows ``nn.Module`` and none of our networks. An adapted layer keeps its place, its class relation (a ``LoRALinear`` is
an ``nn.Linear``) and its parameters ``weight`` and ``bias``, and gains ``lora_A`` and ``lora_B``. So the base model's
keys stay the published ones, and ``<layer>.lora_A`` is at once the parameter's name and its key in an adapter file.

    layer     lora_A            lora_B              lora_magnitude (DoRA only)
    Linear    (rank, in)        (out, rank)         (out,)
    Conv1d    (rank, in, k)     (out, rank, 1)      (out,)      a convolution of the same kernel, then a pointwise one
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.lora.config import LoRAConfig, expand_targets, no_match_message, parse_targets
from selva.lora.merge import (
    MAGNITUDE_SUFFIX,
    Adapter,
    magnitude_excess,
    merge_adapter,
    merge_adapters,
    merged_adapters,
    padded_to_one_rank,
    per_row,
    row_norms,
)
from selva.utils.text import listed

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "InjectReport",
    "LoRAConfig",
    "LoRALayer",
    "adapter_tensors",
    "expand_targets",
    "inject_lora",
    "load_lora_state_",
    "lora_layers",
    "lora_parameters",
    "lora_plus_groups",
    "lora_state_dict",
    "merge_adapter",
    "merge_adapters",
    "merged_adapters",
    "named_factors",
    "parse_targets",
    "remove_lora",
]


# ---------------------------------------------------------------------------------------------------------------
# adapted layers
# ---------------------------------------------------------------------------------------------------------------


class LoRALayer(nn.Module):
    """What both kinds of adapted layers share. Made only by :func:`inject_lora`, from a layer that exists.

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
            return (self.lora_magnitude0.square() + added).clamp(min=0).sqrt()

    def _apply(self, fn, recurse: bool = True):
        """Move or cast the layer, but keep the factors in float32."""
        masters = {name: self._parameters[name].detach() for name in self.lora_names()}
        super()._apply(fn, recurse)
        for name, master in masters.items():
            parameter = self._parameters[name]
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
KIND = {LoRALinear: "linear", LoRAConv1d: "conv1d"}


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


# ---------------------------------------------------------------------------------------------------------------
# injection
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer; ``kind`` is "linear" or "conv1d", ``num_parameters`` counts what is trained."""

    name: str
    kind: str
    rank: int
    in_features: int
    out_features: int
    num_parameters: int


@dataclass(frozen=True)
class InjectReport:
    """What :func:`inject_lora` did.

    Attributes:
        layers: the adapted layers in module order.
        skipped: (name, reason) of modules whose name ends with a target and that were left alone.
        config: the settings it followed.
    """

    layers: list[AdaptedLayer]
    skipped: list[tuple[str, str]]
    config: LoRAConfig

    @property
    def wrapped(self) -> list[str]:
        """Names of the adapted layers."""
        return [layer.name for layer in self.layers]

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    def summary(self) -> str:
        """Return one line: adapted layers by kind, trained parameters, and how many matches were left alone."""
        kinds = [layer.kind for layer in self.layers]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KIND.values() if kind in kinds)
        dora = " with DoRA" if self.config.dora else ""
        skipped = f", {len(self.skipped)} matching modules skipped" if self.skipped else ""
        return f"{len(kinds)} layers adapted{dora} ({counts}), {self.num_parameters:,} trainable parameters{skipped}"

    @property
    def notice(self) -> list[str]:
        """Lines on what a user may not expect: matches that are not adapted, and where the adapter will not load."""
        lines = []
        for reason in dict.fromkeys(reason for _, reason in self.skipped):
            names = [name for name, why in self.skipped if why == reason]
            lines.append(f"matched by a target but not adapted, being {reason}: {listed(names)}")
        convolutions = sum(layer.kind == "conv1d" for layer in self.layers)
        causes, remedies = [], []
        if convolutions:
            causes.append(f"{convolutions} of {len(self.layers)} adapted layers are convolutions")
            if targets := self.linear_targets():
                remedies.append(f"with the targets {' '.join(targets)}")
        if self.config.dora:
            causes.append("it uses DoRA")
            remedies.append("without DoRA")
        if causes:
            remedy = f"; trained {' and '.join(remedies)} it would load there" if remedies else ""
            lines.append(f"ComfyUI-SelVA will refuse this adapter: {' and '.join(causes)}{remedy}")
        return lines

    def linear_targets(self) -> list[str]:
        """Return targets for the adapted linear layers alone, without the convolutions."""
        convolutions = [layer.name for layer in self.layers if layer.kind == "conv1d"]
        targets = []
        for layer in self.layers:
            if layer.kind == "linear":
                target, parts = self.config.target_of(layer.name), layer.name.split(".")
                longer = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
                candidates = [target, *(ending for ending in longer if len(ending) > len(target))]
                targets.append(next(c for c in candidates if not any(name.endswith(c) for name in convolutions)))
        return list(dict.fromkeys(targets))


def inject_lora(model: nn.Module, cfg: LoRAConfig, generator: torch.Generator | None = None) -> InjectReport:
    """Freeze ``model``, give the layers that ``cfg.targets`` names an adapter, in place, and return what was done.

    Afterwards only ``lora_A``, ``lora_B`` and, with DoRA, ``lora_magnitude`` require gradients. The output is unchanged
    bit for bit.

    Args:
        generator: a CPU random number generator for A (default: the global one). The same numbers on every device.

    Raises:
        ValueError: the model has adapters already, a target fits no layer, PiSSA's rank exceeds a layer's size, or
            DoRA is asked for on layers that have an adapter merged. The model is then as it was.
    """
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already; merge them or call remove_lora(model) first")
    matches, skipped = _match(model, cfg.targets)
    if cfg.init == "pissa":
        _check_pissa_rank(matches, cfg)
    if cfg.dora:
        _check_unmerged(matches)

    model.requires_grad_(False)
    layers = []
    for name, module in matches.items():
        rank = cfg.rank_of(name)
        _adapt_(module, rank, cfg.scale(rank), cfg, generator)
        out_features, in_features = module.weight.shape[:2]
        num_trained = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        layers.append(AdaptedLayer(name, KIND[type(module)], rank, in_features, out_features, num_trained))
    model.lora_config = cfg
    return InjectReport(layers, skipped, cfg)


def _match(model: nn.Module, targets: Sequence[str]) -> tuple[dict[str, nn.Module], list[tuple[str, str]]]:
    """Return the layers to adapt by name, and (name, reason) of the matching modules that cannot be adapted."""
    matches: dict[str, nn.Module] = {}
    skipped = []
    for name, module in model.named_modules():
        if not name.endswith(tuple(targets)):
            continue
        if type(module) not in ADAPTED_CLASS:
            skipped.append((name, f"a {type(module).__name__}, neither nn.Linear nor nn.Conv1d"))
        elif isinstance(module, nn.Conv1d) and module.groups > 1:
            skipped.append((name, f"a convolution in {module.groups} groups"))
        else:
            matches[name] = module
    idle = [target for target in targets if not any(name.endswith(target) for name in matches)]
    if idle:
        names = [name for name, module in model.named_modules() if type(module) in ADAPTED_CLASS]
        raise ValueError(no_match_message(names, idle, skipped))
    return matches, skipped


def _check_pissa_rank(matches: Mapping[str, nn.Module], cfg: LoRAConfig) -> None:
    problems = [
        f"{name} has rank at most {min(module.weight.flatten(1).shape)}, asked for {cfg.rank_of(name)}"
        for name, module in matches.items()
        if cfg.rank_of(name) > min(module.weight.flatten(1).shape)
    ]
    if problems:
        raise ValueError(f"init 'pissa' cannot start from more directions than a layer has: {listed(problems)}")


def _check_unmerged(matches: Mapping[str, nn.Module]) -> None:
    merged = [name for name, module in matches.items() if getattr(module, "has_merged_adapter", False)]
    if merged:
        raise ValueError(
            "a DoRA adapter is relative to the base weights, but these layers have another adapter merged: "
            f"{listed(merged)}; train it on the base model"
        )


def _adapt_(
    module: nn.Module, rank: int, scale: float, cfg: LoRAConfig, generator: torch.Generator | None
) -> None:
    """Turn an ``nn.Linear`` or ``nn.Conv1d`` into its adapted class."""
    weight = module.weight  # (out, in[, k])
    # Changing the class keeps the object: its weight, its hooks, and every reference to it stay valid.
    module.__class__ = ADAPTED_CLASS[type(module)]
    module.lora_scale, module.lora_dropout = scale, cfg.dropout
    if cfg.init == "pissa":
        a, b = principal_factors(weight, rank)
    else:
        # He-uniform with a = sqrt(5), as nn.Linear starts: uniform in +-1/sqrt(fan in).
        bound = 1 / math.sqrt(weight[0].numel())
        a = torch.empty(rank, *weight.shape[1:], device="cpu").uniform_(-bound, bound, generator=generator)
        b = torch.zeros(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
    trained = {"lora_A": a.to(weight.device), "lora_B": b.to(weight.device)}
    starts = {f"{name}0": value.clone() for name, value in trained.items()} if cfg.init == "pissa" else {}
    if cfg.dora:
        trained["lora_magnitude"], starts["lora_magnitude0"] = row_norms(weight), row_norms(weight)
    for name in PARAMETERS:
        value = trained.get(name, starts.get(name))
        module.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=name in trained))


def principal_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in[, k]) and B (out, rank[, 1]) whose product is the best approximation of ``weight``.

    ``A = sqrt(S) V^T`` and ``B = U sqrt(S)`` of the ``rank`` largest singular values (PiSSA, arXiv:2404.02948), in
    float32; unique up to signs.
    """
    u, s, vh = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    a = (root[:, None] * vh[:rank]).reshape(rank, *weight.shape[1:])
    b = (u[:, :rank] * root).reshape(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
    return a.contiguous(), b.contiguous()


def remove_lora(model: nn.Module) -> None:
    """Turn every adapted layer of ``model`` back into the plain one, in place; the base stays frozen."""
    for _, layer in list(lora_layers(model)):
        for name in (*PARAMETERS, "lora_scale", "lora_dropout"):
            delattr(layer, name)
        layer.__class__ = next(plain for plain, adapted in ADAPTED_CLASS.items() if adapted is type(layer))
    if hasattr(model, "lora_config"):
        del model.lora_config


# ---------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Yield (name, layer) of the adapted layers in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def named_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters themselves behind the keys of :func:`lora_state_dict`."""
    return {
        f"{name}.{key}": layer.get_parameter(key) for name, layer in lora_layers(model) for key in layer.lora_names()
    }


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what is trained: all A in module order, then all B, then with DoRA all magnitudes."""
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
        raise ValueError(f"these adapter tensors do not fit the adapted model: {listed(problems)}")
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
        raise ValueError(f"these tensors belong to no adapted layer: {listed(foreign)}")
    state = {**current, **(state or {})}
    pairs = {}
    for name, layer in lora_layers(model):
        factors = (state.get(f"{name}.{key}") for key in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
        a, b = update_factors(*factors)
        # With scale 1 the tensor itself, so that a file with both forms stores it once.
        pairs[name] = a, b if layer.lora_scale == 1 else b * layer.lora_scale
    magnitudes = {key: value for key, value in state.items() if key.endswith(MAGNITUDE_SUFFIX)}
    return {**padded_to_one_rank(pairs), **magnitudes}
