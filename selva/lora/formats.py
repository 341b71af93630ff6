"""Adapters in the formats of other programs -> ours and back, as tensors and settings in memory.

    PEFT           base_model.model.<layer>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector; adapter_config.json
    kohya          lora_unet_<layer_with_underscores>.lora_down.weight, .lora_up.weight, .alpha
    MMAudio-Lora   {"lora_weights": {layer: {"lora_A", "lora_B"}}, "lora_config": {layer: {"rank", "alpha"}}}

All hold the factors A and B of our own shapes, so nothing is computed: the update of every weight stays the same to the
last bit. Formats differ in where the scale stands. Ours has one alpha and one rank for all layers, so other ranks are
padded with zeros, and a scale that only some layers have is taken into B where that does not round.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from selva.lora.config import MAX_PROBLEMS, lora_scale
from selva.lora.foreign import KOHYA, MMAUDIO_LORA, PEFT, format_of
from selva.lora.merge import MAGNITUDE_SUFFIX, Adapter, padded_to_one_rank
from selva.utils.errors import UserError
from selva.utils.text import listed

log = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"
KOHYA_PREFIXES = (KOHYA_PREFIX, "lora_transformer_", "transformer.", "diffusion_model.", "")
# Start values of PEFT that leave the base weights as they are; the others subtract them from the base model.
PEFT_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

Factors = dict[str, tuple[Tensor, Tensor, float]]  # layer -> A (rank, in[, k]), B (out, rank[, 1]), scale


def with_one_scale(
    factors: Factors, magnitudes: Mapping[str, Tensor], meta: Mapping[str, Any], source: str, fold: bool = False
) -> Adapter:
    """Return an adapter of one rank and one alpha for layers that may each have their own.

    Args:
        factors: of every layer. magnitudes: (out,) by layer, with DoRA.
        fold: take scales into B even where that rounds B, by up to 6e-8 of its values.

    Raises:
        UserError: scales differ by other factors than powers of two, and ``fold`` is not given; names the layers.
    """
    if not factors:
        raise UserError(f"{source}: there are no adapter tensors in it")
    common = Counter(scale for *_, scale in factors.values()).most_common(1)[0][0]
    pairs, rounded = {}, []
    for name, (a, b, scale) in factors.items():
        if scale != common:
            ratio = scale / common
            if not is_power_of_two(ratio) or not torch.equal((b.float() * ratio) / ratio, b.float()):
                rounded.append(f"{name} (scale {scale:g})")
            b = b.float() * ratio
        pairs[name] = a.float(), b.float()
    if rounded and not fold:
        raise UserError(
            f"{source}: its layers have different scales, and a file here has one for all ({common:g} for most); "
            f"{listed(rounded, MAX_PROBLEMS)} cannot be brought to it without rounding; --fold allows that"
        )
    if rounded:
        log.warning("%s: the scales of %s are taken into B, which rounds it", source, listed(rounded, MAX_PROBLEMS))
    tensors = padded_to_one_rank(pairs) | {f"{name}{MAGNITUDE_SUFFIX}": m.float() for name, m in magnitudes.items()}
    rank = max(len(a) for a, _ in pairs.values())
    own = {"rank": rank, "alpha": alpha_for(common, rank), "use_rslora": False, "init_mode": "standard"}
    return Adapter(tensors, {"target": list(factors), **meta, **own}, source)


def is_power_of_two(value: float) -> bool:
    """Return True if a multiplication by ``value`` changes exponents only."""
    return value > 0 and math.frexp(value)[0] == 0.5


def alpha_for(scale: float, rank: int) -> float:
    """Return the alpha for which ``alpha / rank`` is ``scale``: exactly where there is one, else to float64's rounding.

    Updates are float32, so the latter changes none of their bits either (and whoever writes a file compares them).
    """
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scale), alpha)


def _factors(adapter: Adapter, what: str) -> Factors:
    """Return the factors and scales of an adapter that a foreign format is to hold.

    Raises:
        UserError: it holds changed base weights, which no other format has a place for.
    """
    if problems := adapter.problems():
        raise UserError(f"{adapter.source}: {listed(problems, MAX_PROBLEMS)}")
    if adapter.is_pissa:
        raise UserError(f"{adapter.source}: holds changed base weights (PiSSA as published), which {what} cannot hold; "
                        "with the base model they become an ordinary adapter first: --variant and --selva_dir")
    return {name: (*adapter.factors(name), adapter.scale(name)) for name in adapter.layer_names()}


# -- PEFT --------------------------------------------------------------------------------------------------------------


def to_peft(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of ``adapter_model.safetensors`` and the content of ``adapter_config.json``.

    Raises:
        UserError: DoRA on a part of the layers only, or changed base weights.
    """
    factors = _factors(adapter, "PEFT")
    magnitudes = {name: adapter.tensors.get(name + MAGNITUDE_SUFFIX) for name in factors}
    without = [name for name, magnitude in magnitudes.items() if magnitude is None]
    if without and len(without) < len(factors):
        raise UserError(f"{adapter.source}: PEFT has DoRA in all layers or in none, and these have none: "
                        f"{listed(without, MAX_PROBLEMS)}")
    tensors: dict[str, Tensor] = {}
    for name, (a, b, _) in factors.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = a, b
        if (magnitude := magnitudes[name]) is not None:  # of a convolution (1, out, 1) there
            shaped = magnitude if a.dim() == 2 else magnitude.view(1, -1, 1)
            tensors[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"] = shaped
    rank = next(len(a) for a, *_ in factors.values())
    config = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": None,
        "r": rank, "lora_alpha": adapter.meta.get("alpha", rank), "use_rslora": adapter.meta.get("use_rslora", False),
        "use_dora": not without, "target_modules": sorted(factors), "lora_dropout": 0.0, "bias": "none",
        "init_lora_weights": True, "fan_in_fan_out": False, "modules_to_save": None,
    }
    return tensors, config


