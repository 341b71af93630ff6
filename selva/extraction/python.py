"""Extraction from Python: ``selva.extract``, with the settings of ``extract_features.py`` by their names."""

from __future__ import annotations

from typing import Any

from selva.extraction.config import ExtractionConfig
from selva.extraction.extract import extract as run
from selva.extraction.manifest import MANIFEST_FILE, Row, read_manifest
from selva.extraction.outputs import memmap_manifest
from selva.utils.settings import from_names


def extract(**settings: Any) -> list[Row]:
    """Extract features of videos, and return what became of every clip: the rows of the manifest.

    Args:
        settings: of :class:`selva.extraction.config.ExtractionConfig`, by the names of the flags: ``inputs``,
            ``output_dir``, ``prompt``, ``variant``, ``selva_dir`` ...

    Returns:
        A dictionary per clip with ``id``, ``source``, ``start_sec``, ``status`` ("done", "skipped" or "failed"),
        ``reason``, ``files`` and ``duration_sec``; empty where other parts of the work are not done yet.

    Raises:
        ValueError, FileNotFoundError: settings, tables or weights cannot be used.
    """
    config = from_names(ExtractionConfig, settings)
    run(config)
    memmap = config.format == "memmap" or config.recordings is not None
    manifest = memmap_manifest(config.output_dir)[0] if memmap else config.output_dir / MANIFEST_FILE
    return read_manifest(manifest) if manifest.is_file() else []
