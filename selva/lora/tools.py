"""Tools for finished adapters: one of several, smaller ones, the difference of two, an adapter from a fine-tuned model.

Everything works on the update dW = scale * B A of each layer, from its factors; singular values are computed in float64
from the factors alone, so no matrix of the size of W is ever decomposed (but for :func:`extract_adapter`, whose update
has no factors yet).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.lora.config import MAX_PROBLEMS
from selva.lora.merge import MAGNITUDE_SUFFIX, RESIDUAL_SUFFIXES, Adapter, padded_to_one_rank
from selva.utils.errors import UserError
from selva.utils.text import listed, told_apart

Pair = tuple[Tensor, Tensor]
SMALLEST = 1e-7  # singular values below this share of the largest are rounding of float32


@dataclass(frozen=True)
class Cut:
    """An adapter that was cut to a rank.

    Attributes:
        energy: of every layer, the share of the squared length of its update that was kept, 0 to 1.
        ranks: of every layer, the directions that were kept; the file pads them to the largest.
        left_out: changes that an adapter has no place for, in words.
    """

    adapter: Adapter
    energy: dict[str, float]
    ranks: dict[str, int]
    left_out: list[str] = field(default_factory=list)


# -- one layer ---------------------------------------------------------------------------------------------------------


def singular_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and V^T (r, in * k) of the product B A, float64, from its factors.

    Args:
        a: (rank, in[, k]). b: (out, rank[, 1]).
    """
    qb, rb = torch.linalg.qr(b.detach().double().flatten(1))
    qa, ra = torch.linalg.qr(a.detach().double().flatten(1).T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, vh @ qa.T


def rank_for(s: Tensor, rank: int | None, energy: float | None) -> int:
    """Return the number of singular values to keep: at most ``rank``, with at least ``energy`` of the squares."""
    count = max(1, int((s > SMALLEST * s[:1]).sum())) if len(s) else 0
    if energy is not None and float(s.square().sum()) > 0:
        share = s.square().cumsum(0) / s.square().sum()
        count = min(count, int((share < energy).sum()) + 1)
    return count if rank is None else min(count, rank)


def _cut_factors(
    u: Tensor, s: Tensor, vh: Tensor, shape: Sequence[int], rank: int | None, energy: float | None
) -> tuple[Pair, float]:
    """Return A, B (the root of each singular value in both) and the energy kept, for a weight of ``shape``."""
    keep = rank_for(s, rank, energy)
    root, total = s[:keep].sqrt(), float(s.square().sum())
    a = (root[:, None] * vh[:keep]).reshape(keep, *shape[1:]).float().contiguous()
    b = (u[:, :keep] * root).reshape(shape[0], keep, *(1,) * (len(shape) - 2)).float().contiguous()
    return (a, b), float(s[:keep].square().sum()) / total if total > 0 else 1.0


def _scaled(adapter: Adapter, name: str, strength: float = 1.0) -> Pair:
    """Return A and B with the scale and a strength in B."""
    (a, b), factor = adapter.factors(name), adapter.scale(name) * strength
    return a.float(), b.float() if factor == 1 else b.float() * factor


def _check_plain(adapter: Adapter) -> None:
    """Raise if an update does not follow from A and B alone."""
    if problems := adapter.problems():
        raise UserError(f"{adapter.source}: {listed(problems, MAX_PROBLEMS)}")
    if adapter.is_pissa:
        raise UserError(f"{adapter.source}: holds changed base weights (PiSSA as published); with the base model it "
                        "becomes an ordinary adapter first: --variant and --selva_dir")
    if dora := [name for name in adapter.layer_names() if name + MAGNITUDE_SUFFIX in adapter.tensors]:
        raise UserError(f"{adapter.source}: has DoRA magnitudes ({listed(dora, 3)}), so its update is of no low rank; "
                        "use it as it is, or bake it into base weights")


def _check_size(rank: int | None, energy: float | None) -> None:
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}, expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is {energy}, expected more than 0 and at most 1")


# -- whole adapters ----------------------------------------------------------------------------------------------------