def from_peft(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str, meta: Mapping[str, Any] | None = None,
    fold: bool = False,
) -> Adapter:
    """Return the adapter of a PEFT folder; ranks and alphas of single layers are followed.

    Args:
        config: the content of ``adapter_config.json``. meta: our settings, where the file has kept them.

    Raises:
        UserError: another method than LoRA, biases or whole layers that were trained too, start values that PEFT
            subtracts from the base model (its PiSSA, OLoRA ...), or tensors that are no adapter; says which.
    """
    problems = []
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"its method is {config['peft_type']}, expected LORA")
    problems += [f"{key} is {config[key]!r}, which an adapter here has no place for"
                 for key, plain in (("bias", ("none",)), ("modules_to_save", (None, [])), ("fan_in_fan_out", (False,)))
                 if key in config and config[key] not in plain]
    if (start := config.get("init_lora_weights")) not in PEFT_PLAIN_STARTS:
        problems.append(f"init_lora_weights is {start!r}: its factors belong to base weights that PEFT has changed; "
                        "save it there with path_initial_model_for_weight_conversion")
    if not isinstance(config.get("lora_alpha"), int | float):
        problems.append(f"lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?"
                             r"(?:\.weight)?", key)
        if match is None:
            problems.append(f"{key} is no LoRA tensor")
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    problems += [f"{name} has no {part}" for name, own in parts.items() for part in ("lora_A", "lora_B")
                 if part not in own]
    if problems:
        raise UserError(f"{source}: {listed(problems, MAX_PROBLEMS)}")
    factors: Factors = {}
    for name, own in parts.items():
        rank = len(own["lora_A"])
        alpha = float(_of_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
        factors[name] = own["lora_A"], own["lora_B"], lora_scale(alpha, rank, bool(config.get("use_rslora")))
    magnitudes = {name: own["lora_magnitude_vector"].flatten() for name, own in parts.items()
                  if "lora_magnitude_vector" in own}
    return with_one_scale(factors, magnitudes, meta or {}, source, fold)


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern, a regular expression for the end of a layer's name, that fits."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


# -- kohya -------------------------------------------------------------------------------------------------------------


def to_kohya(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of a file in the format of kohya's scripts.

    Raises:
        UserError: DoRA magnitudes or changed base weights, which it does not hold; names the layers.
    """
    factors = _factors(adapter, "the format of kohya")
    if magnitudes := [name for name in factors if name + MAGNITUDE_SUFFIX in adapter.tensors]:
        raise UserError(f"{adapter.source}: has DoRA magnitudes, which the format of kohya cannot hold: "
                        f"{listed(magnitudes, MAX_PROBLEMS)}; PEFT can (--to peft)")
    tensors: dict[str, Tensor] = {}
    for name, (a, b, scale) in factors.items():
        key, alpha = KOHYA_PREFIX + name.replace(".", "_"), torch.tensor(alpha_for(scale, len(a)), dtype=torch.float64)
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
        tensors[f"{key}.alpha"] = alpha.float() if alpha.float().double() == alpha else alpha
    return tensors


def from_kohya(
    tensors: Mapping[str, Tensor], layer_names: Collection[str], source: str, meta: Mapping[str, Any] | None = None,
    fold: bool = False,
) -> Adapter:
    """Return the adapter of a file of kohya's or of diffusers', whose names have lost their dots.

    Args:
        layer_names: of the base model, from which the dots are found again.

    Raises:
        UserError: parts of other methods (LoHa, LoKr, DoRA), or of layers that the base model does not have.
    """
    by_key = {name.replace(".", "_"): name for name in layer_names}
    problems: list[str] = []
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_down|lora_up|alpha)(?:\.weight)?", key)
        if match is None:
            problems.append(f"{key} is no part of a plain LoRA")
            continue
        stems = (match[1].removeprefix(prefix) for prefix in KOHYA_PREFIXES)
        name = next((by_key[stem.replace(".", "_")] for stem in stems if stem.replace(".", "_") in by_key), None)
        if name is None:
            problems.append(f"{match[1]} is no layer of this base model")
        else:
            parts.setdefault(name, {})[match[2]] = tensor
    problems += [f"{name} has no {part}" for name, own in parts.items() for part in ("lora_down", "lora_up")
                 if part not in own]
    if problems:
        raise UserError(f"{source}: {listed(list(dict.fromkeys(problems)), MAX_PROBLEMS)}; is it for another model?")
    factors: Factors = {}
    for name, own in parts.items():
        rank = len(own["lora_down"])
        factors[name] = own["lora_down"], own["lora_up"], float(own["alpha"]) / rank if "alpha" in own else 1.0
    return with_one_scale(factors, {}, meta or {}, source, fold)


# -- MMAudio-Lora ------------------------------------------------------------------------------------------------------


def from_mmaudio_lora(content: Mapping[str, Any], source: str, fold: bool = False) -> Adapter:
    """Return the adapter of a file of MMAudio-Lora.

    Raises:
        UserError: a layer has no tensors, or no alpha to tell its scale.
    """
    layers, settings = content["lora_weights"], content.get("lora_config", {})
    factors: Factors = {}
    problems = []
    for name, own in layers.items():
        a, b = (own.get(key) if isinstance(own, Mapping) else None for key in ("lora_A", "lora_B"))
        alpha = settings.get(name, {}).get("alpha") if isinstance(settings, Mapping) else None
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            problems.append(f"{name} has no lora_A and lora_B")
        elif isinstance(alpha, bool) or not isinstance(alpha, int | float):
            problems.append(f"{name} has the alpha {alpha!r} in lora_config, expected a number")
        else:
            factors[name] = a, b, float(alpha) / len(a)
    if problems:
        raise UserError(f"{source}: {listed(problems, MAX_PROBLEMS)}")
    return with_one_scale(factors, {}, {}, source, fold)


def from_foreign(
    content: Mapping[str, Any], source: str, *, peft_config: Mapping[str, Any] | None = None,
    layer_names: Collection[str] | None = None, meta: Mapping[str, Any] | None = None, fold: bool = False,
) -> Adapter | None:
    """Return the adapter in the content of another program's file; None if it is in no format known here.

    Raises:
        UserError: the format needs ``peft_config`` or ``layer_names`` and they are None, or see the format's reader.
    """
    kind = format_of(content)
    if kind == MMAUDIO_LORA:
        return from_mmaudio_lora(content, source, fold)
    if kind == PEFT:
        if peft_config is None:
            raise UserError(f"{source}: an adapter of PEFT without adapter_config.json beside it, which holds its "
                            'scale; put that file there (at least {"lora_alpha": NUMBER})')
        return from_peft(content, peft_config, source, meta, fold)
    if kind == KOHYA:
        if layer_names is None:
            raise UserError(f"{source}: an adapter in the format of kohya, whose layer names have no dots; give the "
                            "--variant that it is for")
        return from_kohya(content, layer_names, source, meta, fold)
    return None
