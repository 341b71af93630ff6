"""Tables as text, tab separated or with commas or semicolons: the one reader of all tables that people write.

A cell that begins with a quotation mark ends with the next one; where none follows, or follows by chance some rows
later, everything in between would become part of that cell. So what the marks leave unclear is an error with its line.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selva.utils.errors import UserError
from selva.utils.text import listed, number_in, read_text, text_lines

log = logging.getLogger(__name__)

DELIMITERS = ("\t", ";", ",")  # in this order: a comma may stand in a name, a tab does not
MARKS = 'a cell that begins with a quotation mark has to end with one, and "" stands for a mark inside'

Cells = dict[str | None, str | None]


@dataclass(frozen=True)
class TextTable:
    """The content of a table.

    Attributes:
        columns: names in the first line, lower case and without spaces around them.
        rows: (line, {column: text}) of every row that is not empty. A column is None where a row ends before it; the
            key None stands for cells beyond the last column.
        delimiter: between the cells.
    """

    columns: list[str]
    rows: list[tuple[int, Cells]]
    delimiter: str

    def numbers(self, *columns: str) -> Numbers:
        """Return the reader of the numbers in these columns."""
        return Numbers(((cells.get(column) or "") for _, cells in self.rows for column in columns), self.delimiter)


class Numbers:
    """Reader of the numbers of a table, which may have a decimal comma where commas do not separate the cells.

    ``12,345`` is 12.345 beside ``1,5``, and 12345 for whoever groups digits. Where the other numbers do not tell which
    it is, it is an error; so is ``12.345`` beside ``1,5``.

    Args:
        cells: all of them that hold numbers. delimiter: of the table.
    """

    def __init__(self, cells: Iterable[str], delimiter: str) -> None:
        found = [cell.strip() for cell in cells]
        self.delimiter = delimiter
        self.decimal_commas = delimiter != "," and any(
            _WITH_COMMA.fullmatch(cell) and not _GROUPED.fullmatch(cell) for cell in found)

    def read(self, text: str, expected: str = "a number", least: float = -math.inf) -> float:
        """Return a finite number.

        Args:
            expected: says in an error what the number should have been.

        Raises:
            UserError: it is none, below ``least``, or may be two; the message goes behind "expected".
        """
        text = text.strip()
        if _WITH_COMMA.fullmatch(text):
            point = text.replace(",", ".")
            if self.delimiter == ",":
                raise UserError(f"{expected}, with a point, as commas separate the columns here: {point}")
            if _GROUPED.fullmatch(text) and not self.decimal_commas:
                raise UserError(f"{point} or {text.replace(',', '')}; write the one that is meant")
            text = point
        elif self.decimal_commas and _GROUPED.fullmatch(text):
            raise UserError(f"{text.replace('.', ',')} or {text.replace('.', '')}, as other numbers here have a "
                             "comma; write the one that is meant")
        value = number_in(text)
        if not (math.isfinite(value) and value >= least):
            raise UserError(expected)
        return value


_WITH_COMMA = re.compile(r"[+-]?\d+,\d+")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}")  # may be thousands


def find_delimiter(path: Path, otherwise: str = "\t") -> str:
    """Return the delimiter in the first line of a table: a tab, a semicolon (as Excel writes it) or a comma.

    Args:
        otherwise: for a table of one column, which has none.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16 text.
    """
    header = text_lines(read_text(path))[0]
    return next((sign for sign in DELIMITERS if sign in header), otherwise)


def read_text_table(path: Path, delimiter: str, required: Sequence[str], expected: str = "") -> TextTable:
    """Return the rows of a table.

    Args:
        required: columns that have to be there.
        expected: says in an error what the table should have been.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither UTF-8 nor UTF-16 text, a column that is missing or, of those required, given twice, or
            quotation marks that leave unclear where a row ends; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = _rows_of(path, csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True))
    columns = _names_in(next(lines, None))
    if columns and columns[0] == "sep=" and not any(columns[1:]):  # the first line tells Excel the delimiter
        columns = _names_in(next(lines, None))
    _check_columns(path, columns, required, expected)
    return TextTable(columns, list(_checked_rows(path, lines, columns, delimiter)), delimiter)


def refuse_long_rows(path: Path, table: TextTable) -> None:
    """Raise if a row has more cells than there are columns, as a comma inside a caption makes it.

    Raises:
        ValueError: names the lines.
    """
    if lines := [str(line) for line, cells in table.rows if None in cells]:
        raise UserError(f"{path}, line {listed(lines)}: more cells than columns; put a text with a delimiter in it "
                         "between quotation marks")


def _names_in(row: tuple[int, int, list[str]] | None) -> list[str]:
    return [] if row is None else [name.strip().lower() for name in row[2]]


def _check_columns(path: Path, columns: Sequence[str], required: Collection[str], expected: str) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        found = ", ".join(columns) or "nothing"
        what = f"expected {expected}" if expected else "the first line names the columns"
        if len(columns) == 1 and len(columns[0].split()) > 1:  # copied from a page, or aligned by hand
            what += "; columns are separated by tabs, semicolons or commas, not by spaces"
        raise UserError(f"{path}: column {', '.join(missing)} missing (found: {found}); {what}")
    if twice := sorted({name for name in columns if name in required and columns.count(name) > 1}):
        raise UserError(f"{path}: column {', '.join(twice)} is there more than once")


def _rows_of(path: Path, table: Any) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (first line, last line, cells) of every row."""
    last = 0
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise UserError(f"{path}: after line {last} no row can be read ({error}); {MARKS}") from error
        if cells is None:
            return
        first, last = last + 1, table.line_num
        yield first, last, cells


def _checked_rows(
    path: Path, rows: Iterator[tuple[int, int, list[str]]], columns: list[str], delimiter: str
) -> Iterator[tuple[int, Cells]]:
    several = []
    for first, last, cells in rows:
        if not any(cell.strip() for cell in cells):  # spreadsheets write rows of delimiters alone
            continue
        if last > first:
            _check_one_row(path, cells, (first, last), len(columns), delimiter)
            several.append(f"{first} to {last}")
        row: Cells = dict.fromkeys(columns)
        row.update(zip(columns, cells, strict=False))
        if len(cells) > len(columns):
            row[None] = delimiter.join(cells[len(columns):])
        yield last, row
    if several:
        log.warning("%s: a cell between quotation marks goes over several lines: %s", path, listed(several))


def _check_one_row(path: Path, cells: list[str], lines: tuple[int, int], num_columns: int, delimiter: str) -> None:
    """Raise if a cell that goes over several lines holds lines that could be rows themselves."""
    for index, cell in enumerate(cells):
        inside = cell.replace("\r\n", "\n").replace("\r", "\n").split("\n")[1:]
        if not inside:
            continue
        marks = [line.count(delimiter) for line in inside]
        marks[-1] += len(cells) - 1 - index  # the row goes on behind the cell
        if max(marks) >= num_columns - 1:
            raise UserError(f"{path}: lines {lines[0]} to {lines[1]} would be one row, as a cell in it begins with a "
                             f"quotation mark and ends lines later; {MARKS}")
