"""Settings that choose a base model and the device it runs on; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selva.models.variants import VARIANTS
from selva.utils.errors import UserError
from selva.utils.settings import setting

MODEL, GENERAL = "model", "general"


@dataclass(frozen=True)
class ModelConfig:
    """The base model: which one, where its files are, where it is computed."""

    variant: str = setting("large_44k", f"base model, one of {', '.join(VARIANTS)}; tiny_16k is built in", group=MODEL,
                           choices=VARIANTS, metavar="NAME")
    selva_dir: Path | None = setting(None, "folder of the published weights (scripts/download_weights.py fills it)",
                                     group=MODEL, metavar="DIR")
    device: str = setting("auto", "where to compute; auto takes a GPU if there is one", group=GENERAL,
                          metavar="auto|cpu|cuda|mps")


@dataclass(frozen=True)
class GeneratorChoice(ModelConfig):
    """A base model whose generator may be one of the user's own."""

    generator: Path | None = setting(
        None, "weights of the generator instead of the variant's own, a .pth or .safetensors file of "
        "scripts/train_base.py or of MMAudio's trainer", group=MODEL, metavar="FILE")

    def __post_init__(self) -> None:
        if self.generator is not None and not self.generator.is_file():
            raise UserError(f"--generator {self.generator}: no such file")

    def own_parts(self, parts: Sequence[str]) -> list[str]:
        """Return those of the parts of a variant whose own files are needed."""
        return [part for part in parts if part != "generator" or self.generator is None]
