"""The table of clips that users write: tab separated (.tsv), or with commas or semicolons (.csv), one clip per row.

    id        label       path           start  duration  mask        prompt
    dog_3     dog bark    raw/dog.mp4    12.5   8         dog_3.png   a dog barking

Only ``id`` is required; the case of the names does not matter. ``caption`` is another name of ``label``. ``path`` and
``mask`` are relative to the table; without ``path`` the video is ``<id>`` with a video suffix, beside the table or in a
given folder; both ``/`` and ``\\`` may stand between folders. An empty cell counts as no cell. MMAudio's tables
(``id``, ``label``) are such tables.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from selva.inputs.delimited import Cells, Numbers, find_delimiter, read_text_table
from selva.inputs.file_names import FolderNames, from_windows, problem_here, same_name
from selva.inputs.media_files import by_name, visible_files
from selva.sequence import SHORTEST_SEC
from selva.utils.errors import UserError
from selva.utils.text import listed

log = logging.getLogger(__name__)

TABLE_SUFFIXES = (".tsv", ".csv")
COLUMNS = ("id", "label", "caption", "path", "start", "duration", "mask", "prompt")

_MAX_ID_BYTES = 200  # file names end at 255, and the id is followed by "_000" and a suffix


@dataclass(frozen=True)
class TableRow:
    """One row, before defaults are filled in; None and "" mean: not given."""

    id: str
    path: Path
    start_sec: float | None = None
    duration_sec: float | None = None
    prompt: str = ""
    label: str = ""
    mask: Path | None = None


def unsafe_id(id_: str) -> str | None:
    """Return the reason why ``id_`` cannot be the stem of a file inside a folder; None if it can."""
    if not id_:
        return "the id is empty"
    if any(letter in id_ for letter in "/\\"):
        return "an id is a file name, not a path; / and \\ are not allowed in it"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in id_):
        return "an id is a file name; control characters are not allowed in it"
    if id_.startswith("."):
        return "a file name that begins with a dot is hidden"
    try:
        num_bytes = len(id_.encode("utf-8"))
    except UnicodeEncodeError:
        return "the file name is not UTF-8"
    if num_bytes > _MAX_ID_BYTES:
        return f"an id has at most {_MAX_ID_BYTES} bytes"
    return problem_here(id_)


def read_clip_table(path: Path, video_suffixes: Iterable[str], video_dir: Path | None = None) -> list[TableRow]:
    """Return the rows of a table, in its order.

    Args:
        video_suffixes: of the videos to look for where no path is given, in order of preference.
        video_dir: where they lie; None for beside the table. A ``path`` in the table is relative to it, too.

    Raises:
        FileNotFoundError: no such table or folder.
        ValueError: not such a table; all problems are listed with their lines.
    """
    folder = path.parent if video_dir is None else video_dir
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    reader = _RowReader(path, folder, tuple(video_suffixes))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    by_suffix = "\t" if path.suffix.lower() == ".tsv" else ","
    table = read_text_table(path, find_delimiter(path, by_suffix), ["id"])
    reader.check_columns(table.columns)
    reader.numbers = table.numbers("start", "duration")
    rows = [reader.read(line, cells) for line, cells in table.rows]
    if reader.problems:
        raise UserError(f"{path}: {listed(reader.problems, separator='; ')}")
    if not rows:
        raise UserError(f"{path}: has no rows")
    return [row for row in rows if row is not None]


class _RowReader:
    """Reads rows and remembers everything that is wrong with them."""

    def __init__(self, path: Path, folder: Path, video_suffixes: tuple[str, ...]) -> None:
        self.path, self.folder, self.video_suffixes = path, folder, video_suffixes
        self.names = FolderNames()
        self.numbers = Numbers((), "\t")
        self.problems: list[str] = []
        self.lines: dict[str, int] = {}  # id -> line
        self.videos: dict[str, list[Path]] | None = None  # `same_name` of the stem -> videos, listed when first needed

    def check_columns(self, columns: list[str]) -> None:
        twice = sorted({column for column in columns if columns.count(column) > 1 and column in COLUMNS})
        if twice:
            raise UserError(f"{self.path}: column {', '.join(twice)} is there more than once")
        unknown = [str(column) for column in columns if column not in COLUMNS and column]
        if unknown:
            log.warning("%s: columns not used: %s (known are %s)", self.path, ", ".join(unknown), ", ".join(COLUMNS))

    def read(self, line: int, cells: Cells) -> TableRow | None:
        before = len(self.problems)
        self.line = line
        if None in cells:
            self._problem("more cells than columns")
        text = {key: (value or "").strip() for key, value in cells.items() if key is not None}
        id_ = text["id"]
        if reason := unsafe_id(id_):
            self._problem(f"id {id_!r}: {reason}")
        elif self.lines.setdefault(id_, line) != line:
            self._problem(f"id {id_!r} was given in line {self.lines[id_]} already")
        start = self._seconds(text, "start", 0.0)
        duration = self._seconds(text, "duration", SHORTEST_SEC)
        mask = self._file(text, "mask", self.path.parent)
        video = self._file(text, "path", self.folder)
        if len(self.problems) > before:
            return None
        label = text.get("label") or text.get("caption", "")
        return TableRow(id_, video or self._find(id_), start, duration, text.get("prompt", ""), label, mask)

    def _problem(self, text: str) -> None:
        self.problems.append(f"line {self.line}: {text}")

    def _seconds(self, text: dict[str, str], column: str, least: float) -> float | None:
        if not text.get(column):
            return None
        try:
            return self.numbers.read(text[column], f"seconds, {least:g} or more", least)
        except ValueError as error:
            self._problem(f"{column} is {text[column]!r}, expected {error}")
            return None

    def _file(self, text: dict[str, str], column: str, folder: Path) -> Path | None:
        if not text.get(column):
            return None
        if "\0" in text[column]:
            self._problem(f"{column} has a NUL character in it")
            return None
        path = folder / text[column]
        if "\\" in text[column] and self.names.find(path) is None:  # the table may come from Windows
            path = folder / from_windows(text[column])
        return self.names.find(path) or path

    def _find(self, id_: str) -> Path:
        """Return the video of an id; where there is none, the name that it would have."""
        if self.videos is None:
            self.videos = by_name(visible_files(self.folder), self.video_suffixes)
        found = self.videos.get(same_name(id_), [self.folder / f"{id_}{self.video_suffixes[0]}"])
        if len(found) > 1:
            log.warning("%s, line %d: id %r is the name of several videos; taken: %s, not %s; a column path can say "
                        "which", self.path, self.line, id_, found[0].name, ", ".join(path.name for path in found[1:]))
        return found[0]
