"""Windows that cut long recordings into clips, and the two tables about them.

    clips.tsv      id          name        start_sample    end_sample     samples at the recording's own rate; name is
                   siren_0     siren       0               357210         its stem
    captions.tsv   id          caption                                    id is the name of a recording, or the id of a
                   siren       an ambulance passes                        clip, which counts first

The rule for windows, and the tables, are those of MMAudio's ``partition_clips.py``; captions of single clips are ours.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from selva.inputs.delimited import Cells, find_delimiter, read_text_table, refuse_long_rows
from selva.inputs.file_names import same_name
from selva.inputs.spoken_list import is_spoken_list, read_spoken_list
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.text import listed

log = logging.getLogger(__name__)

WINDOW_SEC = 8.1  # a little more than the 8 s that a model takes, for resampling
MAX_WINDOWS = 5  # of one recording, so that a long one does not outweigh the others
CAPTION_COLUMNS = ("id", "caption")

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
            raise UserError(
                f"clip {self.id!r} is {self.start_sample} ... {self.end_sample}, expected 0 <= start < end"
            )


COLUMNS = tuple(field.name for field in fields(Window))


def window_length(rate: int) -> int:
    """Return the samples of one window at ``rate`` samples per second."""
    return int(rate * WINDOW_SEC)


def window_starts(num_samples: int, rate: int, max_windows: int = MAX_WINDOWS) -> list[int]:
    """Return the first samples of the windows of a recording: spread over all of it, without overlap.

    A recording shorter than a window has none. Where there are several, the last one ends at the end of the recording,
    up to the rounding of the distance between two.
    """
    if num_samples < rate * WINDOW_SEC:
        return []
    length = window_length(rate)
    count = min(max_windows, num_samples // length)
    interval = (num_samples - length) // (count - 1) if count > 1 else 0
    return [index * interval for index in range(count)]


def partition(
    name: str, num_samples: int, rate: int, min_length_sec: float = WINDOW_SEC, max_windows: int = MAX_WINDOWS
) -> list[Window]:
    """Return the windows of the recording ``name``, called ``name_0``, ``name_1`` ...

    Args:
        min_length_sec: a shorter recording has none. One between this and ``WINDOW_SEC`` is a clip as it is.
    """
    if num_samples < rate * min_length_sec:
        return []
    if 0 < num_samples < rate * WINDOW_SEC:
        return [Window(f"{name}_0", name, 0, num_samples)]
    length = window_length(rate)
    starts = window_starts(num_samples, rate, max_windows)
    return [Window(f"{name}_{index}", name, start, start + length) for index, start in enumerate(starts)]


def write_clips(path: PathLike, windows: Iterable[Window]) -> None:
    """Write ``windows`` as tab-separated text with a header, whole or not at all."""
    write_table(path, COLUMNS, (astuple(window) for window in windows))


def read_clips(path: PathLike) -> list[Window]:
    """Return the windows in a ``clips.tsv``; further columns are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a table, or a row that is no window; names file and line.
    """
    return [_window(Path(path), line, row) for line, row in read_table(path, COLUMNS, "a clips.tsv")]


def write_captions(path: PathLike, captions: Mapping[str, str]) -> None:
    """Write ``{id: caption}`` as tab-separated text with a header, whole or not at all."""
    write_table(path, CAPTION_COLUMNS, captions.items())


def read_captions(path: PathLike) -> dict[str, str]:
    """Return the captions of a table with the columns id and caption, see :func:`caption_of`; the last of an id counts.

    A list as LJSpeech has it, see :mod:`selva.inputs.spoken_list`, is such a table. Ids are as :func:`same_name` has
    them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a table.
    """
    captions: dict[str, str] = {}
    changed = set()
    if Path(path).is_file() and is_spoken_list(Path(path)):
        given = list(read_spoken_list(Path(path)).values())
    else:
        rows = read_table(path, CAPTION_COLUMNS, "a table of captions: id, caption")
        given = [(row["id"] or "", (row["caption"] or "").strip()) for _, row in rows]
    for id_, caption in given:
        name = same_name(id_)
        if captions.setdefault(name, caption) != caption:
            changed.add(name)
        captions[name] = caption
    if changed:
        log.warning("%s: several captions, of which the last counts: %s", path, listed(sorted(changed)))
    return captions


def clip_captions(windows: Iterable[Window], captions: Mapping[str, str], names: Iterable[str] = ()) -> dict[str, str]:
    """Return {id: caption} of the clips that have one, from a table whose ids are of clips, of recordings, or mixed.

    An id may be both: ``rain_1`` is the second clip of ``rain``, and perhaps a recording. It is taken for what the
    other ids of the table are.

    Args:
        captions: as :func:`read_captions` gives them.
        names: of recordings, besides those that the clips are of.

    Raises:
        ValueError: the other ids do not tell what such an id is.
    """
    windows = list(windows)
    clips = {same_name(window.id) for window in windows if window.id != window.name}
    recordings = {same_name(name) for name in (*names, *(window.name for window in windows))}
    both = sorted(set(captions) & clips & recordings)
    of_clips = bool(set(captions) & (clips - recordings))
    of_recordings = bool(set(captions) & (recordings - clips))
    if both and of_clips == of_recordings:
        raise UserError(f"{listed(both)}: the name of a clip and of another recording, so that it is unclear which of "
                         "them the caption belongs to; give captions by the ids of clips only, or of recordings only")
    found = {}
    for window in windows:
        own, recording = same_name(window.id), same_name(window.name)
        keys = [key for key in (own, recording) if key not in both or key == (own if of_clips else recording)]
        if caption := next((captions[key] for key in keys if captions.get(key)), ""):
            found[window.id] = caption
    return found


def caption_of(window: Window, captions: Mapping[str, str]) -> str:
    """Return the caption of a clip, else that of its recording, else ""; see :func:`clip_captions` for many clips."""
    forms = (window.id, same_name(window.id), window.name, same_name(window.name))
    return next((captions[form] for form in forms if captions.get(form)), "")


def table_captions(
    windows: Iterable[Window], of_clips: Mapping[str, str], of_names: Mapping[str, str]
) -> dict[str, str]:
    """Return the captions to write for ``windows``: of each recording, or of each clip where any clip has its own.

    They are of clips too where a clip is called like another recording, which its caption would go to.

    Args:
        of_clips: {id: caption}. of_names: {name of the recording: caption}, for the clips without one.
    """
    windows = list(windows)
    each = captions_of(windows, of_clips, of_names)
    named = {window.name: of_names[window.name] for window in windows if of_names.get(window.name)}
    if not any(of_clips.get(window.id) or window.id in named for window in windows):
        return named
    return each


def captions_of(windows: Iterable[Window], of_clips: Mapping[str, str], of_names: Mapping[str, str]) -> dict[str, str]:
    """Return {id: caption} of the clips that have one, their own or that of their recording."""
    each = {window.id: of_clips.get(window.id) or of_names.get(window.name, "") for window in windows}
    return {clip: caption for clip, caption in each.items() if caption}


# -- tables ------------------------------------------------------------------------------------------------------------


def write_table(path: PathLike, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write tab-separated text with a header, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def read_table(path: PathLike, columns: Sequence[str], expected: str) -> list[tuple[int, Cells]]:
    """Return (line, {column: text}) for every row; ``expected`` says in an error what the table should have been.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one of ``columns`` is missing, it is no text, or a row has more cells than there are columns or
            quotation marks that leave unclear where it ends.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    table = read_text_table(path, find_delimiter(path), columns, expected)
    refuse_long_rows(path, table)
    return table.rows


def _window(path: Path, line: int, row: Cells) -> Window:
    try:
        return Window(row["id"] or "", row["name"] or "", int(row["start_sample"] or ""), int(row["end_sample"] or ""))
    except ValueError as error:
        raise UserError(f"{path}, line {line}: {error}") from error
