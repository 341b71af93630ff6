"""Inference from Python: ``selva.generate``, with the settings of ``infer.py`` by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selva.inference.config import InferenceConfig
from selva.inference.run import generate as run
from selva.utils.settings import from_names


def generate(**settings: Any) -> list[Path]:
    """Make sounds for videos, features or words, and return the files that were written.

    Args:
        settings: of :class:`selva.inference.config.InferenceConfig` and of the dataclasses in it, by the names of the
            flags: ``inputs``, ``prompt``, ``adapter``, ``output``, ``variant``, ``selva_dir`` ...

    Raises:
        ValueError, FileNotFoundError: settings, adapters or weights cannot be used. A clip that fails is logged, and
            is not among the files.
    """
    written: list[Path] = []
    run(from_names(InferenceConfig, settings), written.append)
    return written
