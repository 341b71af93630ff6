"""Prompts from text files: ``prompts.txt`` for a folder, a ``.txt`` beside a single video."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from selva.inputs.file_names import same_name
from selva.inputs.spoken_list import is_spoken_list, read_spoken_list
from selva.utils.files import real_path
from selva.utils.text import listed, read_text, text_lines

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
PromptSource = Literal["prompts.txt", "features", "folder"]

PROMPTS_FILE = "prompts.txt"


def read_prompts(path: PathLike, names: Iterable[str] = ()) -> dict[str, str]:
    """Return the prompt of every name in a ``prompts.txt``, the last one of several; see :func:`read_all_prompts`."""
    return {name: prompts[-1] for name, prompts in read_all_prompts(path, names).items()}


def read_all_prompts(path: PathLike, names: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return all prompts of a ``prompts.txt``: {name of the feature file, with .npz, as `same_name` has it: prompts}.

    A ``.csv`` may be a list as LJSpeech has it (``name|prompt``, see :mod:`selva.inputs.spoken_list`). Else there is
    one ``name.npz: prompt`` per line, split at the first colon; the ``.npz`` may be left out. Lines end with LF, CR LF
    or CR and with nothing else. Empty lines and comments are left out: a comment is ``#`` followed by a space, or by
    what is not one of ``names``. Lines without a colon and names without a prompt are left out with a warning. Several
    lines of a name are several prompts, in their order: the last one is the prompt of the clip, as the published reader
    has it, and training draws one of them at each use. Names are only ever compared with those of files in the folder,
    never opened.

    Args:
        names: of files, with or without .npz, for which a line that begins with ``#`` may be meant.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is neither UTF-8 nor UTF-16 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() == ".csv" and is_spoken_list(path):
        spoken = {same_name(name.removesuffix(".npz")): text for name, text in read_spoken_list(path).values() if text}
        return {f"{name}.npz": (text,) for name, text in spoken.items()}
    marked = {same_name(name.removesuffix(".npz")) for name in names if name.startswith("#")}
    full_names: dict[str, list[str]] = {}
    stems: dict[str, list[str]] = {}
    no_colon = []
    for number, line in enumerate(text_lines(read_text(path)), 1):
        line = line.strip()
        if not line:
            continue
        key, colon, prompt = (part.strip() for part in line.partition(":"))
        key = same_name(key)
        if line.startswith("#"):
            if not colon or key.removesuffix(".npz") not in marked:
                continue
            if line[1:2].isspace():
                log.warning("%s, line %d: taken for a comment, because it begins with # and a space, although a file "
                            "is called %r; rename the file", path, number, key)
                continue
        if not colon:
            no_colon.append(str(number))
            continue
        if not prompt:
            log.warning("%s: no prompt after %r", path, key)
            continue
        kind, name = (full_names, key) if key.endswith(".npz") else (stems, f"{key}.npz")
        kind.setdefault(name, []).append(prompt)
    if twice := sorted(name for name, prompts in full_names.items() if set(stems.get(name, prompts)) != set(prompts)):
        log.warning("%s: several prompts, of which those of the name with .npz count: %s", path, listed(twice))
    if no_colon:
        log.warning("%s: not read, as there is no colon in it, expected `name.npz: prompt`: line %s",
                    path, listed(no_colon))
    found = {**stems, **full_names}  # the published reader knows full names only, so they win
    return {name: _each_once(prompts) for name, prompts in found.items()}


def warn_of_other_spelling(folder: Path) -> None:
    """Say where a list of prompts is called like ``Prompts.txt``: only some systems take that for prompts.txt."""
    if not folder.is_dir() or (folder / PROMPTS_FILE).exists():
        return
    if others := sorted(name for name in os.listdir(folder) if name.casefold() == PROMPTS_FILE):
        log.warning("%s: not read, as it is not called %s; rename it", folder / others[0], PROMPTS_FILE)


def read_sidecar(path: PathLike) -> tuple[str, ...]:
    """Return the prompts in a text file, one per line, the last of which is that of the clip; none if it is empty.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16 text.
    """
    lines = (" ".join(line.split()) for line in text_lines(read_text(Path(path))))
    return _each_once([line for line in lines if line])


def _each_once(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the different prompts, each at the place of its last line."""
    return tuple(dict.fromkeys(reversed(prompts)))[::-1]


def choose_prompt(written: str | None, extracted: str, data_dir: Path) -> tuple[str, PromptSource]:
    """Return the prompt of a clip and where it is from: prompts.txt, the features, or the name of the folder."""
    if written is not None:
        return written, "prompts.txt"
    if extracted:
        return extracted, "features"
    return real_path(data_dir).name, "folder"
