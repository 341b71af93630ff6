"""Segments of recordings that are given: a table of them, the output of whisper, or a list of whole recordings.

    segments.tsv (or .csv)   name       start    end      id         text           seconds; id and text are optional
                             talk_1     0.5      4.25     hello      a man says hello
    talk_1.json              {"segments": [{"start": 0.5, "end": 4.25, "text": " Hello."}, ...]}     of talk_1.flac
    metadata.csv             LJ001-0001|Printing, in 1 sense|Printing, in one sense           all of LJ001-0001.wav
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selva.inputs.delimited import find_delimiter, read_text_table
from selva.inputs.file_names import same_name
from selva.inputs.spoken_list import is_spoken_list, read_spoken_list
from selva.inputs.table import unsafe_id
from selva.media import audio_length
from selva.utils.errors import UserError
from selva.utils.text import counted, listed, read_text

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


def read_segments(paths: Sequence[Path], recordings: Mapping[str, Path]) -> dict[str, list[Segment]]:
    """Return {name: its segments in the order of the files}, each with an id that no other has.

    Args:
        paths: tables (.tsv, .csv), lists as LJSpeech has them and whisper's files (.json), in any mixture; of a folder
            all whisper files in it and in its subfolders are taken.
        recordings: {name: file}, see :func:`_owner_of` for which of them a whisper file is of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a segment that cannot be; lists all of them.
    """
    names = {same_name(name): name for name in recordings}  # as compared: as written
    problems: list[str] = []
    by_name: dict[str, list[Segment]] = {}
    for path in _files_of(paths):
        if path.suffix.lower() == ".json":
            found = _read_whisper(path, recordings, problems)
        elif is_spoken_list(path):
            found = _read_list(path, recordings)
        else:
            found = _read_rows(path, names, problems)
        for place, segment in found:
            if problem := _problem_of(segment, recordings):
                problems.append(f"{path}, {place}: {problem}")
            by_name.setdefault(segment.name, []).append(segment)
    for name, segments in by_name.items():
        by_name[name] = [s if s.id else replace(s, id=f"{name}_{index}") for index, s in enumerate(segments)]
    counts = Counter(segment.id for segments in by_name.values() for segment in segments)
    problems += [f"{counted(count, 'segment is', 'segments are')} called {id_!r}" for id_,
                 count in counts.items() if count > 1]
    if problems:
        raise UserError(listed(problems, separator="; "))
    if not by_name:
        raise UserError(f"{listed([str(path) for path in paths])}: no segments in it")
    return by_name


def _files_of(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files that are given, and in place of a folder the whisper files in it."""
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".json" and file.is_file()
                           and not any(part.startswith(".") for part in file.relative_to(path).parts))
            if not found:
                raise UserError(f"{path}: no .json files in this folder, expected what whisper writes")
            yield from found
        elif not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        else:
            yield path


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


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _words(value: Any) -> str:
    """Return a text on one line."""
    return " ".join(str(value or "").split())


def _read_rows(path: Path, names: Mapping[str, str], problems: list[str]) -> Iterable[tuple[str, Segment]]:
    """Yield (line, segment) of a table; names may be written with the suffix of the file."""
    table = read_text_table(path, find_delimiter(path), REQUIRED, "name, start and end in seconds")
    numbers = table.numbers("start", "end")
    for line, row in table.rows:
        if None in row:
            problems.append(f"{path}, line {line}: more cells than columns")
            continue
        cells = {key: (value or "").strip() for key, value in row.items() if key is not None}
        stem = Path(cells["name"]).stem if "\0" not in cells["name"] else ""
        name = names.get(same_name(cells["name"])) or names.get(same_name(stem)) or cells["name"]
        text = _words(cells.get("text") or cells.get("caption"))
        before, seconds = len(problems), dict.fromkeys(("start", "end"), 0.0)
        for column in seconds:
            try:
                seconds[column] = numbers.read(cells[column], "seconds")
            except ValueError as error:
                problems.append(f"{path}, line {line}: {column} is {cells[column]!r}, expected {error}")
        if len(problems) == before:
            yield f"line {line}", Segment(name, seconds["start"], seconds["end"], cells.get("id", ""), text)


def _read_whisper(path: Path, recordings: Mapping[str, Path], problems: list[str]) -> Iterable[tuple[str, Segment]]:
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
    name = _owner_of(path, recordings)
    if name is None:
        problems.append(f"{path}: there is no recording called {path.stem!r}; give the file the name of the recording "
                        "that it belongs to")
        return
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            problems.append(f"{path}, segment {index}: is no object with start and end")
            continue
        start, end = _number(item.get("start")), _number(item.get("end"))
        if start is None or end is None:
            problems.append(f"{path}, segment {index}: start is {item.get('start')!r} and end {item.get('end')!r}, "
                            "expected seconds")
            continue
        yield f"segment {index}", Segment(name, start, end, text=_words(item.get("text")))


def _owner_of(path: Path, recordings: Mapping[str, Path]) -> str | None:
    """Return the recording that a whisper file is of, None if it cannot be told.

    The one beside it of the same stem; any of that name; without further endings, as in ``talk_1.en.json`` or
    ``talk_1.wav.json``; the only one in its folder, as in ``talks/monday/whisper.json``; the only one at all.
    """
    beside = {same_name(file.stem): name for name, file in recordings.items() if file.parent == path.parent}
    names = {same_name(name): name for name in recordings}
    stem = path.stem
    while stem:
        for known in (beside, names):
            if found := known.get(same_name(stem)):
                return found
        stem = stem.rpartition(".")[0]
    only = list(beside.values()) or list(names.values())
    if len(only) != 1:
        return None
    log.info("%s: taken as that of %s, the only recording%s", path, only[0], " in its folder" if beside else "")
    return only[0]


def _read_list(path: Path, recordings: Mapping[str, Path]) -> Iterator[tuple[str, Segment]]:
    """Yield (line, segment) of a list as LJSpeech has it: every recording as a whole, by its own name."""
    names, missing = {same_name(name): name for name in recordings}, []
    for line, (id_, text) in read_spoken_list(path).items():
        name = names.get(same_name(id_))
        if name is None:
            missing.append(id_)
            continue
        try:
            num_samples, rate = audio_length(recordings[name])
        except (ValueError, OSError):
            continue  # cutting it says why
        yield f"line {line}", Segment(name, 0.0, num_samples / rate, name, text)
    if missing:
        log.warning("%s: %s of no recording: %s", path, counted(len(missing), "line is", "lines are"), listed(missing))
