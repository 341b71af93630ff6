"""Injection of adapters: the layers of a model that the targets name get one, in place, and lose it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from selva.lora.config import MAX_PROBLEMS, OF_SOME_VERSIONS, LoRAConfig, no_match_message
from selva.lora.layers import ADAPTED_CLASS, KIND, PARAMETERS, LoRALayer, lora_layers
from selva.lora.merge import MERGED_ATTRIBUTE, row_norms
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

CONFIG_ATTRIBUTE = "lora_config"  # of an adapted model: the settings of its adapters

Plain = nn.Linear | nn.Conv1d
M = TypeVar("M", bound=nn.Module)


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
    """Result of :func:`inject_lora`.

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
        skipped = f", {counted(len(self.skipped), 'matching module')} skipped" if self.skipped else ""
        adapted = f"{counted(len(kinds), 'layer')} adapted{dora} ({counts})"
        return f"{adapted}, {counted(self.num_parameters, 'trainable parameter', grouped=True)}{skipped}"

    @property
    def notice(self) -> list[str]:
        """Lines on surprises for a user: matches that are not adapted, and programs that will refuse the adapter."""
        lines = []
        for reason in dict.fromkeys(reason for _, reason in self.skipped):
            names = [name for name, why in self.skipped if why == reason]
            lines.append(f"matched by a target but not adapted, being {reason}: {listed(names, MAX_PROBLEMS)}")
        convolutions = sum(layer.kind == "conv1d" for layer in self.layers)
        causes, remedies = [], []
        if convolutions:
            causes.append(f"{convolutions} of {counted(len(self.layers), 'adapted layer')} "
                          f"{'is a convolution' if convolutions == 1 else 'are convolutions'}")
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


def inject_lora(model: nn.Module, cfg: LoRAConfig, rng: torch.Generator | None = None) -> InjectReport:
    """Freeze ``model``, give the layers that ``cfg.targets`` names an adapter, in place, and return a report.

    Afterwards only ``lora_A``, ``lora_B`` and, with DoRA, ``lora_magnitude`` require gradients. The output is unchanged
    bit for bit.

    Args:
        rng: a CPU random number generator for A (default: the global one). The same numbers on every device.

    Raises:
        ValueError: the model has adapters already, a target fits no layer, PiSSA's rank exceeds a layer's size, or
            DoRA is asked for on layers that have an adapter merged. The model is then as it was.
    """
    if any(True for _ in lora_layers(model)):
        raise UserError("the model has adapters already; merge them or call remove_lora(model) first")
    matches, skipped = _match(model, cfg.targets)
    if cfg.init == "pissa":
        _check_ranks(matches, cfg)
    if cfg.dora:
        _check_unmerged(matches)

    model.requires_grad_(False)
    layers = []
    for name, module in matches.items():
        rank = cfg.rank_of(name)
        layer = _adapt_(module, rank, cfg.scale(rank), cfg, rng)
        out_features, in_features = layer.weight.shape[:2]
        num_trained = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad)
        layers.append(AdaptedLayer(name, KIND[type(layer)], rank, in_features, out_features, num_trained))
    setattr(model, CONFIG_ATTRIBUTE, cfg)
    return InjectReport(layers, skipped, cfg)


