"""File names on different systems: names that are one file on some of them, or that Windows does not have; patterns.

``é`` is one character (NFC) on most systems and two, ``e`` and an accent (NFD), in names that macOS has written.
``dog.flac`` and ``Dog.flac`` are two files on Linux and one on most disks of Windows and macOS. ``aux.npz`` is a device
on Windows: what is written to it is gone.
"""

from __future__ import annotations

import glob
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from selva.utils.errors import UserError
from selva.utils.text import counted

ON_WINDOWS = os.name == "nt"
MAX_NAME_BYTES = 255  # of a file name on all common file systems
_WINDOWS_CHARACTERS = '<>:"|?*'
_WINDOWS_DEVICES = frozenset(("con", "prn", "aux", "nul", "conin$", "conout$")) | frozenset(
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"
)


def same_name(name: str) -> str:
    """Return ``name`` in the form (NFC) in which names are compared."""
    return unicodedata.normalize("NFC", name)


def windows_problem(name: str) -> str | None:
    """Return the reason why Windows cannot have a file of this name, whatever is appended to it; None if it can."""
    found = next((letter for letter in name if letter in _WINDOWS_CHARACTERS), None)
    if found is not None:
        return f"{found} is not allowed in file names on Windows"
    if name.split(".")[0].rstrip(" ").casefold() in _WINDOWS_DEVICES:
        return "Windows keeps this name for a device"
    return None


def problem_here(name: str) -> str | None:
    """Return the reason why this system cannot have a file of this name; None if it can."""
    if ON_WINDOWS and (reason := windows_problem(name)):
        return reason
    size = len(os.fsencode(name))
    return f"the name has {counted(size, 'byte')}, expected at most {MAX_NAME_BYTES}" if size > MAX_NAME_BYTES else None


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of different names that are one file where upper and lower case are the same."""
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        other = first.setdefault(same_name(name).casefold(), name)
        if other != name:
            pairs.append((other, name))
    return pairs


def tells_case_apart(folder: Path) -> bool:
    """Return True if ``dog`` and ``Dog`` are two files in a folder, which need not exist yet.

    Tried out with an empty file in it, or in the closest folder above it that exists; where none can be written, what
    the disks of this system usually do.
    """
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(prefix=".case_", dir=folder) as file:
            return not os.path.lexists(Path(file.name).with_name(Path(file.name).name.upper()))
    except OSError:
        return sys.platform not in ("win32", "darwin")


def names_that_collide(names: Iterable[str], folder: Path) -> list[tuple[str, str]]:
    """Return the pairs of :func:`alike` names if ``folder`` holds them in one file, else nothing."""
    pairs = alike(names)
    return pairs if pairs and not tells_case_apart(folder) else []


def from_windows(text: str) -> str:
    """Return a relative path that was written on Windows, ``raw\\dog.mp4``, with the separator of all systems.

    Others, such as ``C:\\raw\\dog.mp4``, come back as they are: no other system has a drive C.
    """
    path = PureWindowsPath(text)
    return text if path.anchor else path.as_posix()


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
    return path if "\\" not in text or path.exists() else folder / from_windows(text)


def expand_pattern(path: Path) -> list[Path]:
    """Return the files that a pattern such as ``clips/*.mp4`` stands for, sorted; a path that is none comes back alone.

    Raises:
        ValueError: nothing fits the pattern.
    """
    text = str(path)
    if not glob.has_magic(text) or os.path.lexists(text):  # names may hold brackets
        return [path]
    if not (found := sorted(glob.glob(text, recursive=True))):
        raise UserError(f"no file matches {text}")
    return [Path(one) for one in found]
