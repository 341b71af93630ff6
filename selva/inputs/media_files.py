"""Files in folders: sounds, videos, links and subfolders, and a word about those that are not taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from selva.inputs.file_names import same_name
from selva.inputs.suffixes import AUDIO_SUFFIXES, OTHER_SUFFIXES, VIDEO_SUFFIXES
from selva.utils.text import listed

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_KNOWN = frozenset((*AUDIO_SUFFIXES, *VIDEO_SUFFIXES, *OTHER_SUFFIXES))


def visible_files(folder: PathLike, recursive: bool = False) -> Iterator[Path]:
    """Yield the files of a folder that are not hidden, links that lead nowhere among them.

    Folders that cannot be read are named in a warning, as their files are missing in what follows.

    Args:
        recursive: those of the subfolders too. Links to folders elsewhere are followed, each of these folders once.
    """
    root = os.path.realpath(folder)
    seen = {root}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_say_unreadable):
        kept = []
        for name in folders if recursive else ():
            real = os.path.realpath(os.path.join(parent, name))
            is_link_within = Path(real).is_relative_to(root) and os.path.islink(os.path.join(parent, name))
            # Hidden files are nobody's clips: macOS leaves "._dog.mp4" on foreign disks.
            if name.startswith(".") or real in seen or is_link_within:
                continue
            seen.add(real)
            kept.append(name)
        folders[:] = kept
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _say_unreadable(error: OSError) -> None:
    log.warning("%s: cannot be read (%s); its files are left out", error.filename, error.strerror)


def say_not_taken(folder: PathLike, files: Iterable[Path], suffixes: Collection[str], recursive: bool = False) -> None:
    """Name the files of a folder that may have been meant: of an unknown kind, or in subfolders that are not searched.

    Args:
        files: of the folder, of all kinds. suffixes: those that are taken.
        recursive: the subfolders were searched.
    """
    unknown = sorted(path.name for path in files if path.suffix.lower() not in _KNOWN)
    if unknown:
        log.warning("%s: not taken, as their endings are of no known kind: %s; known are %s", folder, listed(unknown),
                    " ".join(suffixes))
    if not recursive:
        say_not_searched(folder, suffixes)


def say_not_searched(folder: PathLike, suffixes: Collection[str]) -> None:
    """Name the direct subfolders that hold files which would be taken in the folder itself."""
    if deeper := sorted(_folders_with(folder, tuple(suffixes))):
        log.warning("%s: its subfolders are not searched, though there are such files in %s", folder, listed(deeper))


def _folders_with(folder: PathLike, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield the names of the direct subfolders with a file that ends so."""
    for path in Path(folder).iterdir():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            names = os.listdir(path)
        except OSError:
            continue
        if any(name.lower().endswith(suffixes) and not name.startswith(".") for name in names):
            yield path.name


def by_name(files: Iterable[Path], suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Return {stem, as `same_name` has it: files} of those that end so, the first kind of ``suffixes`` first."""
    order = list(suffixes)
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in order:
            found.setdefault(same_name(path.stem), []).append(path)
    for paths in found.values():
        paths.sort(key=lambda path: (order.index(path.suffix.lower()), path.parts))
    return found


def first_of_each_name(files: Iterable[Path], suffixes: Collection[str]) -> list[Path]:
    """Return one file of each name in a folder, of the first kind of ``suffixes``, in their order; names the others."""
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    chosen = [paths for inside in folders.values() for paths in by_name(inside, suffixes).values()]
    if several := [f"{first}, not {', '.join(path.name for path in rest)}" for first, *rest in chosen if rest]:
        log.warning("several files of one name; taken: %s", listed(several, separator="; "))
    return [first for first, *_ in chosen]


def say_choice(folder: PathLike, chosen: Iterable[list[Path]]) -> None:
    """Say of which names there are several sounds, or several videos, and which of them is taken: the first.

    A sound and the video that it belongs to are no choice.
    """
    several = []
    for first, *rest in chosen:
        others = [path.name for path in rest if _is_sound(path) == _is_sound(first)]
        several += [f"{first.name}, not {', '.join(others)}"] if others else []
    if several:
        log.warning("%s: several files of one name; taken: %s", folder, listed(several, separator="; "))


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES
