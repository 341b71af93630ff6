"""Files of a training run: the adapter that others load, and the step file that a run resumes from.

    adapter_final.pt, adapter_best.safetensors ...   {"state_dict", "meta"}: all that sampling needs
    adapter_step00500.pt                             the same and what resuming needs: "step", "optimizer_state",
                                                     "scheduler", "lora" (see below) and "extra"

Only tensors, numbers, strings and plain containers, so ``torch.load(..., weights_only=True)`` reads everything and no
file can run code. Files appear whole or not at all.

**Adapters we write** are read right by every version of ComfyUI-SelVA: ``lora_A`` and ``lora_B`` only, one rank, the
scale folded into B, and a meta that says alpha = rank, no rsLoRA, standard init. Folding may round, so a step file
also holds the tensors exactly as they are trained, under "lora"; only those are resumed from. What the user asked for
is in meta key ``lora_config``.

**Adapters with convolutions or DoRA magnitudes** cannot be expressed there: the loader would apply the rest and drop
those without a word. Ours have the same layout with ``format = "selva-lora-1"`` in the meta, and a ``target`` that fits
no layer and says why, which the loader shows in its error. Our reader puts the real targets back.

**Step files** are continued here only. ComfyUI-SelVA's trainer would take the adapter with its folded scale and PiSSA's
double rank for the factors of its own settings, and compares none of them: it would train something else without a
word. So "optimizer", which it hands to PyTorch's AdamW, holds a sentence where AdamW expects a number, and AdamW's
error shows it (:data:`CONTINUED_HERE_ONLY`). As an adapter, a step file works there like any other.

A ``.safetensors`` file holds the same tensors, and the meta as JSON under metadata key "meta"; ComfyUI-SelVA reads
``.pt`` only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selva.lora.config import MAX_PROBLEMS, LoRAConfig
from selva.lora.foreign import foreign_format
from selva.lora.formats import alpha_for, is_power_of_two
from selva.lora.merge import FACTOR_SUFFIXES, MAGNITUDE_SUFFIX, Adapter, padded_to_one_rank
from selva.lora.published import published_targets
from selva.lora.state import adapter_tensors, lora_state_dict
from selva.utils.errors import UserError
from selva.utils.files import atomic_path
from selva.utils.text import listed
from selva.utils.torch_files import (
    check_plain,
    is_whole_tensor,
    read_safetensors,
    read_torch,
    write_safetensors,
    write_torch,
)

__all__ = [
    "Adapter",
    "TrainingState",
    "check_same_settings",
    "load_adapter",
    "load_checkpoint",
    "load_newest_checkpoint",
    "readable_meta",
    "save_adapter",
    "save_checkpoint",
    "step_file_name",
]

log = logging.getLogger(__name__)

NATIVE_FORMAT = "selva-lora-1"
TORCH_SUFFIXES = (".pt", ".pth")
STEP_FILE = re.compile(r"adapter_step(\d{5,})\.pt")
# Bytes: AdamW.load_state_dict passes them on to float() as they are, which quotes them.
CONTINUED_HERE_ONLY = (b"this training is continued with train_lora.py --resume of selva-lora only; ComfyUI-SelVA uses "
                       b"this file as an adapter, but cannot train it on")


# ---------------------------------------------------------------------------------------------------------------
# adapters
# ---------------------------------------------------------------------------------------------------------------


def save_adapter(
    path: str | os.PathLike[str],
    source: nn.Module | Mapping[str, Tensor],
    meta: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    *,
    keep_scale: bool = False,
) -> dict[str, Any]:
    """Write an adapter for inference and return its meta as written.

    Args:
        path: ``.pt``, ``.pth`` or ``.safetensors``.
        source: a model with injected adapters, or the tensors ``<layer>.lora_A`` / ``.lora_B`` (with DoRA also
            ``.lora_magnitude``), whose scale the meta gives (``alpha``, default the rank, and ``use_rslora``).
        meta: plain values to store: ``variant``, ``steps``, ``target`` (known already from a model) and whatever else
            should travel along. ``rank``, ``alpha``, ``use_rslora`` and ``init_mode`` are set to match the tensors.
        state: with a model: factors to write instead of its current ones, see ``lora.state.adapter_tensors``.
        keep_scale: with tensors: leave a scale that would round B in the meta, as alpha, instead of folding it into B.

    Raises:
        ValueError: an unknown suffix, tensors that are no adapter, or a meta with something else than plain values.
    """
    path = Path(path)
    if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise UserError(f"{path}: adapters are written as .pt or .safetensors, not {path.suffix or 'without suffix'}")
    scale = 1.0
    if isinstance(source, nn.Module):
        tensors, meta = adapter_tensors(source, state), _meta_of_model(source, meta)
    else:
        adapter = Adapter(source, meta, source=str(path))
        scale = _scale_to_keep(adapter) if keep_scale else 1.0
        tensors, meta = _folded(adapter, fold=scale == 1.0)
    tensors, meta = _for_file(tensors, meta, path, scale)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            header = {"format": "pt", "meta": json.dumps(meta, allow_nan=False)}
            write_safetensors(tensors, temporary, header)
        else:
            write_torch({"state_dict": tensors, "meta": meta}, temporary)
    return meta


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Return the adapter in a file, with float32 tensors on the CPU, and ``rank`` and ``alpha`` in its meta.

    Reads our files and the shapes that ComfyUI-SelVA writes: final and cancelled adapters, step files (without their
    optimiser), bare state dicts (a warning says that alpha = rank is assumed), and PiSSA adapters. The last keep their
    changed base weights; :func:`selva.lora.merge_adapter` converts them against the weights of the model. A bare PiSSA
    file has no settings to tell its scale, and is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an adapter, or a damaged one; names the file and the reason. Nothing in it is executed.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        raise UserError(f"{path}: is a file of features, as extract_features.py writes them for train_lora.py; an "
                        "adapter ends in .pt or .safetensors")
    if path.suffix == ".safetensors":
        tensors, meta = read_safetensors(path)
    else:
        tensors, meta = _adapter_part(read_torch(path))
    return _checked_adapter(path, tensors, meta)


def readable_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the meta of a file with the real ``target``, where the file itself tells others why they cannot use it."""
    if meta.get("format") != NATIVE_FORMAT:
        return dict(meta)
    return {**{key: value for key, value in meta.items() if key != "native_target"}, "target": meta["native_target"]}