def combine_adapters(
    adapters: Sequence[tuple[Adapter, float]], rank: int | None = None, energy: float | None = None
) -> Cut:
    """Return one adapter whose update is the sum of those of (adapter, strength) pairs.

    Without ``rank`` and ``energy`` A and B are put side by side: the sum itself, with the ranks added up. Otherwise the
    largest singular directions of each layer are kept.

    Raises:
        UserError: an adapter with DoRA or with changed base weights, other variants, other uses of CLIP features, or
            layers whose shapes differ.
    """
    _check_size(rank, energy)
    for adapter, _ in adapters:
        _check_plain(adapter)
    pairs: dict[str, list[Pair]] = {}
    for adapter, strength in adapters:
        for name in adapter.layer_names() if strength != 0 else ():
            pairs.setdefault(name, []).append(_scaled(adapter, name, strength))
    if not pairs:
        raise UserError("nothing to merge: every strength is 0")
    meta = _common_meta([adapter for adapter, strength in adapters if strength != 0])
    unlike = [name for name, own in pairs.items() if len({(len(b), *a.shape[1:]) for a, b in own}) > 1]
    if unlike:
        raise UserError(f"these layers have other shapes in the adapters, which are not of one base model: "
                        f"{listed(unlike, MAX_PROBLEMS)}")
    joined = {name: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], dim=1)) if len(own) > 1 else own[0]
              for name, own in pairs.items()}
    sources = told_apart([adapter.source for adapter, _ in adapters])
    meta["merged_from"] = [[source, float(strength)] for source, (_, strength) in zip(sources, adapters, strict=True)]
    return _cut_pairs(joined, meta, rank, energy)


