"""Finished adapters: the update of a weight that the tensors of a file stand for, and merging it into a model.

    W' = W + scale * B A                                            LoRA
    W' = m * (W + scale * B A) / ||W + scale * B A||, row by row    DoRA (arXiv:2402.09353), m is lora_magnitude
    W' = W_res + scale * B A                                        PiSSA as published, W_res is linear.weight

At strength s the weight becomes W + s (W' - W), and the updates of several adapters add up. The second and third kind
are relative to the base weight, so they are merged together with others (:func:`merge_adapters`), not after them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selva.lora.config import MAX_PROBLEMS, lora_scale
from selva.utils.errors import UserError
from selva.utils.text import listed

FACTOR_SUFFIXES = (".lora_A", ".lora_B")
MAGNITUDE_SUFFIX = ".lora_magnitude"
RESIDUAL_SUFFIXES = (".linear.weight", ".linear.bias")  # changed base weights in a published PiSSA file
MERGED_ATTRIBUTE = "has_merged_adapter"  # of a layer
ADAPTER_SUFFIXES = (*FACTOR_SUFFIXES, MAGNITUDE_SUFFIX, *RESIDUAL_SUFFIXES)


# ---------------------------------------------------------------------------------------------------------------
# formulas
# ---------------------------------------------------------------------------------------------------------------


def update_weight(a: Tensor, b: Tensor) -> Tensor:
    """Return the product B A (out, in[, k]) in float32."""
    # On the CPU, where no TF32 setting can cut the product to ten bits; it is small.
    with torch.autocast("cpu", enabled=False):
        product = b.detach().cpu().float().flatten(1) @ a.detach().cpu().float().flatten(1)
    return product.view(b.shape[0], *a.shape[1:])


def row_norms(weight: Tensor) -> Tensor:
    """Return (out,) float32 lengths of the rows of ``weight`` (out, in[, k])."""
    return weight.detach().float().flatten(1).norm(dim=1)


def magnitude_excess(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return (out,) ``magnitude / norms - 1``, by which DoRA changes rows of length ``norms``; exactly 0 for equals.

    A row of zeros has no direction to keep; there the excess is ``magnitude`` itself, so that it can still be trained.
    """
    return (magnitude - norms) / norms.where(norms > 0, 1)


def per_row(values: Tensor, num_trailing: int) -> Tensor:
    """Return ``values`` (out,) with ``num_trailing`` axes of size 1 after it, as a factor per row or channel."""
    return values.view(-1, *(1,) * num_trailing)


