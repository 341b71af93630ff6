"""Numbered names: ``dog_001``, ``dog_002`` ... as ComfyUI-SelVA counts, but a clip keeps its number when run again.

A clip is the same one if the name of its video and its start are the same, as the feature files in the folder say.
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

log = logging.getLogger(__name__)

ClipKey = tuple[str, float]  # name of the video file, start in seconds


def clean_name(name: str) -> str:
    """Return ``name`` with ``/``, ``\\`` and NUL replaced by ``_``, as ComfyUI-SelVA does.

    Raises:
        ValueError: it is empty.
    """
    if not name:
        raise ValueError("the name of the clips is empty")
    return name.translate(str.maketrans("/\\\0", "___"))


def numbered_names(name: str, clips: Sequence[ClipKey], folder: Path | None = None) -> list[str]:
    """Return one name per clip: the one that it has in ``folder`` already, else the first free number.

    The result depends on the clips, their order, and what else lies in the folder; not on how many of these clips were
    written there before, so processes that share the work agree whenever they start (except about two clips of one
    video and start, which may swap).

    Args:
        folder: of the feature files; None, or one that does not exist, counts from 001.

    Raises:
        ValueError: the name is empty.
    """
    clean = clean_name(name)
    owned, taken = _in_folder(folder, clean) if folder is not None else ({}, set())
    numbers = [owned[clip].popleft() if owned.get(clip) else None for clip in clips]
    names, free = [], 1
    for number in numbers:
        if number is None:
            while free in taken:
                free += 1
            taken.add(free)
            number = free
        names.append(f"{clean}_{number:03d}")
    return names


def _in_folder(folder: Path, clean: str) -> tuple[dict[ClipKey, deque[int]], set[int]]:
    """Return the numbers of every clip, in order, and all numbers that are taken."""
    pattern = re.compile(re.escape(clean) + r"_(\d{3,})\.npz")
    files = folder.iterdir() if folder.is_dir() else ()
    found = sorted((int(match[1]), path) for path in files if (match := pattern.fullmatch(path.name)))
    owned: dict[ClipKey, deque[int]] = {}
    for number, path in found:
        try:
            settings = load_settings(path) or {}
        except (ValueError, OSError) as error:
            log.warning("%s; its number is not used again", error)
            continue
        if isinstance(settings.get("source"), str) and isinstance(settings.get("start_sec"), int | float):
            owned.setdefault((settings["source"], float(settings["start_sec"])), deque()).append(number)
    return owned, {number for number, _ in found}
