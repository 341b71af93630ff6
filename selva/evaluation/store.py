"""Results of single pairs on disk, so that a stopped evaluation goes on, and memory does not grow with the sounds.

    <output>/pairs.jsonl          one line per pair: names, content hashes, figures, rows of its features
    <output>/features/<kind>.f32  (rows, width) float32, one row per sound, e.g. clap_generated; one width per kind

A line is written after its features; what a killed process left behind a file's last known row is written over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selva.utils.files import append_whole

PAIRS_FILE, FEATURES_FOLDER = "pairs.jsonl", "features"


class PairStore:
    """The finished pairs of an output folder, by their key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / PAIRS_FILE
        self.done: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                    self.done[record["key"]] = record
                    for kind, (row, _) in record["features"].items():
                        self._rows[kind] = max(self._rows.get(kind, 0), row + 1)
                except (ValueError, KeyError, TypeError, RecursionError):  # the last line of a killed process
                    continue

    def add(self, key: str, figures: Mapping[str, Any], features: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Keep the figures and the (width,) features of a pair, and return its record."""
        rows = {}
        for kind, values in features.items():
            row, width = self._rows.get(kind, 0), len(values)
            path = self._features_path(kind)
            path.parent.mkdir(exist_ok=True)
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(row * width * 4)
                file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
            self._rows[kind] = row + 1
            rows[kind] = (row, width)
        record = {"key": key, "figures": dict(figures), "features": rows}
        line = json.dumps(record, ensure_ascii=False).encode()
        # Behind the half line of a killed process a new line begins; the half one is skipped when it is read.
        broken = self.path.is_file() and self.path.stat().st_size and not _ends_with_newline(self.path)
        append_whole(self.path, (b"\n" if broken else b"") + line + b"\n")
        self.done[key] = record
        return record

    def features(self, records: list[dict[str, Any]], kind: str) -> np.ndarray | None:
        """Return the (n, width) float32 features of these records, mapped from disk; None unless all have them."""
        places = [record["features"].get(kind) for record in records]
        if not places or any(place is None for place in places):
            return None
        return self._rows_of(kind, places[0][1])[[place[0] for place in places]]

    def row(self, record: Mapping[str, Any], kind: str) -> np.ndarray:
        """Return the (width,) float32 features of one record; they stay on disk until they are read."""
        number, width = record["features"][kind]
        return self._rows_of(kind, width)[number]

    def _rows_of(self, kind: str, width: int) -> np.ndarray:
        return np.memmap(self._features_path(kind), dtype="<f4", mode="c").reshape(-1, width)

    def _features_path(self, kind: str) -> Path:
        return self.folder / FEATURES_FOLDER / f"{kind}.f32"


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
