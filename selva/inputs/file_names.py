"""File names as people write and compare them: spellings of letters, backslashes of Windows, patterns like ``*.mp4``.

``é`` is one character (NFC) on most systems and two, ``e`` and an accent (NFD), in names that macOS has written.
"""

from __future__ import annotations

import glob
import os
import unicodedata
from pathlib import Path

from selva.utils.errors import UserError


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


def written_path(text: str, folder: Path) -> Path:
    """Return a path that stands in a file, relative to ``folder``; backslashes separate folders, as on Windows.

    A name that really has a backslash in it, as other systems allow, is taken as it is where such a file is there.
    """
    path = folder / text
    return path if "\\" not in text or path.exists() else folder / text.replace("\\", "/")


def expand_pattern(path: Path) -> list[Path]:
    """Return the files that a pattern such as ``clips/*.mp4`` stands for, sorted; a path that is none comes back alone.

    Raises:
        ValueError: nothing fits the pattern.
    """
    text = str(path)
    if not glob.has_magic(text) or os.path.lexists(text):  # names may hold brackets
        return [path]
    if not (found := sorted(glob.glob(text, recursive=True))):
        raise UserError(f"no file fits {text}")
    return [Path(one) for one in found]
