"""Low-rank adapters on linear layers and 1-D convolutions: inject, train, export, merge.

    y = W x + b + scale * B(A x)        (LoRA, Hu et al., arXiv:2106.09685; scale = alpha / rank)

Knows ``nn.Module`` and none of our networks. An adapted layer keeps its place, its class relation (a ``LoRALinear`` is
an ``nn.Linear``) and its parameters ``weight`` and ``bias``, and gains ``lora_A`` and ``lora_B``. So the base model's
keys stay the published ones, and ``<layer>.lora_A`` is at once the parameter's name and its key in an adapter file.

    layer     lora_A            lora_B
    Linear    (rank, in)        (out, rank)
    Conv1d    (rank, in, k)     (out, rank, 1)      a convolution of the same kernel, then a pointwise one
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITS = ("standard", "pissa")
RSLORA_ALPHA = 16.0  # default alpha with rslora: fixed, because alpha = rank would make the scale grow with the rank

FACTOR_SUFFIXES = (".lora_A", ".lora_B")
RESIDUAL_SUFFIXES = (".linear.weight", ".linear.bias")  # changed base weights in a published PiSSA file
MAX_LISTED = 10  # problems named in one error message


# ---------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how.

    Attributes:
        rank: rows of A and columns of B.
        alpha: numerator of the scale; None means alpha = rank (scale 1), or 16 with ``rslora``.
        targets: a layer is adapted when its full name ends with one of these.
        dropout: probability of dropping an input element of the adapter while training.
        rslora: scale = alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732).
        init: "standard" starts with B = 0; "pissa" starts A and B at the largest singular directions of W
            (arXiv:2404.02948) and subtracts them again, so both leave the model as it is.
        target_ranks: rank of the layers of single targets; where several targets match a layer, the longest decides.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("attn.qkv",)
    dropout: float = 0.0
    rslora: bool = False
    init: str = "standard"
    target_ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha must be a positive number, got {self.alpha}")
        if isinstance(self.targets, str) or not self.targets or not all(self.targets):
            problems.append(f"targets must be a list of non-empty layer name endings, got {self.targets!r}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.init not in INITS:
            problems.append(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        for target, rank in (self.target_ranks or {}).items():
            if target not in self.targets:
                problems.append(f"target_ranks names {target!r}, which is not among the targets {list(self.targets)}")
            if rank < 1:
                problems.append(f"the rank of target {target!r} must be at least 1, got {rank}")
        if not problems and self.init == "pissa" and any(self.scale(r) != 1 for r in self.ranks()):
            problems.append("init 'pissa' needs scale 1: leave alpha unset and rslora off")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> LoRAConfig:
        """Return the settings that an adapter was trained with, from the meta of our files or of published ones.

        Raises:
            ValueError: rank, alpha or target is not there, or the settings are not ones we can train with.
        """
        if "lora_config" in meta:
            stored = dict(meta["lora_config"])
            return cls(**{**stored, "targets": tuple(stored["targets"])})
        missing = [key for key in ("rank", "alpha", "target") if key not in meta]
        if missing:
            raise ValueError(f"the adapter's meta has no {', '.join(missing)}")
        return cls(
            rank=meta["rank"],
            alpha=meta["alpha"],
            targets=tuple(meta["target"]),
            dropout=meta.get("lora_dropout", 0.0),
            rslora=meta.get("use_rslora", False),
            init=meta.get("init_mode", "standard"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers and numbers; :meth:`from_meta` reads them back from meta key ``lora_config``."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "dropout": self.dropout,
            "rslora": self.rslora,
            "init": self.init,
            "target_ranks": dict(self.target_ranks) if self.target_ranks else None,
        }

    def scale(self, rank: int | None = None) -> float:
        """Return the factor in front of B(A x) for a layer of ``rank`` (default: the common rank)."""
        rank = self.rank if rank is None else rank
        alpha = self.alpha
        if alpha is None:
            alpha = RSLORA_ALPHA if self.rslora else rank
        return lora_scale(alpha, rank, self.rslora)

    def ranks(self) -> set[int]:
        """Return every rank that occurs."""
        own = self.target_ranks or {}
        return {own.get(target, self.rank) for target in self.targets}

    def rank_of(self, layer_name: str) -> int:
        """Return the rank for a layer whose name ends with at least one target."""
        target = max((t for t in self.targets if layer_name.endswith(t)), key=len)
        return (self.target_ranks or {}).get(target, self.rank)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with ``rslora``."""
    return alpha / (math.sqrt(rank) if rslora else rank)


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
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter | None
    lora_B0: nn.Parameter | None
    lora_scale: float
    lora_dropout: float

    def lora_names(self) -> list[str]:
        return [name for name, value in self._parameters.items() if name.startswith("lora_") and value is not None]

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors whose product is the update of W, before the scale."""
        return update_factors(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def lora_input(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.lora_dropout, self.training)

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
        return F.linear(x, self.weight, self.bias) + F.linear(hidden, up.to(hidden.dtype))  # (..., out)


class LoRAConv1d(LoRALayer, nn.Conv1d):
    """A convolution on (B, in, tokens) with an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.lora_factors()
        # The base class's own convolution, so that stride, padding and dilation are those of W.
        hidden = self._conv_forward(self.lora_input(x), down.to(x.dtype), None) * self.lora_scale  # (B, rank, tokens)
        return self._conv_forward(x, self.weight, self.bias) + F.conv1d(hidden, up.to(hidden.dtype))  # (B, out, tokens)


