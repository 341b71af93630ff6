"""Words for messages: durations, numbers of things, and lists that end with "and N more"; and the lines of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_LISTED = 20  # items named in one message


def clock(seconds: float) -> str:
    """Return a duration as people read it: "48 s", "3:20 min", "1:02:05 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 clip", "3 clips"; the plural is with an s unless given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def text_lines(text: str) -> list[str]:
    """Return the lines of a text, which end with LF, CR LF or CR and with nothing else.

    ``str.splitlines`` also ends a line at U+2028, form feeds and others, which may stand in a prompt or a name.
    """
    return re.split(r"\r\n|\n|\r", text)


def listed(items: Sequence[str], limit: int = MAX_LISTED, separator: str = ", ") -> str:
    """Return the items in one line, or the first ``limit`` of them and how many more there are."""
    more = f"{separator.removeprefix(',')}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
