"""Extraction from Python: ``selva.extract``, with the settings of ``extract_features.py`` by their names."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from typing import Any

from selva.extraction.config import ExtractionConfig
from selva.extraction.extract import extract as run
from selva.extraction.manifest import MANIFEST_FILE, Row, read_manifest
from selva.extraction.outputs import memmap_manifest
from selva.utils.errors import UserError
from selva.utils.settings import from_names


def extract(**settings: Any) -> list[Row]:
    """Extract features of videos, and return what became of every clip: the rows of the manifest.

    Args:
        settings: of :class:`selva.extraction.config.ExtractionConfig`, by the names of the flags: ``inputs``,
            ``output_dir``, ``prompt``, ``variant``, ``selva_dir`` ... Without ``workers``, videos are read in this
            process: others would import the calling script first, and repeat what it does.

    Returns:
        A dictionary per clip with ``id``, ``source``, ``start_sec``, ``status`` ("done", "skipped" or "failed"),
        ``reason``, ``files`` and ``duration_sec``; empty where other parts of the work are not done yet.

    Raises:
        ValueError, FileNotFoundError: settings, tables or weights cannot be used, or a process that was started to
            read videos has come here by importing the calling script.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself knows it
        raise UserError("selva.extract was called again by a process that only imports this script, to read videos; "
                        "put the call under if __name__ == \"__main__\": or take workers=0")
    config = from_names(ExtractionConfig, settings)
    if config.workers is None and config.recordings is None:  # those of recordings are threads
        config = replace(config, workers=0)
    run(config)
    memmap = config.format == "memmap" or config.recordings is not None
    manifest = memmap_manifest(config.output_dir)[0] if memmap else config.output_dir / MANIFEST_FILE
    return read_manifest(manifest) if manifest.is_file() else []
