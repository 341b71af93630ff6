"""Adapters in the formats of other programs, which are told apart by their keys so that a message can name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PEFT, KOHYA, MMAUDIO_LORA = "PEFT", "kohya", "MMAudio-Lora"
HOW_TO_CONVERT = "python scripts/adapter.py convert FILE --to selva --output NEW.pt makes it ours (docs/adapters.md)"


def format_of(content: Mapping[Any, Any]) -> str:
    """Return PEFT, KOHYA or MMAUDIO_LORA for the content of a file; "" if it is in no format known here.

    - PEFT: ``base_model.model.<layer>.lora_A.weight`` (or ``.lora_A.default.weight``), the scale in a file beside it.
    - kohya and diffusers: ``<layer>.lora_down.weight`` and ``.lora_up.weight``, the scale as ``<layer>.alpha``.
    - MMAudio-Lora: ``{"lora_weights": {layer: {"lora_A", "lora_B"}}, "lora_config", "metadata"}``.
    """
    keys = [str(key) for key in content]
    if isinstance(content.get("lora_weights"), Mapping):
        return MMAUDIO_LORA
    if any(".lora_A." in key and key.endswith(".weight") for key in keys):
        return PEFT
    if any(key.endswith(("lora_down.weight", "lora_up.weight")) for key in keys):
        return KOHYA
    return ""


def foreign_format(content: Mapping[Any, Any]) -> str:
    """Return a name for the content of a file, and the way to convert it; "" if it is in no format known here."""
    what = {
        MMAUDIO_LORA: "an adapter of MMAudio-Lora, with its layers under 'lora_weights'",
        PEFT: "an adapter in the format of PEFT: its tensors are called <layer>.lora_A.weight and its scale is in "
              "adapter_config.json",
        KOHYA: "an adapter in the format of kohya or diffusers, with tensors called lora_down and lora_up",
    }.get(format_of(content))
    return f"{what}; {HOW_TO_CONVERT}" if what else ""
