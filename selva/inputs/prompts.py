"""Prompts from text files: ``prompts.txt`` for a folder, a ``.txt`` beside a single video."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
PromptSource = Literal["prompts.txt", "features", "folder"]

PROMPTS_FILE = "prompts.txt"


def read_prompts(path: PathLike) -> dict[str, str]:
    """Return the prompts of a ``prompts.txt``: {name of the feature file, with .npz: prompt}.

    One ``name.npz: prompt`` per line, split at the first colon; the ``.npz`` may be left out. Empty lines, lines that
    start with ``#``, and lines without a colon are ignored, and so is a name without a prompt. The last line of a name
    counts. Names are only ever compared with those of files in the folder, never opened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    full_names: dict[str, str] = {}
    stems: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#") or ":" not in line:
            continue
        key, prompt = (part.strip() for part in line.split(":", 1))
        if not prompt:
            log.warning("%s: no prompt after %r", path, key)
        elif key.endswith(".npz"):
            full_names[key] = prompt
        else:
            stems[f"{key}.npz"] = prompt
    return {**stems, **full_names}  # the published reader knows full names only, so they win


def read_sidecar(path: PathLike) -> str:
    """Return the prompt in a text file: all of it as one line, "" if it is empty.

    Raises:
        ValueError: it is not UTF-8 text.
    """
    try:
        return " ".join(Path(path).read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def choose_prompt(written: str | None, extracted: str, data_dir: Path) -> tuple[str, PromptSource]:
    """Return the prompt of a clip and where it is from: prompts.txt, the features, or the name of the folder."""
    if written is not None:
        return written, "prompts.txt"
    if extracted:
        return extracted, "features"
    return data_dir.resolve().name, "folder"