def _adapter_part(content: Mapping[str, Any]) -> tuple[Any, Any]:
    if "state_dict" not in content:
        return content, {}  # the oldest step files: tensors without settings
    return content["state_dict"], content.get("meta", {})


def _checked_adapter(path: Path, tensors: Any, meta: Any) -> Adapter:
    if not isinstance(tensors, Mapping) or not isinstance(meta, Mapping):
        raise UserError(f"{path}: state_dict and meta must be dictionaries; this is not an adapter file")
    _check_tensors(path, tensors)
    adapter = Adapter(
        {key: value.float().contiguous() for key, value in tensors.items()}, dict(meta), source=str(path)
    )
    if problems := adapter.problems():
        raise UserError(f"{path}: {listed(problems, MAX_PROBLEMS)}")
    return Adapter(adapter.tensors, _checked_meta(path, adapter), source=str(path))


def _meta_of_model(model: nn.Module, meta: Mapping[str, Any]) -> dict[str, Any]:
    cfg: LoRAConfig | None = getattr(model, "lora_config", None)
    if cfg is None:
        raise UserError("the model has no adapters to save; call inject_lora first")
    return {**meta, "target": list(cfg.targets), "lora_dropout": cfg.dropout, "lora_config": cfg.to_dict()}


def _scale_to_keep(adapter: Adapter) -> float:
    """Return the scale that all layers share if a multiplication by it rounds B, otherwise 1."""
    scales = {adapter.scale(name) for name in adapter.layer_names()} if not adapter.problems() else set()
    return scales.pop() if len(scales) == 1 and not all(map(is_power_of_two, scales)) else 1.0


