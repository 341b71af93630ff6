"""Files of a memmap that is being written, see :mod:`selva.data.memmap.writer`.

    data/vgg-train/               what is published (:mod:`selva.data.memmap.reader`); replaced only by a complete set
    data/vgg-train.tsv            id and label (or caption) of every row
    data/vgg-train.rows.json      ours: the work list, and for every row a digest of what decided its content
    data/.vgg-train.confirmed/    journals of the parts that have found their rows of the published set current, until
                                  all parts have; a change that another part finds then needs no second word of them
    data/vgg-train.partial/0001/  a generation, unfinished: plan.json, journals (see ``journal.py``); in data/
                                  a file per tensor with a slot for every row of the work list, sparse until written

A generation belongs to one work list; the newest counts. Before anything is moved it is sealed by ``rows.json``: from
then on nothing in it changes, and whoever finds a seal finishes the move. All of this happens under the writer's lock.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selva.data.memmap.journal import Entry, RowJournal, entry_line, replay
from selva.data.memmap.reader import META_FILE, RECORD_SUFFIX, partial_path, record_path, table_path
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text, flush_file, flush_folder, real_path
from selva.utils.text import counted

log = logging.getLogger(__name__)

PLAN_FILE, SEAL_FILE, TABLE_FILE, DATA_FOLDER = "plan.json", RECORD_SUFFIX, "table.tsv", "data"

Plan = dict[str, Any]  # column, shapes, settings, rows (id and label each), recipe: as JSON gives it back


@dataclass(frozen=True)
class Content:
    """Rows of a published set or of a generation.

    Attributes:
        folder: holds the ``.memmap`` files. entries: by row of the plan. slots: row of the plan -> place in the files.
    """

    folder: Path
    plan: Plan
    entries: dict[int, Entry]
    slots: Mapping[int, int]


class SetFiles:
    """Paths of a set, finished and unfinished, and the steps from one to the other.

    Args:
        folder: of the published set.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = real_path(folder)
        self.table = table_path(self.folder)
        self.record = record_path(self.folder)
        self.partial = partial_path(self.folder)
        self.confirmed = self.folder.with_name(f".{self.folder.name}.confirmed")
        self.lock = self.folder.with_name(f".{self.folder.name}.lock")

    def published(self) -> Content | None:
        """Return the published rows; None if there are none yet, or they are damaged.

        Raises:
            ValueError: files are in the way that we have not written, or the record is damaged.
        """
        if not self.record.is_file():
            for path in (self.folder, self.table):
                if path.is_file() or (path.is_dir() and any(path.iterdir())):
                    raise UserError(f"{path}: is in the way: it is no part of the data set of {self.record.name}; move "
                                    "it, or choose another folder")
            return None
        record = _read_json(self.record)
        kept = [row for row, digest in enumerate(record["digests"]) if digest is not None]
        expected = {f"{key}.memmap": len(kept) * _row_bytes(s) for key, s in record["plan"]["shapes"].items()}
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("*.memmap")}
        if sizes != expected or not (self.folder / META_FILE).is_file() or not self.table.is_file():
            log.warning("%s: incomplete or damaged; written again", self.folder)
            return None
        entries = {row: Entry(digest) for row, digest in enumerate(record["digests"])}
        return Content(self.folder, record["plan"], entries, {row: slot for slot, row in enumerate(kept)})

    def newest(self) -> Path | None:
        """Return the generation that counts, and delete what killed processes have left of others."""
        folders = sorted(path for path in self.partial.glob("*") if path.is_dir())
        whole = [path for path in folders if (path / PLAN_FILE).is_file()
                 and ((path / SEAL_FILE).is_file() or (path / DATA_FOLDER).is_dir())]  # else it is published already
        for path in folders:
            if path not in whole[-1:]:
                remove(path)
        return whole[-1] if whole else None

    def begin(self, plan: Plan, sources: Sequence[Content | None]) -> Path:
        """Return a new generation for a work list, with the rows of earlier ones that may still be current.

        Every process has to confirm its rows, as what they are made of may have changed since.

        Args:
            sources: the earlier ones, the best first.
        """
        numbers = [int(path.name) for path in self.partial.glob("*") if path.name.isdigit()]
        generation = self.partial / f"{max(numbers, default=0) + 1:04d}"
        data = generation / DATA_FOLDER
        data.mkdir(parents=True)
        for key, shape in plan["shapes"].items():
            with open(data / f"{key}.memmap", "wb") as file:
                file.truncate(len(plan["rows"]) * _row_bytes(shape))
        entries: dict[int, Entry] = {}
        for source in sources:
            if source is not None and all(source.plan[name] == plan[name] for name in ("settings", "shapes")):
                _carry_over(source, plan, data, entries)
        journal = RowJournal(generation)
        journal.append(entry_line(index, entry) for index, entry in entries.items())
        journal.close()
        for key in plan["shapes"]:
            flush_file(data / f"{key}.memmap")
        flush_folder(data)
        atomic_write_text(generation / PLAN_FILE, json.dumps(plan, ensure_ascii=False))  # now it counts
        return generation

    # -- rows of the published set that were found current, by the parts that have run since all of them had ----------

    def confirmed_of(self, plan: Plan) -> Path:
        """Return the folder for journals about a work list."""
        return self.confirmed / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]

    def forget_confirmed(self) -> None:
        """Begin anew: what changes from now on, every part has to see."""
        shutil.rmtree(self.confirmed, ignore_errors=True)

    def seal(self, generation: Path, plan: Plan, digests: Sequence[str | None]) -> None:
        """Fix what is to be published: from here on a generation is not written to any more.

        Args:
            digests: per row of the plan, None for those that are left out.

        Raises:
            ValueError: all are left out.
        """
        if all(digest is None for digest in digests):
            raise UserError(f"{self.folder}: none of {counted(len(digests), 'clip')} could be used, so no data set was "
                            "written")
        record = {"plan": plan, "digests": digests}
        atomic_write_text(generation / TABLE_FILE, _table_of(record))
        atomic_write_text(generation / SEAL_FILE, json.dumps(record, ensure_ascii=False) + "\n")

    def publish(self, generation: Path) -> None:
        """Do what a seal promises. Every step may have been done by a process that was killed after it."""
        data, record = generation / DATA_FOLDER, _read_json(generation / SEAL_FILE)
        if data.is_dir():
            num_slots, shapes = len(record["digests"]), record["plan"]["shapes"]
            kept = [slot for slot, digest in enumerate(record["digests"]) if digest is not None]
            for key, shape in shapes.items():
                _close_gaps(data / f"{key}.memmap", _row_bytes(shape), num_slots, kept)
            (data / META_FILE).write_text(json.dumps(_meta(shapes, len(kept))), encoding="utf-8")
            flush_file(data / META_FILE)
            flush_folder(data)
            # Never a table beside the rows of another set: without any, readers say that it is missing.
            self._keep_edited_table()
            self.table.unlink(missing_ok=True)
            flush_folder(self.folder.parent)
            if self.folder.is_dir():
                os.rename(self.folder, generation / "replaced")
            os.rename(data, self.folder)
        if (generation / TABLE_FILE).is_file():
            os.replace(generation / TABLE_FILE, self.table)
        os.replace(generation / SEAL_FILE, self.record)
        self.forget_confirmed()  # they were about the set before
        flush_folder(self.folder.parent)
        remove(generation)

    def _keep_edited_table(self) -> None:
        """Give the table another name, and say so, if it is not as it was written."""
        written = _table_of(_read_json(self.record)) if self.record.is_file() else ""
        if not self.table.is_file() or self.table.read_bytes() == written.encode():
            return
        names = (f"{self.table.name}.bak{number or ''}" for number in itertools.count())
        kept = next(path for path in map(self.table.with_name, names) if not path.exists())
        os.rename(self.table, kept)
        log.warning("%s: was edited after the extraction that wrote it, whose rows are replaced now: the edited table "
                    "is kept as %s, the new one has the prompts of this extraction; to train with your labels, copy "
                    "them into the new one, or give them to the extraction as prompts", self.table, kept.name)


