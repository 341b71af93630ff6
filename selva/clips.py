"""Windows that cut long recordings into clips, and the ``clips.tsv`` that lists them.

    id          name        start_sample    end_sample        samples at the recording's own rate; name is its stem
    siren_0     siren       0               357210

The rule and the file are those of MMAudio's ``partition_clips.py``.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from selva.files import atomic_write_text

WINDOW_SEC = 8.1  # a little more than the 8 s that a model takes, for resampling
MAX_WINDOWS = 5  # of one recording, so that a long one does not outweigh the others

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Window:
    """One clip of a recording: samples ``start_sample`` to ``end_sample`` (exclusive) of the file ``name``."""

    id: str
    name: str
    start_sample: int
    end_sample: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_sample < self.end_sample:
            raise ValueError(
                f"clip {self.id!r} is {self.start_sample} ... {self.end_sample}, expected 0 <= start < end"
            )


COLUMNS = tuple(field.name for field in fields(Window))


def window_length(rate: int) -> int:
    """Return the samples of one window at ``rate`` samples per second."""
    return int(rate * WINDOW_SEC)


def window_starts(num_samples: int, rate: int) -> list[int]:
    """Return where the windows of a recording start: up to five, spread over all of it, without overlap.

    A recording shorter than a window has none. Where there are several, the last one ends at the end of the recording,
    up to the rounding of the distance between two.
    """
    if num_samples < rate * WINDOW_SEC:
        return []
    length = window_length(rate)
    count = min(MAX_WINDOWS, num_samples // length)
    interval = (num_samples - length) // (count - 1) if count > 1 else 0
    return [index * interval for index in range(count)]


def partition(name: str, num_samples: int, rate: int) -> list[Window]:
    """Return the windows of the recording ``name``, called ``name_0``, ``name_1`` ..."""
    length = window_length(rate)
    starts = window_starts(num_samples, rate)
    return [Window(f"{name}_{index}", name, start, start + length) for index, start in enumerate(starts)]


def write_clips(path: PathLike, windows: Iterable[Window]) -> None:
    """Write ``windows`` as tab-separated text with a header, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(window) for window in windows)
    atomic_write_text(path, text.getvalue())


def read_clips(path: PathLike) -> list[Window]:
    """Return the windows in a ``clips.tsv``; further columns are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a table, or a row that is no window; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    windows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            missing = [column for column in COLUMNS if column not in (rows.fieldnames or [])]
            if missing:
                found = ", ".join(rows.fieldnames or ["nothing"])
                raise ValueError(f"{path}: column {', '.join(missing)} missing (found: {found}); expected a clips.tsv")
            for row in rows:
                windows.append(_window(path, rows.line_num, row))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as tab-separated UTF-8 text ({error})") from error
    return windows


def _window(path: Path, line: int, row: dict[str, str | None]) -> Window:
    try:
        return Window(row["id"] or "", row["name"] or "", int(row["start_sample"] or ""), int(row["end_sample"] or ""))
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