def _match(model: nn.Module, targets: Sequence[str]) -> tuple[dict[str, Plain], list[tuple[str, str]]]:
    """Return the layers to adapt by name, and (name, reason) of the matching modules that cannot be adapted."""
    matches: dict[str, Plain] = {}
    skipped = []
    for name, module in model.named_modules():
        if not name.endswith(tuple(targets)):
            continue
        if not isinstance(module, nn.Linear | nn.Conv1d) or type(module) not in ADAPTED_CLASS:
            skipped.append((name, f"a {type(module).__name__}, neither nn.Linear nor nn.Conv1d"))
        elif isinstance(module, nn.Conv1d) and module.groups > 1:
            skipped.append((name, f"a convolution in {counted(module.groups, 'group')}"))
        else:
            matches[name] = module
    found = [target for target in targets if any(name.endswith(target) for name in matches)]
    # Of the endings that only some versions have, one that is found stands for its likes.
    likes = {target.rpartition(".")[2] for target in found if target in OF_SOME_VERSIONS}
    idle = [target for target in targets if target not in found
            and not (target in OF_SOME_VERSIONS and target.rpartition(".")[2] in likes)]
    if idle:
        names = [name for name, module in model.named_modules() if type(module) in ADAPTED_CLASS]
        raise UserError(no_match_message(names, idle, skipped))
    return matches, skipped


def check_ranks(model: nn.Module, cfg: LoRAConfig) -> None:
    """Raise if an adapter were larger than a layer; :func:`inject_lora` itself minds that for PiSSA only.

    Raises:
        ValueError: names the layers smaller than their rank, beyond which an adapter costs and adds nothing.
    """
    _check_ranks(_match(model, cfg.targets)[0], cfg)


def _check_ranks(matches: Mapping[str, Plain], cfg: LoRAConfig) -> None:
    sizes = {name: min(module.weight.flatten(1).shape) for name, module in matches.items()}
    problems = [f"{name} has rank at most {size}, asked for {cfg.rank_of(name)}"
                for name, size in sizes.items() if cfg.rank_of(name) > size]
    if problems:
        what = "init 'pissa' cannot start from" if cfg.init == "pissa" else "an adapter cannot have"
        raise UserError(f"{what} more directions than a layer has: {listed(problems, MAX_PROBLEMS)}; give a smaller "
                         "--rank, or these layers one of their own: --target SUFFIX:RANK")


def _check_unmerged(matches: Mapping[str, Plain]) -> None:
    merged = [name for name, module in matches.items() if getattr(module, MERGED_ATTRIBUTE, False)]
    if merged:
        raise UserError(
            "a DoRA adapter is relative to the base weights, but these layers have another adapter merged: "
            f"{listed(merged, MAX_PROBLEMS)}; train it on the base model"
        )


def _with_class(module: nn.Module, cls: type[M]) -> M:
    """Return ``module`` itself as a ``cls``: its weight, its hooks, and every reference to it stay valid."""
    module.__class__ = cls
    assert isinstance(module, cls)
    return module


def _adapt_(
    module: Plain, rank: int, scale: float, cfg: LoRAConfig, rng: torch.Generator | None
) -> LoRALayer:
    """Turn a layer into its adapted class, and return it."""
    weight = module.weight  # (out, in[, k])
    layer = _with_class(module, ADAPTED_CLASS[type(module)])
    layer.lora_scale, layer.lora_dropout = scale, cfg.dropout
    if cfg.init == "pissa":
        a, b = principal_factors(weight, rank)
    else:
        # He-uniform with a = sqrt(5), as nn.Linear starts: uniform in +-1/sqrt(fan in).
        bound = 1 / math.sqrt(weight[0].numel())
        a = torch.empty(rank, *weight.shape[1:], device="cpu").uniform_(-bound, bound, generator=rng)
        b = torch.zeros(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
    trained = {"lora_A": a.to(weight.device), "lora_B": b.to(weight.device)}
    starts = {f"{name}0": value.clone() for name, value in trained.items()} if cfg.init == "pissa" else {}
    if cfg.dora:
        trained["lora_magnitude"], starts["lora_magnitude0"] = row_norms(weight), row_norms(weight)
    for name in PARAMETERS:
        value = trained.get(name, starts.get(name))
        layer.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=name in trained))
    return layer


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
        _with_class(layer, next(plain for plain, adapted in ADAPTED_CLASS.items() if adapted is type(layer)))
    if hasattr(model, CONFIG_ATTRIBUTE):
        delattr(model, CONFIG_ATTRIBUTE)
