"""Settings that choose a base model and the device it runs on; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selva.models.variants import VARIANTS
from selva.utils.settings import setting

MODEL, GENERAL = "model", "general"


@dataclass(frozen=True)
class ModelConfig:
    """The base model: which one, where its files are, where it is computed."""

    variant: str = setting("large_44k", f"base model, one of {', '.join(VARIANTS)}; tiny_16k is built in", group=MODEL,
                           choices=VARIANTS, metavar="NAME", environment="SELVA_VARIANT")
    selva_dir: Path | None = setting(None, "folder of the published weights (scripts/download_weights.py fills it)",
                                     group=MODEL, metavar="DIR", environment="SELVA_DIR")
    device: str = setting("auto", "where to compute; auto takes a GPU if there is one", group=GENERAL,
                          metavar="auto|cpu|cuda|mps")