# Exact classes: a subclass may do something else in its forward, which the adapter would then miss.
ADAPTED_CLASS: dict[type[nn.Module], type[LoRALayer]] = {nn.Linear: LoRALinear, nn.Conv1d: LoRAConv1d}
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


def update_weight(a: Tensor, b: Tensor) -> Tensor:
    """Return the product B A (out, in[, k]) in float32."""
    # On the CPU, where no TF32 setting can cut the product to ten bits; it is small.
    with torch.autocast("cpu", enabled=False):
        product = b.detach().cpu().float().flatten(1) @ a.detach().cpu().float().flatten(1)
    return product.view(b.shape[0], *a.shape[1:])


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
    """

    layers: list[AdaptedLayer]
    skipped: list[tuple[str, str]]

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
        skipped = f", {len(self.skipped)} matching modules skipped" if self.skipped else ""
        return f"{len(kinds)} layers adapted ({counts}), {self.num_parameters:,} trainable parameters{skipped}"


def inject_lora(model: nn.Module, cfg: LoRAConfig, generator: torch.Generator | None = None) -> InjectReport:
    """Freeze ``model``, give the layers that ``cfg.targets`` names an adapter, in place, and return what was done.

    Afterwards only ``lora_A`` and ``lora_B`` require gradients. The output is unchanged bit for bit.

    Args:
        generator: a CPU random number generator for A (default: the global one). The same numbers on every device.

    Raises:
        ValueError: the model has adapters already, a target fits no layer, or PiSSA's rank exceeds a layer's size.
            The model is then as it was.
    """
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already; merge them or call remove_lora(model) first")
    matches, skipped = _match(model, cfg.targets)
    if cfg.init == "pissa":
        _check_pissa_rank(matches, cfg)

    model.requires_grad_(False)
    layers = []
    for name, module in matches.items():
        rank = cfg.rank_of(name)
        _adapt_(module, rank, cfg.scale(rank), cfg, generator)
        out_features, in_features = module.weight.shape[:2]
        layers.append(AdaptedLayer(
            name, KIND[type(module)], rank, in_features, out_features, module.lora_A.numel() + module.lora_B.numel()
        ))  # fmt: skip
    model.lora_config = cfg
    return InjectReport(layers, skipped)


def _match(model: nn.Module, targets: Sequence[str]) -> tuple[dict[str, nn.Module], list[tuple[str, str]]]:
    """Return the layers to adapt by name, and (name, reason) of the matching modules that cannot be adapted."""
    matches: dict[str, nn.Module] = {}
    skipped = []
    for name, module in model.named_modules():
        if not name.endswith(tuple(targets)):
            continue
        if type(module) not in ADAPTED_CLASS:
            skipped.append((name, f"{type(module).__name__} is neither nn.Linear nor nn.Conv1d"))
        elif isinstance(module, nn.Conv1d) and module.groups > 1:
            skipped.append((name, f"a convolution in {module.groups} groups"))
        else:
            matches[name] = module
    idle = [target for target in targets if not any(name.endswith(target) for name in matches)]
    if idle:
        raise ValueError(_no_match_message(model, idle, skipped))
    return matches, skipped


def _no_match_message(model: nn.Module, idle: list[str], skipped: list[tuple[str, str]]) -> str:
    names = [name for name, module in model.named_modules() if type(module) in ADAPTED_CLASS]
    # Endings of one and two parts, without block numbers: "qkv", "attn.qkv", "ffn.w1", ...
    parts = [[part for part in name.split(".") if not part.isdigit()] for name in names]
    endings = sorted({".".join(p[-count:]) for p in parts for count in (1, 2) if len(p) >= count})
    close = [e for target in idle for e in difflib.get_close_matches(target, endings, n=5, cutoff=0.4)]
    inside = [e for target in idle for e in endings if target in e.split(".")[:-1]]  # "ffn" names a container
    offered = list(dict.fromkeys(inside + close)) or endings
    message = f"No layers matched target={idle}; endings that would: {list_some(offered)}"
    unfit = [f"{name} ({reason})" for name, reason in skipped if name.endswith(tuple(idle))]
    return f"{message}. Matched but cannot be adapted: {list_some(unfit)}" if unfit else message


def _check_pissa_rank(matches: Mapping[str, nn.Module], cfg: LoRAConfig) -> None:
    problems = [
        f"{name} has rank at most {min(module.weight.flatten(1).shape)}, asked for {cfg.rank_of(name)}"
        for name, module in matches.items()
        if cfg.rank_of(name) > min(module.weight.flatten(1).shape)
    ]
    if problems:
        raise ValueError(f"init 'pissa' cannot start from more directions than a layer has: {list_some(problems)}")


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
    a, b = a.to(weight.device), b.to(weight.device)
    module.lora_A, module.lora_B = nn.Parameter(a), nn.Parameter(b)
    starts = (a.clone(), b.clone()) if cfg.init == "pissa" else (None, None)
    for name, start in zip(("lora_A0", "lora_B0"), starts, strict=True):
        module.register_parameter(name, None if start is None else nn.Parameter(start, requires_grad=False))


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
        for name in ("lora_A", "lora_B", "lora_A0", "lora_B0", "lora_scale", "lora_dropout"):
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
    """Return what is trained: all A in module order, then all B."""
    layers = [layer for _, layer in lora_layers(model)]
    return [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return two optimiser groups: all A with ``lr``, all B with ``ratio * lr`` (LoRA+, arXiv:2402.12354).

    Always two, A first, so that the optimiser state of a published step file fits.
    """
    layers = [layer for _, layer in lora_layers(model)]
    return [
        {"params": [layer.lora_A for layer in layers], "lr": lr},
        {"params": [layer.lora_B for layer in layers], "lr": lr * ratio},
    ]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters as they are trained, ``<layer>.lora_A`` and so on: copies on the CPU, float32, unscaled.

    Includes PiSSA's start values. What :func:`load_lora_state_` restores bit for bit; for use, see
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
        raise ValueError(f"these adapter tensors do not fit the adapted model: {list_some(problems)}")
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