def resize_adapter(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Cut:
    """Return the adapter with at most ``rank`` directions per layer, or as few as keep ``energy`` of each update.

    Its settings stay, without those of the training that only a continued run would need.

    Raises:
        UserError: an adapter with DoRA or changed base weights, or a size out of range.
    """
    _check_size(rank, energy)
    _check_plain(adapter)
    meta = {key: value for key, value in adapter.meta.items() if key not in ("lora_config", "alpha", "use_rslora")}
    pairs = {name: _scaled(adapter, name) for name in adapter.layer_names()}
    return _cut_pairs(pairs, meta | {"resized_from": Path(adapter.source).name}, rank, energy)


def soup(adapters: Sequence[Adapter], rank: int | None = None) -> Cut:
    """Return the average of the updates of ``adapters``, cut to ``rank`` (default: the largest of theirs)."""
    for adapter in adapters:
        _check_plain(adapter)
    if not adapters:
        raise UserError("a soup needs at least one adapter")
    largest = max(len(adapter.factors(name)[0]) for adapter in adapters for name in adapter.layer_names())
    return combine_adapters([(adapter, 1 / len(adapters)) for adapter in adapters], largest if rank is None else rank)


def _cut_pairs(pairs: Mapping[str, Pair], meta: Mapping[str, Any], rank: int | None, energy: float | None) -> Cut:
    """Return an adapter of scale 1; a layer that is small enough already keeps its factors to the last bit."""
    result, kept, ranks = {}, {}, {}
    for name, (a, b) in pairs.items():
        result[name], kept[name], ranks[name] = (a, b), 1.0, len(a)
        if energy is not None or (rank is not None and len(a) > rank):
            u, s, vh = singular_factors(a, b)
            result[name], kept[name] = _cut_factors(u, s, vh, (len(b), *a.shape[1:]), rank, energy)
            ranks[name] = len(result[name][0])
    return Cut(_plain(padded_to_one_rank(result), meta), kept, ranks)


def _plain(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Adapter:
    """Return an adapter of scale 1."""
    rank = next(len(value) for key, value in tensors.items() if key.endswith(".lora_A"))
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    own = {"rank": rank, "alpha": float(rank), "use_rslora": False, "init_mode": "standard", "target": names}
    return Adapter(dict(tensors), {**meta, **own}, "adapter")


def _common_meta(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return those settings that decide how adapters are used, which have to be the same in all of them.

    Raises:
        UserError: they were trained for other variants, on other base models or with another use of CLIP features;
            names the one of every adapter.
    """
    named = [adapter for adapter in adapters if adapter.meta.get("variant") is not None]
    own = [adapter.meta.get("generator") or {} for adapter in adapters]  # a base model of the user's own
    names = [mark.get("name", "that of the variant") for mark in own]
    _check_alike("variant", named, [adapter.meta["variant"] for adapter in named])
    _check_alike("clip_features", adapters, [adapter.clip_features for adapter in adapters])
    _check_alike("base models", adapters, [mark.get("mark") for mark in own], names)
    meta = {"variant": named[0].meta["variant"]} if named else {}
    if any("clip_features" in adapter.meta for adapter in adapters):
        meta["clip_features"] = adapters[0].clip_features
    return meta | {"generator": own[0]} if own[0] else meta


def _check_alike(
    what: str, adapters: Sequence[Adapter], values: Sequence[str | None], names: Sequence[str] | None = None
) -> None:
    """Raise if the values of adapters differ; ``names`` are those of the values, where these are no words."""
    if len(set(values)) > 1:
        found = [f"{adapter.source}: {name}" for adapter, name in zip(adapters, names or values, strict=True)]
        raise UserError(f"these adapters were trained with different {what}: {listed(found)}; "
                        "one result cannot be both")


# -- relative to the base model ----------------------------------------------------------------------------------------


def without_pissa(adapter: Adapter, weights: Mapping[str, Tensor]) -> tuple[Adapter, float]:
    """Return a published PiSSA adapter as an ordinary one, and the largest share of an update that this leaves out.

    Its update W_res + scale B A - W has at most twice its rank, beside the rounding of W_res; the largest directions of
    it are kept.

    Args:
        weights: float32 tensors of the base model by their published names.

    Raises:
        UserError: changed base weights that are not those of this base model, or changed biases.
    """
    if not adapter.is_pissa:
        return adapter, 0.0
    pairs, problems, lost = {}, [], 0.0
    for name in adapter.layer_names():
        (a, b), weight = adapter.factors(name), weights.get(f"{name}.weight")
        residual, bias = (adapter.tensors.get(name + suffix) for suffix in RESIDUAL_SUFFIXES)
        if weight is None or tuple(weight.shape) != (len(b), *a.shape[1:]):
            problems.append(f"{name} is no layer of this size here")
            continue
        own = weights.get(f"{name}.bias")
        if bias is not None and (own is None or not torch.allclose(bias.float(), own.float(), rtol=2**-7, atol=1e-4)):
            problems.append(f"{name}.linear.bias is not that of the base model, and an adapter holds no biases")
        update = adapter.update(name, weight.float())
        u, s, vh = torch.linalg.svd(update.double().flatten(1), full_matrices=False)
        rank = len(a) if residual is None else 2 * len(a)
        pairs[name], kept = _cut_factors(u, s, vh, weight.shape, rank, None)
        left = max(0.0, 1 - kept) ** 0.5 * float(update.norm()) / float(weight.float().norm())
        lost = max(lost, left)
        if left > 2.0**-7:
            problems.append(f"{name}.linear.weight was not made from this base model ({left:.1%} of it does not fit)")
    if problems:
        raise UserError(f"{adapter.source}: its PiSSA base weights do not fit this model: "
                        f"{listed(problems, MAX_PROBLEMS)}")
    meta = {key: value for key, value in adapter.meta.items() if key not in ("alpha", "use_rslora", "lora_config")}
    made = _plain(padded_to_one_rank(pairs), meta)
    return Adapter(made.tensors, made.meta, adapter.source), lost


def extract_adapter(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], layer_names: Sequence[str], rank: int,
    meta: Mapping[str, Any] | None = None,
) -> Cut:
    """Return the adapter that comes nearest to the difference of two full models, layer by layer.

    Args:
        tuned, base: tensors by their published names. layer_names: linear layers and convolutions among them.

    Raises:
        UserError: the models have other tensors or shapes, or no layer differs.
    """
    _check_size(rank, None)
    unlike = [key for key in base if key not in tuned or tuned[key].shape != base[key].shape]
    unlike += [key for key in tuned if key not in base]
    if unlike:
        raise UserError(f"the two models are not of one kind: {listed(unlike, MAX_PROBLEMS)}")
    pairs, kept, ranks, left_out = {}, {}, {}, []
    weights = {f"{name}.weight" for name in layer_names}
    for key, value in base.items():
        difference = tuned[key].double() - value.double()
        if not difference.any():
            continue
        if key not in weights:
            left_out.append(f"{key} (changed by {float(difference.norm() / value.double().norm().clamp(min=1e-12)):.2g}"
                            " of its length)")
            continue
        name = key.removesuffix(".weight")
        u, s, vh = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        pairs[name], kept[name] = _cut_factors(u, s, vh, value.shape, rank, None)
        ranks[name] = len(pairs[name][0])
    if not pairs:
        raise UserError("no linear layer or convolution differs between the two models: there is nothing to extract")
    return Cut(_plain(padded_to_one_rank(pairs), meta or {}), kept, ranks, left_out)


# -- looking at them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerNumbers:
    """Numbers of one layer: the rank of the file, the directions that change something, the length ||scale B A||."""

    rank: int
    used_rank: int
    norm: float


def layer_numbers(adapter: Adapter) -> dict[str, LayerNumbers]:
    """Return the numbers of every layer; with DoRA or PiSSA those of the product of its factors alone."""
    numbers = {}
    for name in adapter.layer_names():
        a, b = _scaled(adapter, name)
        _, s, _ = singular_factors(a, b)
        used = int((s > SMALLEST * s[:1]).sum()) if float(s[:1].sum()) > 0 else 0
        numbers[name] = LayerNumbers(len(a), used, float(s.norm()))
    return numbers


@dataclass(frozen=True)
class LayerDifference:
    """Lengths of two updates of one layer, of their difference, and the cosine between them (0 where one is zero)."""

    norm_a: float
    norm_b: float
    difference: float
    cosine: float


def compare_adapters(first: Adapter, second: Adapter) -> dict[str, LayerDifference]:
    """Return the distance of the updates of two adapters, layer by layer; a layer that one lacks counts as zero.

    Raises:
        UserError: an adapter with DoRA or changed base weights, or layers whose shapes differ.
    """
    _check_plain(first)
    _check_plain(second)
    result = {}
    for name in dict.fromkeys([*first.layer_names(), *second.layer_names()]):
        own = [_scaled(adapter, name) if f"{name}.lora_A" in adapter.tensors else None for adapter in (first, second)]
        shapes = {(len(b), *a.shape[1:]) for a, b in filter(None, own)}
        if len(shapes) > 1:
            raise UserError(f"{name} has other shapes in {first.source} and {second.source}: {sorted(shapes)}")
        norms = [0.0 if pair is None else float(singular_factors(*pair)[1].norm()) for pair in own]
        x, y = own
        inner = 0.0 if x is None or y is None else _inner(x, y)
        gaps = [pair if sign > 0 else (pair[0], -pair[1]) for pair, sign in ((x, 1), (y, -1)) if pair is not None]
        a, b = torch.cat([a for a, _ in gaps]), torch.cat([b for _, b in gaps], dim=1)
        cosine = inner / (norms[0] * norms[1]) if all(norms) else 0.0
        gap = float(singular_factors(a, b)[1].norm())
        # What is left of two equal updates is rounding, and would read like a difference.
        result[name] = LayerDifference(norms[0], norms[1], gap if gap > SMALLEST * max(norms) else 0.0, cosine)
    return result


def _inner(x: Pair, y: Pair) -> float:
    """Return the sum over all entries of the product of two updates, from their factors."""
    (a1, b1), (a2, b2) = ((a.double().flatten(1), b.double().flatten(1)) for a, b in (x, y))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def restricted(adapter: Adapter, patterns: Sequence[str]) -> Adapter:
    """Return the part of an adapter whose layers fit one of ``patterns``; all of it without patterns.

    A pattern is the end of a layer's name, as a training's targets are, or has ``*``, ``?`` or ``[...]`` and stands for
    the whole name: ``joint_blocks.*``, ``*.attn.qkv``.

    Raises:
        UserError: a pattern fits no layer of the adapter.
    """
    if not patterns:
        return adapter
    names = adapter.layer_names()
    fitting = {p: [n for n in names if fnmatch.fnmatchcase(n, p) or ("*" not in p and n.endswith(p))] for p in patterns}
    if idle := [pattern for pattern, found in fitting.items() if not found]:
        raise UserError(f"{adapter.source}: none of its layers fits {', '.join(idle)}; they are "
                        f"{listed(names, MAX_PROBLEMS)}")
    kept = {name for found in fitting.values() for name in found}
    tensors = {key: value for key, value in adapter.tensors.items() if _layer_of(key, names) in kept}
    return Adapter(tensors, adapter.meta, adapter.source)


def _layer_of(key: str, names: Sequence[str]) -> str:
    """Return the layer that a tensor belongs to; the longest name that it begins with."""
    return max((name for name in names if key.startswith(f"{name}.")), key=len)
