"""Settings of an adapter, and the names by which its layers are chosen.

A target is the end of a layer's full name (``attn.qkv``, ``text_block.linear1``), as in published adapters, or one of
the presets below, which stand for several such endings.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from selva.utils.errors import UserError
from selva.utils.settings import setting, settings_of
from selva.utils.text import listed

ADAPTER = "adapter"  # heading in --help and docs
MAX_PROBLEMS = 10  # named in one message
INITS = ("standard", "pissa")
RSLORA_ALPHA = 16.0  # default alpha with rslora: fixed, because alpha = rank would make the scale grow with the rank

_ATTENTION = ("attn.qkv", "linear1")
_MLP = ("ffn.w1", "ffn.w2", "ffn.w3")
# The place of this network behind the projection of the text differs between versions, so that each has half of these.
OF_SOME_VERSIONS = tuple(f"text_input_proj.{place}.{name}" for place in (1, 2) for name in ("w1", "w2", "w3"))
_TEXT = ("text_input_proj.0", *OF_SOME_VERSIONS, "text_cond_proj", "global_cond_mlp.w1", "global_cond_mlp.w2",
         "global_cond_mlp.w3")
# Each contains the one before. "all" means every linear layer and convolution of the transformer blocks; its
# adaLN_modulation.1 takes the modulation of the final layer along. "all+text" are also the linear layers between the
# text features and the blocks: behind them, words that the base model never had to tell apart may have become one. The
# projections of pictures and motion, the time embedding and the output convolution are left out.
PRESETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+mlp": _ATTENTION + _MLP,
    "all": (*_ATTENTION, *_MLP, "adaLN_modulation.1"),
    "all+text": (*_ATTENTION, *_MLP, "adaLN_modulation.1", *_TEXT),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of an adapter: the layers to adapt, and how.

    Attributes:
        rank: rows of A and columns of B.
        alpha: numerator of the scale; None means alpha = rank (scale 1), or 16 with ``rslora``.
        targets: a layer is adapted when its full name ends with one of these. Presets are replaced by their endings.
        dropout: probability of dropping an input element of the adapter while training.
        rslora: scale = alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732).
        init: "standard" starts with B = 0; "pissa" starts A and B at the largest singular directions of W
            (arXiv:2404.02948) and subtracts them again, so both leave the model as it is.
        target_ranks: rank of the layers of single targets or presets; where several match a layer, the longest
            ending decides, and an ending's own rank goes before that of a preset.
        dora: also train the length of every row of the adapted weight (arXiv:2402.09353).
    """

    rank: int = setting(16, "size of the adapter", group=ADAPTER, aliases=("network_dim",),
                        similar=("lora_rank", "dim", "r"))
    alpha: float | None = setting(None, "the adapter is scaled by alpha / rank", group=ADAPTER,
                                  default_text="rank, scale 1", aliases=("network_alpha",),
                                  similar=("lora_alpha",))
    targets: tuple[str, ...] = setting(
        ("attn.qkv",), "adapt the layers whose names end in one of these, such as attn.qkv, or linear1:4 for rank 4 "
        f"there; or a preset: {', '.join(PRESETS)}",
        group=ADAPTER, flag="target", nargs="+", metavar="SUFFIX[:RANK]",
        default_text="attn.qkv")
    dropout: float = setting(0.0, "dropout before the adapter", group=ADAPTER, flag="lora_dropout")
    rslora: bool = setting(False, "scale alpha / sqrt(rank), alpha 16 unless given", group=ADAPTER)
    init: str = setting("standard", "pissa starts at the largest singular directions of the base weights",
                        group=ADAPTER, choices=INITS)
    target_ranks: Mapping[str, int] | None = None
    dora: bool = setting(False, "DoRA: also train the length of every row of the weights", group=ADAPTER)

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha must be a positive number, got {self.alpha}")
        if isinstance(self.targets, str) or not self.targets or not all(self.targets):
            problems.append(f"targets must be a list of non-empty layer name endings, got {self.targets!r}")
        else:
            object.__setattr__(self, "targets", expand_targets(self.targets))
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.init not in INITS:
            problems.append(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.target_ranks:
            object.__setattr__(self, "target_ranks", expand_ranks(self.target_ranks))
        for target, rank in (self.target_ranks or {}).items():
            if target not in self.targets:
                problems.append(f"target_ranks names {target!r}, which is not among the targets {list(self.targets)}")
            if rank < 1:
                problems.append(f"the rank of target {target!r} must be at least 1, got {rank}")
        if problems:
            raise UserError("; ".join(problems))

    @classmethod
    def from_settings(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """Return the settings of a command line, where a target may carry its rank: ``linear1:4``.

        Raises:
            ValueError: lists everything that is out of range.
        """
        plain = {one.field: values[one.name] for one in settings_of(cls) if one.name in values}
        if "targets" in plain:
            plain["targets"], plain["target_ranks"] = parse_targets(plain["targets"])
        return cls(**plain)

    def to_settings(self) -> dict[str, Any]:
        """Return the values of a command line; :meth:`from_settings` reads them back."""
        values = {one.name: getattr(self, one.field) for one in settings_of(type(self))}
        ranks = self.target_ranks or {}
        return values | {"target": [f"{t}:{ranks[t]}" if t in ranks else t for t in self.targets]}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> LoRAConfig:
        """Return the settings that an adapter was trained with, from the meta of our files or of published ones.

        Raises:
            ValueError: rank, alpha or target is not there, or the settings are not ones we can train with.
        """
        if "lora_config" in meta:
            stored = dict(meta["lora_config"])
            if unknown := sorted(stored.keys() - {field.name for field in fields(cls)}):
                raise UserError(
                    f"the adapter was trained with settings unknown here: {listed(unknown, MAX_PROBLEMS)}; "
                    "update this package"
                )
            return cls(**{**stored, "targets": tuple(stored["targets"])})
        missing = [key for key in ("rank", "alpha", "target") if key not in meta]
        if missing:
            raise UserError(f"the adapter's meta has no {', '.join(missing)}")
        return cls(
            rank=meta["rank"],
            alpha=meta["alpha"],
            targets=tuple(meta["target"]),
            dropout=meta.get("lora_dropout", 0.0),
            rslora=meta.get("use_rslora", False),
            init=meta.get("init_mode", "standard"),
        )

    def flags(self) -> str:
        """Return the flags of ``train_lora.py`` that ask for these settings."""
        ranks = self.target_ranks or {}
        flags = [f"--rank {self.rank}"]
        flags += [f"--alpha {self.alpha:g}"] if self.alpha is not None else []
        flags += ["--rslora"] if self.rslora else []
        flags += [f"--init {self.init}"] if self.init != "standard" else []
        flags += ["--dora"] if self.dora else []
        return " ".join([*flags, "--target", *(f"{t}:{ranks[t]}" if t in ranks else t for t in self.targets)])

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
            "dora": self.dora,
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

    def target_of(self, layer_name: str) -> str:
        """Return the longest target that ``layer_name`` ends with; there must be one."""
        return max((target for target in self.targets if layer_name.endswith(target)), key=len)

    def start_problem(self) -> str | None:
        """Return the reason against starting a training so, though one may be continued; None if there is none."""
        if self.init == "pissa" and any(self.scale(r) != 1 for r in self.ranks()):
            return ("init 'pissa' starts with scale 1, as in its paper: leave alpha unset and rslora off. (A PiSSA "
                    "step file of ComfyUI-SelVA has another scale, and is continued with it: --resume FILE)")
        return None

    def rank_of(self, layer_name: str) -> int:
        """Return the rank for a layer whose name ends with at least one target."""
        return (self.target_ranks or {}).get(self.target_of(layer_name), self.rank)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with ``rslora``."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def expand_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """Return the endings that ``targets`` stand for: presets replaced by theirs, each once, in order."""
    return tuple(dict.fromkeys(ending for target in targets for ending in PRESETS.get(target, (target,))))


def expand_ranks(target_ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the rank per ending; an ending's own rank goes before a preset's, a smaller preset's before a larger's."""
    ranks = {}
    for preset in reversed(PRESETS):
        if preset in target_ranks:
            ranks.update(dict.fromkeys(PRESETS[preset], target_ranks[preset]))
    ranks.update({target: rank for target, rank in target_ranks.items() if target not in PRESETS})
    return ranks


def parse_targets(items: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """Return ``targets`` and ``target_ranks`` of a :class:`LoRAConfig` from texts such as ``linear1`` or ``linear1:4``.

    Raises:
        ValueError: names every text whose rank is no whole number of at least 1, that has no ending before the colon,
            or that gives an ending a second rank.
    """
    ranks: dict[str, int | None] = {}
    problems = []
    for item in items:
        target, colon, number = item.partition(":")
        rank = int(number) if number.isascii() and number.isdigit() else None
        if not target:
            problems.append(f"target {item!r} names no layers; expected an ending such as attn.qkv")
        elif colon and not rank:
            problems.append(f"target {item!r} has the rank {number!r}, expected a whole number of at least 1")
        elif ranks.setdefault(target, rank) != rank:
            first, second = (f"rank {r}" if r else "no rank" for r in (ranks[target], rank))
            problems.append(f"target {target!r} is given twice, with {first} and with {second}")
    if problems:
        raise UserError("; ".join(problems))
    return tuple(ranks), {target: rank for target, rank in ranks.items() if rank} or None


def no_match_message(names: Sequence[str], idle: Sequence[str], skipped: Sequence[tuple[str, str]]) -> str:
    """Return the message for targets ``idle`` that adapt none of the layers ``names``: it lists endings that would.

    Args:
        skipped: (name, reason) of modules that match a target but cannot be adapted.
    """
    # Endings of one and two parts that are no block number: "qkv", "attn.qkv", "adaLN_modulation.1", ...
    tails = [name.split(".")[-count:] for name in names for count in (1, 2)]
    endings = sorted({".".join(tail) for tail in tails if not tail[0].isdigit()})
    close = [e for target in idle for e in difflib.get_close_matches(target, endings, n=5, cutoff=0.4)]
    # A target that names a container ("ffn") is completed to the layers inside ("ffn.w1").
    starts = [(name, f".{name}".rfind(f".{target}.")) for target in idle for name in names]
    inside = [name[start:] for name, start in starts if start >= 0]
    offered = list(dict.fromkeys(inside + close)) or endings
    message = f"No layers matched target={list(idle)}; endings that would: {listed(offered, MAX_PROBLEMS)}"
    message += f"; presets: {', '.join(PRESETS)}"
    unfit = [f"{name} ({reason})" for name, reason in skipped if name.endswith(tuple(idle))]
    return f"{message}. Matched but cannot be adapted: {listed(unfit, 2)}" if unfit else message