def adapter_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return ``lora_A`` and ``lora_B`` of every adapted layer such that their plain product is the update of W.

    The scale is folded into B, PiSSA's start values are worked in (which doubles the rank), and smaller ranks are
    padded with zeros to one common rank: the form in which ComfyUI-SelVA reads every adapter right.

    Args:
        state: values to export instead of the current ones, with keys of :func:`lora_state_dict` (an average over the
            training, for instance).

    Raises:
        ValueError: ``state`` has tensors that the model has no place for.
    """
    current = lora_state_dict(model)
    foreign = [key for key in state or {} if key not in current]
    if foreign:
        raise ValueError(f"these tensors belong to no adapted layer: {list_some(foreign)}")
    state = {**current, **(state or {})}
    pairs = {}
    for name, layer in lora_layers(model):
        factors = (state.get(f"{name}.{key}") for key in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
        a, b = update_factors(*factors)
        # With scale 1 the tensor itself, so that a file with both forms stores it once.
        pairs[name] = a, b if layer.lora_scale == 1 else b * layer.lora_scale
    return padded_to_one_rank(pairs)


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
# finished adapters
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A finished adapter, as a file holds it.

    Attributes:
        tensors: ``<layer>.lora_A`` and ``<layer>.lora_B``; a published PiSSA adapter also holds the changed base
            weights, ``<layer>.linear.weight`` and ``.linear.bias``.
        meta: settings. ``alpha`` (default: the rank) and ``use_rslora`` (default: False) decide the scale.
        source: where it came from, for messages.
    """

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "adapter"

    def layer_names(self) -> list[str]:
        """Return the names of the layers that the adapter changes, in the order of its tensors."""
        suffixes = FACTOR_SUFFIXES + RESIDUAL_SUFFIXES
        names = (key.removesuffix(next((s for s in suffixes if key.endswith(s)), "")) for key in self.tensors)
        return list(dict.fromkeys(names))

    @property
    def is_pissa(self) -> bool:
        """Whether it replaces base weights; decided by its tensors, because ``init_mode`` is not always there."""
        return any(key.endswith(RESIDUAL_SUFFIXES) for key in self.tensors)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of layer ``name``."""
        return self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]

    def scale(self, name: str) -> float:
        """Return the factor in front of B(A x) in layer ``name``."""
        rank = self.factors(name)[0].shape[0]
        return lora_scale(self.meta.get("alpha", rank), rank, self.meta.get("use_rslora", False))

    def problems(self) -> list[str]:
        """Return what is wrong with the tensors by themselves: foreign keys, a missing partner, ranks that differ."""
        problems = [
            f"{key} is no LoRA tensor" for key in self.tensors if not key.endswith(FACTOR_SUFFIXES + RESIDUAL_SUFFIXES)
        ]
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
        return problems

    def update(self, name: str, weight: Tensor) -> Tensor:
        """Return the change of W (out, in[, k]) at strength 1, in float32 on the CPU.

        Args:
            weight: float32 base weight. Only PiSSA needs it: its file holds the residual that replaces W, so the
                change is ``W_res + scale B A - W``.
        """
        a, b = self.factors(name)
        update = self.scale(name) * update_weight(a, b)
        residual = self.tensors.get(f"{name}.linear.weight")
        return update if residual is None else residual.cpu().float() + update - weight.cpu()


def merge_adapter(model: nn.Module, adapter: Adapter, strength: float = 1.0) -> None:
    """Add ``strength`` times the update of ``adapter`` to the weights of ``model``, in place.

    Computed in float32 and rounded once to the type of W. Strength 0 leaves every bit as it is, for PiSSA too, where
    strength s means s of the way from the base weight to the adapted one. May be called for several adapters in turn.

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
        raise ValueError(f"cannot merge: {list_some(problems)}")
    active = [(adapter, strength) for adapter, strength in adapters if strength != 0]
    for name in dict.fromkeys(name for adapter, _ in active for name in adapter.layer_names()):
        module = modules[name]
        here = [(adapter, strength) for adapter, strength in active if f"{name}.lora_A" in adapter.tensors]
        base = module.weight.float()
        weight = base.clone()
        for adapter, strength in here:
            weight += strength * adapter.update(name, base).to(weight.device)
        module.weight.copy_(weight)
        for adapter, strength in here:
            changed = adapter.tensors.get(f"{name}.linear.bias")
            if changed is not None:
                bias = module.bias.float()
                module.bias.copy_(bias + strength * (changed.to(bias) - bias))
        module.has_merged_adapter = True


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
    flags = [(module, getattr(module, "has_merged_adapter", False)) for module in touched]
    try:
        merge_adapters(model, adapters)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)
        for module, flag in flags:
            module.has_merged_adapter = flag


def _misfits(modules: Mapping[str, nn.Module], adapter: Adapter, strength: float) -> list[str]:
    """Return what keeps ``adapter`` from being merged into the layers ``modules``."""
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
        elif getattr(module, "has_merged_adapter", False):
            problems.append(
                f"{name} has another adapter merged already, but a PiSSA adapter is relative to the base weight; "
                "merge both at once with merge_adapters"
            )
    return problems


def list_some(items: Sequence[str]) -> str:
    """Return the items separated by commas, or the first ten and how many more there are."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more
