"""JSON files of what a benchmark has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selva.utils.files import atomic_write_text


def write_results(path: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write results together with the settings that they were measured with."""
    words = {name: str(value) for name, value in settings.items()}
    atomic_write_text(path, json.dumps({"settings": words, "results": results}, indent=2) + "\n")