def _folded(adapter: Adapter, fold: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors of one rank, with the scale of the meta folded into B where ``fold`` is given."""
    if problems := adapter.problems():
        raise UserError(f"{adapter.source}: {listed(problems, MAX_PROBLEMS)}")
    if adapter.is_pissa:
        raise UserError(
            f"{adapter.source}: holds changed base weights (PiSSA), which our adapter files cannot store"
        )
    pairs = {}
    for name in adapter.layer_names():
        a, b = adapter.factors(name)
        pairs[name] = a.float(), b.float() * adapter.scale(name) if fold else b.float()
    magnitudes = {key: value for key, value in adapter.tensors.items() if key.endswith(MAGNITUDE_SUFFIX)}
    # Without targets the full names are: each ends with itself.
    return {**padded_to_one_rank(pairs), **magnitudes}, {"target": adapter.layer_names(), **adapter.meta}


def _for_file(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path, scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and meta as they go into a file; tensors already in that form are passed through, not copied."""
    if not tensors:
        raise UserError(f"{path}: there are no adapter tensors to save")
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    rank = next(value.shape[0] for key, value in tensors.items() if key.endswith(".lora_A"))
    meta = {
        **meta, "rank": rank, "alpha": alpha_for(scale, rank), "target": list(meta["target"]), "use_rslora": False,
        "init_mode": "standard",
    }
    if reason := why_native(tensors):
        meta = {**meta, "format": NATIVE_FORMAT, "target": [reason], "native_target": meta["target"]}
    else:
        meta = {key: value for key, value in meta.items() if key != "format"}
    check_plain(meta, "meta", allow_tensors=False)
    return tensors, meta


def why_native(tensors: Mapping[str, Tensor]) -> str:
    """Return the reason why ComfyUI-SelVA cannot apply ``tensors``, and what it could apply; "" if it can."""
    causes, remedies = [], []
    if any(value.dim() == 3 for value in tensors.values()):
        causes.append("changes convolutions")
        remedies.append("with targets such as attn.qkv and text_block.linear1")
    if any(key.endswith(MAGNITUDE_SUFFIX) for key in tensors):
        causes.append("has DoRA magnitudes")
        remedies.append("without DoRA")
    if not causes:
        return ""
    return (
        f"this adapter ({NATIVE_FORMAT}) {' and '.join(causes)}, which ComfyUI-SelVA cannot apply; "
        f"train {' and '.join(remedies)} for an adapter that works there"
    )


def _check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    if what := foreign_format(tensors):
        raise UserError(f"{path}: {what}")
    if not any(str(key).endswith(FACTOR_SUFFIXES) for key in tensors):
        keys = listed([str(key) for key in tensors], MAX_PROBLEMS)
        raise UserError(f"{path}: not an adapter, it has no lora_A and lora_B tensors (found: {keys or 'nothing'})")
    foreign = [
        str(key) for key, value in tensors.items()
        if not isinstance(key, str) or not is_whole_tensor(value) or not value.is_floating_point()
    ]
    if foreign:
        raise UserError(
            f"{path}: expected floating-point tensors only, but these are not: {listed(foreign, MAX_PROBLEMS)}"
        )
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path}: these tensors hold NaN or infinite values: {listed(broken, MAX_PROBLEMS)}")


