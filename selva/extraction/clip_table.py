"""``clips.csv`` in an output folder: which clip is of which video, with which sound and which prompt.

Made for people, and for spreadsheets: with commas, in UTF-8 with a byte order mark. Clips that earlier runs have put
into the same folder keep their rows. A table that somebody has edited, or put there, stays as it is.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selva.extraction.manifest import DONE, Row
from selva.inputs.delimited import read_text_table
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text, source_hash

log = logging.getLogger(__name__)

TABLE_FILE = "clips.csv"
COLUMNS = ("clip", "video", "start", "duration", "sound", "sound_from", "prompt", "prompt_from")


@dataclass(frozen=True)
class ClipOrigin:
    """Facts about a clip that the manifest does not hold; "" for what there is not.

    Attributes:
        id: of the clip. sound_from: the recording or the video that its sound is of.
        prompt, prompt_from: the prompt, and where it was given.
    """

    id: str
    sound_from: str
    prompt: str
    prompt_from: str


def write_clip_table(path: Path, state: Path, rows: Sequence[Row], origins: Sequence[ClipOrigin]) -> bool:
    """Write the table of the clips that are there; return False where one lies there that was not written by this.

    Args:
        path: of the table. state: hidden folder that remembers what was written.
        rows: of the complete manifest, of which those that were done count. origins: in the same order.
    """
    mark = state / f"{TABLE_FILE}.sha256"
    kept: list[list[str]] = []
    if path.exists():
        if not mark.is_file() or mark.read_text(encoding="utf-8").strip() != source_hash(path):
            log.warning("%s: has been edited, or is not by extract_features.py, and stays as it is; move it away to "
                        "get a new one", path)
            return False
        kept = _rows_that_stay(path, {row["id"] for row in rows})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(sorted([*kept, *(_cells(row, origin) for row, origin in zip(rows, origins, strict=True)
                                      if row["status"] == DONE)]))
    state.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "\ufeff" + table.getvalue())
    atomic_write_text(mark, source_hash(path) + "\n")
    return True


def _rows_that_stay(path: Path, listed: set[str]) -> list[list[str]]:
    """Return the rows of clips that the list does not name and whose features are still there."""
    try:
        rows = read_text_table(path, ",", COLUMNS).rows
    except UserError as error:
        log.warning("%s", error)
        return []
    return [[cells[column] or "" for column in COLUMNS] for _, cells in rows
            if cells["clip"] not in listed and (path.parent / f"{cells['clip']}.npz").is_file()]


def _cells(row: Row, origin: ClipOrigin) -> list[str]:
    sounds = [name for name in row["files"] if Path(name).suffix not in ("", ".npz")]
    seconds = ["" if value is None else f"{value:g}" for value in (row["start_sec"], row["duration_sec"])]
    return [row["id"], row["source"], *seconds, "".join(sounds), origin.sound_from, origin.prompt, origin.prompt_from]
