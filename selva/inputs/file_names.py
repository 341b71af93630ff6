"""File names as people compare them: two spellings of one letter, as systems compose it, are the same name.

``é`` is one character (NFC) on most systems and two, ``e`` and an accent (NFD), in names that macOS has written.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


def same_name(name: str) -> str:
    """Return ``name`` in the form (NFC) in which names are compared."""
    return unicodedata.normalize("NFC", name)


class FolderNames:
    """The names in folders, each listed once: asking the system for every file takes minutes on network disks."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, str]] = {}  # folder -> {name: as it is written}, by both of its forms

    def find(self, path: Path) -> Path | None:
        """Return the path as it is written on the disk; None if its folder is not there or holds no such name."""
        parent, name = os.path.split(path)
        if parent not in self._names:
            try:
                written = sorted(os.listdir(parent or "."))
            except OSError:
                written = []
            self._names[parent] = {**{same_name(one): one for one in written}, **{one: one for one in written}}
        names = self._names[parent]
        found = names.get(name) or names.get(same_name(name))
        return None if found is None else path if found == name else Path(parent, found)
