"""Lists of spoken sentences as LJSpeech has them: ``metadata.csv`` with ``id|text|text with numbers spelled out``.

No first line with names, no quotation marks: a line is an id and one or two texts, with a bar between them.
"""

from __future__ import annotations

from pathlib import Path

from selva.utils.errors import UserError
from selva.utils.text import counted, listed, read_text, text_lines

BAR = "|"


def is_spoken_list(path: Path) -> bool:
    """Return True for such a list: the first line that is not empty has one or two bars, and an id before the first.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16 text.
    """
    first = next((line for line in text_lines(read_text(path)) if line.strip()), "")
    id_ = first.partition(BAR)[0]
    return 1 <= first.count(BAR) <= 2 and bool(id_.strip()) and not any(sign in id_ for sign in "\t;,:#")


def read_spoken_list(path: Path) -> dict[int, tuple[str, str]]:
    """Return {line: (id, text)}; the text is the last that is not empty, which has numbers spelled out.

    Raises:
        ValueError: a line that is no such line, or an id that comes twice; names the lines.
    """
    found: dict[int, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text_lines(read_text(path)), 1):
        if not line.strip():
            continue
        id_, *texts = (part.strip() for part in line.split(BAR))
        if not id_ or not 1 <= len(texts) <= 2:
            problems.append(f"line {number} has {counted(len(texts) + 1, 'part')}")
        elif lines.setdefault(id_, number) != number:
            problems.append(f"line {number}: {id_!r} was given in line {lines[id_]} already")
        else:
            found[number] = id_, " ".join(next((text for text in reversed(texts) if text), "").split())
    if problems:
        raise UserError(f"{path}: {listed(problems, separator='; ')}; expected `id|text` or `id|text|normalised text`")
    return found
