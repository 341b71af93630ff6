"""Training from Python: ``selva.train``, with the settings of ``train_lora.py`` by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selva.training.config import RunConfig
from selva.training.train import train as run
from selva.utils.settings import from_names


def train(**settings: Any) -> Path | None:
    """Train an adapter and return its file; None after a dry run, or if the run was asked to stop.

    Args:
        settings: of :class:`selva.training.config.RunConfig` and of the dataclasses in it, by the names of the flags:
            ``data_dir``, ``output_dir``, ``variant``, ``selva_dir``, ``steps``, ``rank``, ``lr`` ...

    Raises:
        ValueError, FileNotFoundError: settings, data or weights cannot be used.
    """
    return run(from_names(RunConfig, settings)).adapter