def same_plan(one: Plan, two: Plan) -> bool:
    """Return True if two plans make the same set; one of an earlier version has no recipe, which may be any."""
    rest = [{key: value for key, value in plan.items() if key != "recipe"} for plan in (one, two)]
    recipes = {plan.get("recipe", "") for plan in (one, two)} - {""}
    return rest[0] == rest[1] and len(recipes) <= 1


def content_of(generation: Path) -> Content:
    """Return the rows of a generation so far."""
    plan = _read_json(generation / PLAN_FILE)
    slots = {row: row for row in range(len(plan["rows"]))}
    return Content(generation / DATA_FOLDER, plan, replay(generation), slots)


def is_open(generation: Path) -> bool:
    """Return True where a generation may still be written to."""
    return (generation / PLAN_FILE).is_file() and not (generation / SEAL_FILE).is_file()


def remove(generation: Path) -> None:
    """Delete a generation; one that is half deleted has no plan any more, and so does not count."""
    (generation / PLAN_FILE).unlink(missing_ok=True)
    shutil.rmtree(generation, ignore_errors=True)  # files that others still have open may stay on some systems
    remove_if_empty(generation.parent)


def remove_if_empty(folder: Path) -> None:
    """Delete a folder that is there and empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _carry_over(source: Content, plan: Plan, data: Path, entries: dict[int, Entry]) -> None:
    """Copy the rows of the same id and label that are not in ``entries`` yet, and add them there."""
    old_rows = {tuple(row): number for number, row in enumerate(source.plan["rows"])}
    moves = []  # (slot there, slot here)
    for index, row in enumerate(plan["rows"]):
        old = source.entries.get(old_rows.get(tuple(row), -1))
        if index not in entries and old is not None and old.digest is not None:
            moves.append((source.slots[old_rows[tuple(row)]], index))
            entries[index] = Entry(old.digest, carried=True)
    for key, shape in plan["shapes"].items():
        size = _row_bytes(shape)
        with open(source.folder / f"{key}.memmap", "rb") as old_file, open(data / f"{key}.memmap", "r+b") as file:
            for there, here in moves:
                old_file.seek(there * size)
                file.seek(here * size)
                file.write(old_file.read(size))
    if moves:
        log.info("kept from an earlier run: %s", counted(len(moves), "row"))


def _table_of(record: Mapping[str, Any]) -> str:
    """Return the text of the table of a set: the rows of its plan that are not left out."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["id", record["plan"]["column"]])
    table.writerows(row for row, digest in zip(record["plan"]["rows"], record["digests"], strict=True)
                    if digest is not None)
    return text.getvalue()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); delete it and the files beside it, or choose another folder"
                         ) from error


def _row_bytes(shape: Sequence[int]) -> int:
    return math.prod(shape) * 4  # float32


def _meta(shapes: Mapping[str, Sequence[int]], num_rows: int) -> dict[str, Any]:
    """Return the content of ``meta.json`` as tensordict writes it for tensors without a batch size."""
    tensors = {
        key: {"device": "cpu", "shape": [num_rows, *shape], "dtype": "torch.float32", "is_nested": False}
        for key, shape in shapes.items()
    }
    return {**tensors, "shape": [], "device": "cpu", "_type": "<class 'tensordict._td.TensorDict'>",
            "_format_version": 1, "_class": "tensordict:TensorDict"}


def _close_gaps(path: Path, row_bytes: int, num_slots: int, kept: Sequence[int]) -> None:
    """Move the kept slots of a file together; a file of their size has been done already."""
    if path.stat().st_size == len(kept) * row_bytes:
        return
    assert path.stat().st_size == num_slots * row_bytes, path
    packed = path.with_suffix(".packed")
    with open(path, "rb") as source, open(packed, "wb") as target:
        for slot in kept:
            source.seek(slot * row_bytes)
            target.write(source.read(row_bytes))
    flush_file(packed)
    os.replace(packed, path)
