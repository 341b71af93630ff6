"""Segments of recordings that are given: a table of them, or the output of whisper.

    segments.tsv (or .csv)   name       start    end      id         text           seconds; id and text are optional
                             talk_1     0.5      4.25     hello      a man says hello
    talk_1.json              {"segments": [{"start": 0.5, "end": 4.25, "text": " Hello."}, ...]}     of talk_1.flac
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selva.inputs.delimited import find_delimiter, read_text_table
from selva.inputs.file_names import same_name
from selva.inputs.table import unsafe_id
from selva.utils.errors import UserError
from selva.utils.text import listed, read_text

log = logging.getLogger(__name__)

REQUIRED = ("name", "start", "end")


@dataclass(frozen=True)
class Segment:
    """One stretch of a recording.

    Attributes:
        name: stem of the recording.
        start_sec, end_sec: seconds from its beginning.
        id: name of the clip; "" for <name>_0, <name>_1 ... in the order of the file.
        text: the caption; "" if unknown.
    """

    name: str
    start_sec: float
    end_sec: float
    id: str = ""
    text: str = ""


def read_segments(paths: Sequence[Path], names: Iterable[str]) -> dict[str, list[Segment]]:
    """Return {name: its segments in the order of the files}, each with an id that no other has.

    Args:
        paths: tables (.tsv, .csv) and whisper's files (.json), in any mixture.
        names: stems of the recordings. A whisper file belongs to the recording of the same stem, or to the only one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a segment that cannot be; lists all of them.
    """
    names = {same_name(name): name for name in names}  # as compared: as written
    problems: list[str] = []
    by_name: dict[str, list[Segment]] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        read = _read_whisper if path.suffix.lower() == ".json" else _read_rows
        for place, segment in read(path, names, problems):
            if problem := _problem_of(segment, names.values()):
                problems.append(f"{path}, {place}: {problem}")
            by_name.setdefault(segment.name, []).append(segment)
    for name, segments in by_name.items():
        by_name[name] = [s if s.id else replace(s, id=f"{name}_{index}") for index, s in enumerate(segments)]
    counts = Counter(segment.id for segments in by_name.values() for segment in segments)
    problems += [f"{count} segments are called {id_!r}" for id_, count in counts.items() if count > 1]
    if problems:
        raise UserError(listed(problems, separator="; "))
    if not by_name:
        raise UserError(f"{listed([str(path) for path in paths])}: no segments in it")
    return by_name


def merge_segments(segments: Sequence[Segment], gap_sec: float) -> list[Segment]:
    """Return the segments of one recording by time, with those in one that have less than ``gap_sec`` between them.

    Overlapping ones have less than nothing between them. A joined segment has the id of the first, and all texts.
    """
    merged: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: (segment.start_sec, segment.end_sec)):
        if merged and segment.start_sec - merged[-1].end_sec < gap_sec:
            last = merged[-1]
            text = " ".join(filter(None, (last.text, segment.text)))
            merged[-1] = replace(last, end_sec=max(last.end_sec, segment.end_sec), text=text)
        else:
            merged.append(segment)
    return merged


def move_borders(segments: Sequence[Segment], start_sec: float, end_sec: float) -> list[Segment]:
    """Return segments with moved borders, possibly before the recording or with an end before their start.

    Those that reach into a neighbour only because of it are named: they hold sound of the other's words.
    """
    moved = [replace(s, start_sec=s.start_sec + start_sec, end_sec=s.end_sec + end_sec) for s in segments]
    order = sorted(range(len(segments)), key=lambda i: segments[i].start_sec)
    into = [segments[i].id for i, following in itertools.pairwise(order)
            if segments[i].end_sec <= segments[following].start_sec and moved[i].end_sec > moved[following].start_sec]
    if into:
        log.warning("%s: with moved borders, these reach into the next segment: %s", segments[0].name, listed(into))
    return moved


def _problem_of(segment: Segment, names: Collection[str]) -> str | None:
    if segment.name not in names:
        return f"there is no recording called {segment.name!r}"
    if not 0 <= segment.start_sec <= segment.end_sec < math.inf:  # False for NaN too
        return f"{segment.start_sec:g} ... {segment.end_sec:g} s, expected 0 <= start <= end"
    return f"id {segment.id!r}: {reason}" if segment.id and (reason := unsafe_id(segment.id)) else None


def _seconds(value: Any) -> float:
    """Return a number of seconds, NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _words(value: Any) -> str:
    """Return a text on one line."""
    return " ".join(str(value or "").split())


def _read_rows(path: Path, names: Mapping[str, str], problems: list[str]) -> Iterable[tuple[str, Segment]]:
    """Yield (line, segment) of a table; names may be written with the suffix of the file."""
    table = read_text_table(path, find_delimiter(path), REQUIRED, "name, start and end in seconds")
    for line, row in table.rows:
        if None in row:
            problems.append(f"{path}, line {line}: more cells than columns")
            continue
        cells = {key: (value or "").strip() for key, value in row.items() if key is not None}
        stem = Path(cells["name"]).stem if "\0" not in cells["name"] else ""
        name = names.get(same_name(cells["name"])) or names.get(same_name(stem)) or cells["name"]
        text = _words(cells.get("text") or cells.get("caption"))
        yield f"line {line}", Segment(name, _seconds(cells["start"]), _seconds(cells["end"]), cells.get("id", ""), text)


def _read_whisper(path: Path, names: Mapping[str, str], problems: list[str]) -> Iterable[tuple[str, Segment]]:
    """Yield (place, segment) of a JSON file as whisper writes it."""
    try:
        content = json.loads(read_text(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error}); expected what whisper writes") from error
    except RecursionError:
        raise UserError(f"{path}: is not JSON that whisper writes, it is nested too deeply") from None
    found = content.get("segments") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(f'{path}: has no list "segments", expected what whisper writes')
    name = names.get(same_name(path.stem), path.stem)
    if name not in names.values():
        if len(names) != 1:
            problems.append(f"{path}: there is no recording called {name!r}; "
                            "give the file the name of the recording that it belongs to")
            return
        (name,) = names.values()
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            problems.append(f"{path}, segment {index}: is no object with start and end")
            continue
        yield f"segment {index}", Segment(name, _seconds(item.get("start")), _seconds(item.get("end")),
                                          text=_words(item.get("text")))
