"""Numbered names: ``dog_001``, ``dog_002`` ... as ComfyUI-SelVA counts, but a clip keeps its number when run again.

A clip is the same one if the name and the content of its video and its start are the same, as the feature files in the
folder say: cameras give the same names again and again. A moved video keeps its numbers, an edited one gets a new one.
Other files there under such a name, of other videos or of other programs, keep their numbers too, so naming one video
after the other "dog" collects them, and no file is overwritten by another clip.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from selva.features import load_settings
from selva.inputs.file_names import same_name
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.utils.errors import UserError
from selva.utils.files import source_hash

log = logging.getLogger(__name__)

_SOUNDS = (*AUDIO_SUFFIXES, *map(str.upper, AUDIO_SUFFIXES))

ClipKey = tuple[str, float]  # name of the video file, start in seconds


def clean_name(name: str) -> str:
    """Return ``name`` with ``/``, ``\\`` and NUL replaced by ``_``, as ComfyUI-SelVA does.

    Raises:
        ValueError: it is empty.
    """
    if not name:
        raise UserError("the name of the clips is empty")
    return name.translate(str.maketrans("/\\\0", "___"))


def numbered_names(
    name: str, clips: Sequence[ClipKey], folder: Path | None = None, videos: Sequence[Path] | None = None,
    keep_sounds: bool = False,
) -> list[str]:
    """Return one name per clip: the one that it has in ``folder`` already, else the first free number.

    The result depends on the clips, their order, and what else lies in the folder; not on how many of these clips were
    written there before, so processes that share the work agree whenever they start (except about two clips of one
    video and start, which may swap).

    Args:
        folder: of the feature files; None, or one that does not exist, counts from 001.
        videos: the video of every clip, of which those are read whose name is in the folder already; None believes the
            names.
        keep_sounds: the numbers of sounds without features are taken too, for who does not know whose they are. Where
            several processes write, these may just be waiting for their features.

    Raises:
        ValueError: the name is empty.
    """
    clean = clean_name(name)
    owned, taken = _in_folder(folder, clean) if folder is not None else ({}, set())
    if folder is not None and keep_sounds:
        taken |= {number for number, _ in _numbered_files(folder, clean, _SOUNDS)}
    hashes: dict[Path, str] = {}
    numbers = [
        _own_number(owned.get(clip), None if videos is None else videos[index], hashes)
        for index, clip in enumerate(clips)
    ]
    names, free = [], 1
    for number in numbers:
        if number is None:
            while free in taken:
                free += 1
            taken.add(free)
            number = free
        names.append(f"{clean}_{number:03d}")
    return names


def _own_number(owned: deque[tuple[int, str]] | None, video: Path | None, hashes: dict[Path, str]) -> int | None:
    """Return, and take away, the first number that a video of this content has; None if it has none."""
    if not owned:
        return None
    if video is None:
        return owned.popleft()[0]
    if video not in hashes:
        try:
            hashes[video] = source_hash(video)
        except OSError as error:  # it will fail by name; until then it keeps its number
            log.debug("%s", error)
            hashes[video] = ""
    found = next((entry for entry in owned if "" in (entry[1], hashes[video]) or entry[1] == hashes[video]), None)
    if found is None:
        return None
    owned.remove(found)
    return found[0]


def _in_folder(folder: Path, clean: str) -> tuple[dict[ClipKey, deque[tuple[int, str]]], set[int]]:
    """Return (number, hash of the video or "") of every clip, in order, and all numbers that are taken."""
    found = _numbered_files(folder, clean, (".npz",))
    owned: dict[ClipKey, deque[tuple[int, str]]] = {}
    for number, path in found:
        try:
            settings = load_settings(path) or {}
        except (ValueError, OSError) as error:
            log.warning("%s; its number is not used again", error)
            continue
        if isinstance(settings.get("source"), str) and isinstance(settings.get("start_sec"), int | float):
            key = settings["source"], float(settings["start_sec"])
            owned.setdefault(key, deque()).append((number, str(settings.get("source_sha256", ""))))
    return owned, {number for number, _ in found}


def _numbered_files(folder: Path, clean: str, suffixes: Sequence[str]) -> list[tuple[int, Path]]:
    """Return (number, file) of all files ``clean_NNN`` that end so, in order."""
    pattern = re.compile(re.escape(same_name(clean)) + r"_(\d{3,})")
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in files
                  if path.suffix in suffixes and (match := pattern.fullmatch(same_name(path.stem))))