def _checked_meta(path: Path, adapter: Adapter) -> dict[str, Any]:
    """Return the meta with rank, alpha and the real targets, after checking it against the tensors."""
    written_as = adapter.meta.get("format")
    if written_as not in (None, NATIVE_FORMAT):
        raise UserError(f"{path}: adapter format {written_as!r} is unknown here; update this package to read it")

    if written_as == NATIVE_FORMAT and "native_target" not in adapter.meta:
        raise UserError(f"{path}: the meta of this {NATIVE_FORMAT} adapter has no native_target, its real targets")
    meta = readable_meta(adapter.meta)

    ranks = {adapter.factors(name)[0].shape[0] for name in adapter.layer_names()}
    rank = meta.setdefault("rank", max(ranks))
    if ranks != {rank}:
        raise UserError(f"{path}: the rank in the meta is {rank!r}, the tensors have {sorted(ranks)}")
    alpha = meta.get("alpha")
    if alpha is None:
        if adapter.is_pissa:
            raise UserError(f"{path}: a PiSSA adapter without alpha in its meta, so its scale is unknown")
        log.warning("%s holds no settings: assuming alpha = rank = %d", path, rank)
        alpha = meta["alpha"] = float(rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{path}: alpha in the meta is {alpha!r}, expected a number")
    if not isinstance(meta.get("use_rslora", False), bool):
        raise UserError(f"{path}: use_rslora in the meta is {meta['use_rslora']!r}, expected true or false")
    return meta


# ---------------------------------------------------------------------------------------------------------------
# training state
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingState:
    """Content of a step file.

    Attributes:
        step: finished optimiser steps.
        lora: the factors as they are trained, for :func:`selva.lora.state.load_lora_state_`; of a published PiSSA
            training also the changed base weights, which :func:`selva.lora.published.continued_state` converts.
        optimizer, scheduler: their state dicts; the scheduler's may be None.
        meta: settings of the run.
        extra: what else the run stored: random states, position in the data, averages, loss scaler ...
    """

    path: Path
    step: int
    lora: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    meta: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_published(self) -> bool:
        """True for a step file of ComfyUI-SelVA."""
        return "lora_config" not in self.meta


def step_file_name(step: int) -> str:
    """Return ``adapter_step00500.pt`` for step 500."""
    return f"adapter_step{step:05d}.pt"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    meta: Mapping[str, Any],
    *,
    step: int,
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a step file, from which a run resumes bit for bit and which is an adapter as well; return its meta.

    Args:
        model: a model with injected adapters.
        meta: see :func:`save_adapter`.
        optimizer, scheduler: their ``state_dict()``.
        extra: plain containers, numbers, strings and tensors.
        state: factors to use as the adapter instead of the current ones (an average); resuming uses the current ones.

    Raises:
        ValueError: something that could not be read back safely; says where it is.
    """
    path = Path(path)
    lora = lora_state_dict(model)
    exported = adapter_tensors(model, lora if state is None else state)
    tensors, meta = _for_file(exported, _meta_of_model(model, meta), path)
    content = {
        "state_dict": tensors,
        "optimizer_state": optimizer,
        "scheduler": scheduler,
        "step": step,
        "meta": meta,
        "lora": lora,
        "extra": dict(extra or {}),
    }
    check_plain(content, "checkpoint")
    with atomic_path(path) as temporary:
        write_torch({**content, "optimizer": _refusal_there(optimizer)}, temporary)
    return meta


def _refusal_there(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state in the form of ``optimizer`` at which AdamW stops and says why, see the head of this file."""
    groups = [{"params": list(group["params"])} for group in optimizer.get("param_groups", ())]
    state = {number: {"step": CONTINUED_HERE_ONLY} for group in groups for number in group["params"]}
    return {"state": state, "param_groups": groups}


def load_checkpoint(path: str | os.PathLike[str]) -> TrainingState:
    """Return the content of a step file, ours or one of ComfyUI-SelVA's, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or an adapter for inference that cannot be resumed.
    """
    path = Path(path)
    content = read_torch(path)
    kinds = {"state_dict": Mapping, "optimizer": Mapping, "step": int, "meta": Mapping}
    missing = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    optional = {"optimizer_state": Mapping, "scheduler": Mapping | None, "lora": Mapping, "extra": Mapping}
    missing += [key for key, kind in optional.items() if key in content and not isinstance(content[key], kind)]
    if missing:
        raise UserError(
            f"{path}: cannot resume from this file, it has no {', '.join(missing)}; resume from an adapter_stepNNNNN.pt"
        )
    adapter = _checked_adapter(path, *_adapter_part(content))
    # A published step file holds the trained factors themselves, unscaled, as its adapter.
    lora = content.get("lora", content["state_dict"])
    _check_tensors(path, lora)
    return TrainingState(
        path=path,
        step=content["step"],
        lora={key: value.float() for key, value in lora.items()},
        optimizer=content.get("optimizer_state", content["optimizer"]),  # a published file, and ours before 0.2
        scheduler=content.get("scheduler"),
        # The tensors say whether it is PiSSA as published; ours is in lora_config.
        meta={**adapter.meta, **({"init_mode": "pissa"} if adapter.is_pissa else {})},
        extra=content.get("extra", {}),
    )


def load_newest_checkpoint(folder: str | os.PathLike[str]) -> TrainingState | None:
    """Return the highest step in ``folder`` whose file can be read, or None; files passed over are named in the log."""
    files = {int(match[1]): file for file in Path(folder).glob("*.pt") if (match := STEP_FILE.fullmatch(file.name))}
    for step in sorted(files, reverse=True):
        try:
            return load_checkpoint(files[step])
        except (ValueError, OSError) as error:
            log.warning("step file skipped: %s", error)
    return None


def check_same_settings(saved: TrainingState, cfg: LoRAConfig) -> None:
    """Raise if a run with ``cfg`` cannot continue from ``saved``.

    Raises:
        ValueError: names every adapter setting that differs, and the flags to give. (The dropout may differ.)
    """
    before, now = LoRAConfig.from_meta(saved.meta), cfg
    if saved.is_published:
        before = replace(before, targets=published_targets(before.targets, saved.lora))
    pairs = {
        "rank": (before.rank, now.rank),
        "scale": ([before.scale(r) for r in sorted(before.ranks())], [now.scale(r) for r in sorted(now.ranks())]),
        "targets": (sorted(before.targets), sorted(now.targets)),
        "init": (before.init, now.init),
        "target_ranks": (dict(before.target_ranks or {}), dict(now.target_ranks or {})),
        "dora": (before.dora, now.dora),
    }
    different = [f"{name} was {was} and is {is_} now" for name, (was, is_) in pairs.items() if was != is_]
    if different:
        what = "a step file of ComfyUI-SelVA; " if saved.is_published else ""
        raise UserError(
            f"{saved.path}: {what}cannot resume with other adapter settings: {'; '.join(different)}. "
            f"Use the same settings ({before.flags()}), or start a new run"
        )
