"""Settings that choose a base model and the device it runs on; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from selva.models.variants import VARIANTS
from selva.utils.errors import UserError
from selva.utils.settings import setting

MODEL, GENERAL = "model", "general"
SHARED = ("variant", "selva_dir", "generator", "device", "precision")  # all settings that are marked `shared`


@dataclass(frozen=True)
class ModelConfig:
    """The base model: which one, where its files are, where it is computed."""

    variant: str = setting("large_44k", f"base model, one of {', '.join(VARIANTS)}; tiny_16k is built in", group=MODEL,
                           choices=VARIANTS, metavar="NAME", environment="SELVA_VARIANT", shared=True)
    selva_dir: Path | None = setting(None, "folder of the published weights (download_weights.py fills it)",
                                     group=MODEL, metavar="DIR", environment="SELVA_DIR", shared=True)
    device: str = setting("auto", "where to compute; auto takes a GPU if there is one", group=GENERAL,
                          metavar="auto|cpu|cuda|mps", shared=True)


@dataclass(frozen=True)
class GeneratorModelConfig(ModelConfig):
    """The base model, where its generator may be the user's own: for everything that runs the generator."""

    generator: Path | None = setting(
        None, "a generator of your own instead of that of --variant: .pth or .safetensors from scripts/train_base.py, "
        "scripts/make_ema.py or MMAudio's trainer", group=MODEL, metavar="FILE",
        shared=True)

    def __post_init__(self) -> None:
        if self.generator is not None and not Path(self.generator).is_file():
            raise UserError(f"--generator {self.generator}: no such file")

    def needs(self, parts: Iterable[str]) -> list[str]:
        """Return those of these parts that the files of the variant have to bring."""
        return [part for part in parts if part != "generator" or self.generator is None]