def padded_to_one_rank(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return ``<name>.lora_A`` and ``<name>.lora_B`` of the named (A, B) pairs, zero-padded to the largest rank."""
    rank = max((a.shape[0] for a, _ in pairs.values()), default=0)
    tensors = {}
    for name, (a, b) in pairs.items():
        extra = rank - a.shape[0]
        if extra:
            a = torch.cat((a, a.new_zeros(extra, *a.shape[1:])))
            b = torch.cat((b, b.new_zeros(b.shape[0], extra, *b.shape[2:])), dim=1)
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a, b
    return tensors


# ---------------------------------------------------------------------------------------------------------------
# adapters
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A finished adapter, as a file holds it.

    Attributes:
        tensors: ``<layer>.lora_A`` and ``<layer>.lora_B``; with DoRA also ``<layer>.lora_magnitude``. A published
            PiSSA adapter holds the changed base weights, ``<layer>.linear.weight`` and ``.linear.bias``, too.
        meta: settings. ``alpha`` (default: the rank) and ``use_rslora`` (default: False) decide the scale.
        source: the path of its file, for messages.
    """

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "adapter"

    def layer_names(self) -> list[str]:
        """Return the names of the layers that the adapter changes, in the order of its tensors."""
        names = (key.removesuffix(next((s for s in ADAPTER_SUFFIXES if key.endswith(s)), "")) for key in self.tensors)
        return list(dict.fromkeys(names))

    @property
    def is_pissa(self) -> bool:
        """True if it replaces base weights; decided by its tensors, because ``init_mode`` is not always there."""
        return any(key.endswith(RESIDUAL_SUFFIXES) for key in self.tensors)

    @property
    def clip_features(self) -> str:
        """Its ``--clip_features``, "use" or "empty"; ComfyUI-SelVA's trainer does not say, and always passes them."""
        said = self.meta.get("clip_features")
        return "use" if said is None else said

    def is_relative(self, name: str) -> bool:
        """Return True if the update of layer ``name`` depends on its base weight."""
        return any(f"{name}{suffix}" in self.tensors for suffix in (MAGNITUDE_SUFFIX, *RESIDUAL_SUFFIXES))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of layer ``name``."""
        return self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]

    def scale(self, name: str) -> float:
        """Return the factor in front of B(A x) in layer ``name``."""
        rank = self.factors(name)[0].shape[0]
        return lora_scale(self.meta.get("alpha", rank), rank, self.meta.get("use_rslora", False))

    def problems(self) -> list[str]:
        """Return the problems of it by itself: odd settings, foreign keys, a missing partner, ranks that differ."""
        problems = _odd_settings(self.meta)
        problems += [f"{key} is no LoRA tensor" for key in self.tensors if not key.endswith(ADAPTER_SUFFIXES)]
        if problems:
            return problems
        for name in self.layer_names():
            absent = [suffix for suffix in FACTOR_SUFFIXES if name + suffix not in self.tensors]
            if absent:
                problems += [f"{name}{suffix} is missing" for suffix in absent]
                continue
            a, b = self.factors(name)
            fits = a.dim() == b.dim() and a.dim() in (2, 3) and a.shape[0] == b.shape[1] and 0 not in a.shape + b.shape
            if not fits or b.shape[2:].numel() != 1:
                problems.append(f"{name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together")
            magnitude = self.tensors.get(name + MAGNITUDE_SUFFIX)
            if magnitude is not None and magnitude.shape != b.shape[:1]:
                problems.append(f"{name}: lora_magnitude {tuple(magnitude.shape)} does not fit lora_B {tuple(b.shape)}")
            if magnitude is not None and any(name + suffix in self.tensors for suffix in RESIDUAL_SUFFIXES):
                problems.append(f"{name} has a DoRA magnitude and a changed base weight, expected only one of them")
        return problems

    def update(self, name: str, weight: Tensor) -> Tensor:
        """Return the change of W (out, in[, k]) at strength 1, in float32 on the CPU.

        Args:
            weight: float32 base weight W, which a DoRA or PiSSA update is relative to.
        """
        a, b = self.factors(name)
        update, weight = self.scale(name) * update_weight(a, b), weight.cpu()
        residual = self.tensors.get(f"{name}.linear.weight")
        magnitude = self.tensors.get(name + MAGNITUDE_SUFFIX)
        if residual is not None:
            return residual.cpu().float() + update - weight
        if magnitude is not None:
            adapted = weight + update
            excess = magnitude_excess(magnitude.cpu().float(), row_norms(adapted))
            return update + per_row(excess, adapted.dim() - 1) * adapted
        return update


def _odd_settings(meta: Mapping[str, Any]) -> list[str]:
    """Return the problems of those settings that decide how an adapter is used."""
    variant, clip_features, generator = (meta.get(key) for key in ("variant", "clip_features", "generator"))
    problems = []
    if variant is not None and not isinstance(variant, str):
        problems.append(f"variant in the meta is {variant!r}, expected the name of a base model")
    if clip_features is not None and clip_features not in ("use", "empty"):
        problems.append(f"clip_features in the meta is {clip_features!r}, expected 'use' or 'empty'")
    of_own = isinstance(generator, Mapping) and all(isinstance(generator.get(key), str) for key in ("name", "mark"))
    if generator is not None and not of_own:
        problems.append(f"generator in the meta is {generator!r}, expected the name and the mark of a file")
    return problems


def clip_features_of(adapters: Iterable[tuple[Adapter, float]], remedy: str) -> str | None:
    """Return the ``--clip_features`` of (adapter, strength) pairs, "use" or "empty"; None where none of them acts.

    An adapter at strength 0 has no say, so that it is the same as no adapter.

    Args:
        remedy: what to do about adapters that were trained differently, for the message.

    Raises:
        UserError: there are such; names each with its own.
    """
    active = [adapter for adapter, strength in adapters if strength != 0]
    if len({adapter.clip_features for adapter in active}) > 1:
        found = listed([f"{adapter.source}: {adapter.clip_features}" for adapter in active])
        raise UserError(f"the adapters were trained with different --clip_features ({found}); {remedy}")
    return active[0].clip_features if active else None


def merge_adapter(model: nn.Module, adapter: Adapter, strength: float = 1.0) -> None:
    """Add ``strength`` times the update of ``adapter`` to the weights of ``model``, in place.

    Computed in float32 and rounded once to the type of W. Strength 0 leaves every bit as it is, for DoRA and PiSSA too,
    where strength s means s of the way from the base weight to the adapted one. May be called for several adapters in
    turn; one that is relative to the base weight comes first, or with the others in :func:`merge_adapters`.

    Raises:
        ValueError: the adapter does not fit the model; names every layer that it cannot be applied to. Nothing is
            changed then.
    """
    merge_adapters(model, [(adapter, strength)])


@torch.no_grad()
def merge_adapters(model: nn.Module, adapters: Iterable[tuple[Adapter, float]]) -> None:
    """Merge several (adapter, strength) at once; the order does not matter. See :func:`merge_adapter`."""
    adapters = list(adapters)
    modules = dict(model.named_modules())
    problems = [problem for adapter, strength in adapters for problem in _misfits(modules, adapter, strength)]
    if problems:
        raise UserError(f"cannot merge: {listed(problems, MAX_PROBLEMS)}")
    active = [(adapter, strength) for adapter, strength in adapters if strength != 0]
    for name in dict.fromkeys(name for adapter, _ in active for name in adapter.layer_names()):
        module = modules[name]
        assert isinstance(module, nn.Linear | nn.Conv1d), name
        here = [(adapter, strength) for adapter, strength in active if f"{name}.lora_A" in adapter.tensors]
        base = module.weight.float()
        weight = base.clone()
        for adapter, strength in here:
            weight += strength * adapter.update(name, base).to(weight.device)
        module.weight.copy_(weight)
        for adapter, strength in here:
            changed = adapter.tensors.get(f"{name}.linear.bias")
            if changed is not None:
                assert module.bias is not None, name
                bias = module.bias.float()
                module.bias.copy_(bias + strength * (changed.to(bias) - bias))
        setattr(module, MERGED_ATTRIBUTE, True)


@contextmanager
def merged_adapters(model: nn.Module, adapters: Iterable[tuple[Adapter, float]]) -> Iterator[None]:
    """Merge (adapter, strength) pairs for the duration of the block; afterwards the old weights are back, bit for bit.

    Keeps a copy of the weights that change.

    Raises:
        ValueError: as :func:`merge_adapter`.
    """
    adapters = list(adapters)
    names = {name for adapter, _ in adapters for name in adapter.layer_names()}
    touched = [module for name, module in model.named_modules() if name in names]
    saved = [(p, p.detach().clone()) for module in touched for p in module.parameters(recurse=False)]
    flags = [(module, getattr(module, MERGED_ATTRIBUTE, False)) for module in touched]
    try:
        merge_adapters(model, adapters)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)
        for module, flag in flags:
            setattr(module, MERGED_ATTRIBUTE, flag)


def _misfits(modules: Mapping[str, nn.Module], adapter: Adapter, strength: float) -> list[str]:
    """Return the problems that keep ``adapter`` from being merged into the layers ``modules``."""
    problems = adapter.problems()
    if not math.isfinite(strength):
        problems.append(f"strength must be a finite number, got {strength}")
    if not problems:
        problems = [p for name in adapter.layer_names() for p in _layer_misfits(modules.get(name), name, adapter)]
    return [f"{adapter.source}: {problem}" for problem in problems]


def _layer_misfits(module: nn.Module | None, name: str, adapter: Adapter) -> list[str]:
    if module is None:
        return [f"the model has no layer {name}"]
    if not isinstance(module, nn.Linear | nn.Conv1d):
        return [f"{name} is a {type(module).__name__}, expected a linear layer or a 1-D convolution"]
    a, b = adapter.factors(name)
    expected = tuple(module.weight.shape)
    if (b.shape[0], *a.shape[1:]) != expected:
        return [f"{name}: the adapter is for a weight of {(b.shape[0], *a.shape[1:])}, the model's is {expected}"]
    problems = []
    for key in ("weight", "bias"):
        residual, own = adapter.tensors.get(f"{name}.linear.{key}"), getattr(module, key)
        if residual is None:
            continue
        if own is None or residual.shape != own.shape:
            found = "none" if own is None else tuple(own.shape)
            problems.append(f"{name}.linear.{key} is {tuple(residual.shape)}, the model's {key} is {found}")
    if adapter.is_relative(name) and getattr(module, MERGED_ATTRIBUTE, False):
        problems.append(
            f"{name} has another adapter merged already, but a {'PiSSA' if adapter.is_pissa else 'DoRA'} adapter is "
            "relative to the base weight; merge both at once with merge_adapters"
        )
    return problems
