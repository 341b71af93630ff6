"""Words for messages: durations, numbers of things, and lists that end with "and N more"; and the text of a file."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from selva.utils.errors import UserError

MAX_LISTED = 20  # items named in one message


def clock(seconds: float) -> str:
    """Return a duration as people read it: "48 s", "3:20 min", "1:02:05 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def counted(number: int, noun: str, plural: str = "", *, grouped: bool = False) -> str:
    """Return "1 clip", "3 clips"; the plural is with an s unless given. ``grouped``: "49,232 parameters"."""
    return f"{f'{number:,}' if grouped else number} {noun if number == 1 else plural or noun + 's'}"


def read_text(path: Path) -> str:
    """Return the text of a file that people write: UTF-8, or UTF-16 or UTF-32 that begins with a byte order mark.

    Raises:
        ValueError: it is none of these; names the line, and what to do.
    """
    content = path.read_bytes()
    encodings = (  # UTF-32 first: its mark begins with that of UTF-16
        ("utf-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)), ("utf-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    )
    encoding = next((name for name, marks in encodings if content.startswith(marks)), "utf-8-sig")
    if encoding == "utf-8-sig" and 0 in content[:4]:
        raise UserError(f"{path}: is UTF-16 or UTF-32 text without a byte order mark, or no text; save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: is not UTF-8 text; save it as UTF-8 (Notepad: Save as, Encoding UTF-8; "
                        "Excel: CSV UTF-8)") from error


def text_lines(text: str) -> list[str]:
    """Return the lines of a text, which end with LF, CR LF or CR and with nothing else.

    ``str.splitlines`` also ends a line at U+2028, form feeds and others, which may stand in a prompt or a name.
    """
    return re.split(r"\r\n|\n|\r", text)


def number_in(text: str) -> float:
    """Return the number that people write as ``text``, NaN for what is none.

    Python itself takes digits of every script, and ``0_8``, a mistyped 0.8, for 8.
    """
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def told_apart(paths: Sequence[str]) -> list[str]:
    """Return the ends of paths, as short as they differ: the name, and folders above it where names are the same.

    ``runs/dog/a.pt``, ``runs/cat/a.pt`` and ``runs/cat/b.pt`` are ``dog/a.pt``, ``cat/a.pt`` and ``b.pt``.
    """
    parts = [PurePath(path).parts for path in paths]

    def end(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        return PurePath(*own[-length:]).as_posix()

    return [end(own) for own in parts]


def listed(items: Sequence[str], limit: int = MAX_LISTED, separator: str = ", ") -> str:
    """Return the items in one line, or the first ``limit`` of them and how many more there are."""
    more = f"{separator.removeprefix(',')}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
