"""Write training data of MMAudio as a stream: row after row, by any number of processes, in the order of a work list.

    data/vgg-train/               what is published, see :mod:`selva.memmap`; replaced only by another complete set
    data/vgg-train.tsv            id and label (or caption) of every row
    data/vgg-train.rows.json      ours: the work list, and for every row a digest of what decided its content
    data/vgg-train.partial/0001/  unfinished: plan.json, journals (:mod:`selva.row_journal`), and in data/ a file per
                                  tensor with a slot for every entry of the work list, sparse until it is written

A row goes to its slot as soon as it is made, so memory does not grow with the set and nothing has to be merged or
sorted at the end. Whichever process finds all rows accounted for closes the gaps that left-out rows leave, and moves
the folder into place. Before that it writes ``rows.json`` into the unfinished folder as a seal: from then on nothing
changes any more, and a run that finds a seal finishes the move. So a process may be killed at any point.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from selva.files import atomic_write_text, flush_file, flush_folder
from selva.memmap import META_FILE, row_shapes, table_path
from selva.models.zoo import Variant
from selva.row_journal import Entry, RowJournal, entry_line, living_writers, replay, void_line

log = logging.getLogger(__name__)

PLAN_FILE, SEAL_FILE, TABLE_FILE, DATA_FOLDER = "plan.json", "rows.json", "table.tsv", "data"
# A line of the journal is written once the values of its row are on the disk, so it is true even after a power cut and
# for another machine. Waiting for the disk at every row would cost more than making a few rows again.
FLUSH_SEC, FLUSH_ROWS = 5.0, 64

Plan = dict[str, Any]  # column, shapes, settings, rows: as JSON gives it back


class MemmapWriter:
    """A memmap that is being written, by this process and perhaps by others at the same time.

    All processes are given the same work list and settings, each writes rows of its own. For every row of its share, a
    process asks :meth:`is_current` and then calls :meth:`write` or :meth:`skip`; at the end, and as often as it likes,
    :meth:`publish_if_complete`. Rows of an earlier run with the same id, label and settings are taken over.

    Args:
        folder: what is to be written; ``<folder>.tsv`` and ``<folder>.rows.json`` come to lie beside it.
        variant: whose latents and features the rows are.
        rows: (id, label or caption) of every clip of the whole work list, in the order of the rows.
        video: False for sound without pictures: no features of frames, and the table has captions.
        settings: what decides the content of all rows alike, anything that JSON can hold.

    Raises:
        ValueError: an empty list, an id that comes twice, another run is writing other data here, or files are in the
            way that are not of such a set.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        variant: Variant,
        rows: Sequence[tuple[str, str]],
        *,
        video: bool,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.table = table_path(self.folder)
        self.record = self.folder.with_name(f"{self.folder.name}.{SEAL_FILE}")
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")
        self.shapes = row_shapes(variant, video)
        self.ids = [clip_id for clip_id, _ in rows]
        self._check_ids()
        plan = {"column": "label" if video else "caption", "shapes": self.shapes, "settings": settings or {},
                "rows": list(rows)}
        self._plan: Plan = json.loads(json.dumps(plan))
        self._entries: dict[int, Entry] = {}
        self._generation: Path | None = None  # None: what is published is the result of this work list
        self._journal: RowJournal | None = None
        self._files: dict[str, FileIO] = {}
        self._pending: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"), thread_local=False)
        with self._lock:
            self._enter()

    def _check_ids(self) -> None:
        if not self.ids:
            raise ValueError(f"{self.folder}: no clips to write")
        if len(set(self.ids)) < len(self.ids):
            twice = next(clip_id for clip_id in self.ids if self.ids.count(clip_id) > 1)
            raise ValueError(f"{self.folder}: the id {twice!r} comes more than once, every clip needs its own")

    # -- rows -----------------------------------------------------------------------------------------------------

    def is_current(self, index: int, digest: str) -> bool:
        """Return whether row ``index`` holds already what ``digest`` stands for; if not, it has to be made."""
        entry = self._entries.get(index)
        if entry is None:
            return False
        if entry.digest != digest:
            if self._generation is not None:
                self._claim(index)  # so that nobody publishes what was just found to be out of date
            return False
        if entry.carried:
            self._note(index, Entry(digest))
        return True

    def write(self, index: int, rows: Mapping[str, Tensor], digest: str) -> None:
        """Write row ``index`` of every tensor.

        Args:
            rows: key -> one row, of the shape that :func:`selva.memmap.row_shapes` says.
            digest: of everything that decided the values.

        Raises:
            ValueError: a key is missing or unknown, a shape is wrong, or a value is not finite; names the clip.
        """
        values = {key: self._checked(index, key, rows) for key in self.shapes}
        if unknown := set(rows) - set(self.shapes):
            raise ValueError(f"clip {self.ids[index]!r}: {', '.join(sorted(unknown))} is not part of this set, "
                             f"expected {', '.join(self.shapes)}")
        self._claim(index)
        for key, value in values.items():
            _write_at(self._files[key], index * value.nbytes, value)
        self._note(index, Entry(digest))

    def skip(self, index: int) -> None:
        """Leave row ``index`` out: its clip cannot be used. The next run asks for it again."""
        if self._generation is None and self._entries[index].digest is None:
            return
        self._claim(index)
        self._note(index, Entry(None))

    def _checked(self, index: int, key: str, rows: Mapping[str, Tensor]) -> np.ndarray:
        """Return one row of one tensor as it is stored."""
        assert 0 <= index < len(self.ids), index
        if key not in rows:
            raise ValueError(f"clip {self.ids[index]!r}: {key} is missing")
        value = torch.as_tensor(rows[key]).detach().to("cpu", torch.float32).contiguous()
        if tuple(value.shape) != self.shapes[key]:
            raise ValueError(f"clip {self.ids[index]!r}: {key} is {tuple(value.shape)}, expected {self.shapes[key]}")
        if num_bad := int((~torch.isfinite(value)).sum()):
            raise ValueError(f"clip {self.ids[index]!r}: {key} has {num_bad} values that are not finite")
        return value.numpy().astype("<f4", copy=False)

    def _claim(self, index: int) -> None:
        """Make sure that nobody publishes before row ``index`` is accounted for anew."""
        is_open = self._generation is not None and _is_open(self._generation)
        if is_open and index not in self._entries:
            return  # nobody can: it is missing
        with self._lock:
            if not (is_open and _is_open(self._generation)):
                self._enter(force=True)
            if self._entries.pop(index, None) is not None:
                self._pending.append(void_line(index))
                self.flush()

    def _note(self, index: int, entry: Entry) -> None:
        self._entries[index] = entry
        self._pending.append(entry_line(index, entry))
        if len(self._pending) >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_SEC:
            self.flush()

    def flush(self) -> None:
        """Bring everything that was written to the disk: first the values, then the lines that say so."""
        if self._pending:
            for file in self._files.values():
                os.fsync(file.fileno())
            self._journal.append(self._pending)
            self._pending = []
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and let other runs write here."""
        self.flush()
        self._leave()

    def __enter__(self) -> MemmapWriter:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- publishing -----------------------------------------------------------------------------------------------

    def publish_if_complete(self) -> bool:
        """Move the set into place if every row, of all processes, is written or left out; return whether it is there.

        Raises:
            ValueError: all rows are left out. What was published before stays.
        """
        self.flush()
        if self._generation is None:
            return True
        with self._lock:
            if not _is_open(self._generation):  # another process was faster
                self._enter()
                return self._generation is None
            self._entries = replay(self._generation)
            if self.num_missing:
                return False
            self._seal(self._generation)
            self._enter()
        return True

    @property
    def num_missing(self) -> int:
        """How many rows nobody has written, left out or confirmed, as far as this process knows."""
        return len(self.ids) - sum(not entry.carried for entry in self._entries.values())

    def _seal(self, generation: Path) -> None:
        """Fix what is to be published: from here on a generation is not written to any more."""
        digests = [self._entries[index].digest for index in range(len(self.ids))]
        kept = [row for row, digest in zip(self._plan["rows"], digests, strict=True) if digest is not None]
        if not kept:
            raise ValueError(f"{self.folder}: none of {len(digests)} clips could be used, nothing was published")
        text = io.StringIO()
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(["id", self._plan["column"]])
        table.writerows(kept)
        atomic_write_text(generation / TABLE_FILE, text.getvalue())
        record = {"plan": self._plan, "digests": digests}
        atomic_write_text(generation / SEAL_FILE, json.dumps(record, ensure_ascii=False) + "\n")

    def _publish(self, generation: Path) -> None:
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
            if self.folder.is_dir():
                os.rename(self.folder, generation / "replaced")
            os.rename(data, self.folder)
        if (generation / TABLE_FILE).is_file():
            os.replace(generation / TABLE_FILE, self.table)
        os.replace(generation / SEAL_FILE, self.record)
        flush_folder(self.folder.parent)
        _remove(generation)

    # -- generations: one per work list, the newest counts; all of this happens under the lock ---------------------

    def _enter(self, force: bool = False) -> None:
        """Join the generation of this work list, or begin one; none is needed for what is published already.

        Args:
            force: begin one even then, because a row has changed.
        """
        self._leave()
        generation = self._newest()
        if generation is not None and (generation / SEAL_FILE).is_file():
            self._publish(generation)
            generation = None
        published = self._published()
        is_published = published is not None and published.plan == self._plan
        found = _generation_content(generation) if generation is not None else None
        if found is not None and found.plan != self._plan:
            if writers := living_writers(generation):
                raise ValueError(f"{self.folder}: another run with other clips or settings is writing it "
                                 f"({', '.join(writers)}); wait for its end, or choose another folder")
            outdated = generation
            generation = None if is_published else self._begin([found, published], carried=True)
            _remove(outdated)
        if generation is None and (force or not is_published):
            generation = self._begin([published], carried=not is_published)
        self._generation = generation
        if generation is None:
            assert published is not None
            self._entries = published.entries
            _remove_if_empty(self.partial)
            return
        self._entries = replay(generation)
        self._journal = RowJournal(generation)
        for key in self.shapes:
            self._files[key] = FileIO(generation / DATA_FOLDER / f"{key}.memmap", "r+")

    def _leave(self) -> None:
        for file in self._files.values():
            file.close()
        if self._journal is not None:
            self._journal.close()
        self._files, self._journal, self._generation, self._pending = {}, None, None, []

    def _newest(self) -> Path | None:
        """Return the generation that counts, and delete what killed processes have left of others."""
        folders = sorted(path for path in self.partial.glob("*") if path.is_dir())
        whole = [path for path in folders if (path / PLAN_FILE).is_file()
                 and ((path / SEAL_FILE).is_file() or (path / DATA_FOLDER).is_dir())]  # else it is published already
        for path in folders:
            if path not in whole[-1:]:
                _remove(path)
        return whole[-1] if whole else None

    def _begin(self, sources: Sequence[_Content | None], carried: bool) -> Path:
        """Return a new generation of this work list, with the rows of earlier ones that may still be current.

        Args:
            carried: the work list is another one, so every process has to confirm its rows; otherwise they count.
        """
        numbers = [int(path.name) for path in self.partial.glob("*") if path.name.isdigit()]
        generation = self.partial / f"{max(numbers, default=0) + 1:04d}"
        data = generation / DATA_FOLDER
        data.mkdir(parents=True)
        for key, shape in self.shapes.items():
            with open(data / f"{key}.memmap", "wb") as file:
                file.truncate(len(self.ids) * _row_bytes(shape))
        entries: dict[int, Entry] = {}
        for source in sources:
            if source is not None and all(source.plan[name] == self._plan[name] for name in ("settings", "shapes")):
                self._carry_over(source, data, carried, entries)
        journal = RowJournal(generation)
        journal.append(entry_line(index, entry) for index, entry in entries.items())
        journal.close()
        atomic_write_text(generation / PLAN_FILE, json.dumps(self._plan, ensure_ascii=False))  # now it counts
        return generation

    def _carry_over(self, source: _Content, data: Path, carried: bool, entries: dict[int, Entry]) -> None:
        """Copy the rows of the same id and label that are not in ``entries`` yet, and add them there."""
        old_rows = {tuple(row): number for number, row in enumerate(source.plan["rows"])}
        moves = []  # (slot there, slot here)
        for index, row in enumerate(self._plan["rows"]):
            old = source.entries.get(old_rows.get(tuple(row), -1))
            if index in entries or old is None:
                continue
            if old.digest is not None:
                moves.append((source.slots[old_rows[tuple(row)]], index))
                entries[index] = Entry(old.digest, carried)
            elif not carried:
                entries[index] = old
        for key, shape in self.shapes.items():
            size = _row_bytes(shape)
            with open(source.folder / f"{key}.memmap", "rb") as old_file, open(data / f"{key}.memmap", "r+b") as file:
                for there, here in moves:
                    old_file.seek(there * size)
                    file.seek(here * size)
                    file.write(old_file.read(size))
            flush_file(data / f"{key}.memmap")
        if moves:
            log.info("%s: %d rows of an earlier run are taken over", self.folder, len(moves))

    def _published(self) -> _Content | None:
        """Return what is published; None if there is nothing that we have written, or it is damaged."""
        if not self.record.is_file():
            for path in (self.folder, self.table):
                if path.is_file() or (path.is_dir() and any(path.iterdir())):
                    raise ValueError(f"{path}: is in the way, it was not written together with {self.record.name}; "
                                     "move it, or choose another folder")
            return None
        record = _read_json(self.record)
        kept = [row for row, digest in enumerate(record["digests"]) if digest is not None]
        expected = {f"{key}.memmap": len(kept) * _row_bytes(s) for key, s in record["plan"]["shapes"].items()}
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("*.memmap")}
        if sizes != expected or not (self.folder / META_FILE).is_file() or not self.table.is_file():
            log.warning("%s: incomplete or damaged, made again", self.folder)
            return None
        entries = {row: Entry(digest) for row, digest in enumerate(record["digests"])}
        return _Content(self.folder, record["plan"], entries, {row: slot for slot, row in enumerate(kept)})


@dataclass(frozen=True)
class _Content:
    """Rows that lie somewhere.

    Attributes:
        folder: holds the ``.memmap`` files. entries: by row of the plan. slots: row of the plan -> place in the files.
    """

    folder: Path
    plan: Plan
    entries: dict[int, Entry]
    slots: Mapping[int, int]


def _generation_content(generation: Path) -> _Content:
    plan = _read_json(generation / PLAN_FILE)
    slots = {row: row for row in range(len(plan["rows"]))}
    return _Content(generation / DATA_FOLDER, plan, replay(generation), slots)


def _is_open(generation: Path) -> bool:
    return (generation / PLAN_FILE).is_file() and not (generation / SEAL_FILE).is_file()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); delete it with what lies beside it, or choose another folder"
                         ) from error


def _row_bytes(shape: Sequence[int]) -> int:
    return math.prod(shape) * 4  # float32


def _meta(shapes: Mapping[str, Sequence[int]], num_rows: int) -> dict[str, Any]:
    """Return what tensordict writes into ``meta.json`` for tensors without a batch size."""
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


def _write_at(file: FileIO, position: int, values: np.ndarray) -> None:
    file.seek(position)
    rest = memoryview(values).cast("B")
    while rest:  # a full disk, among others, takes only a part and complains at the next one
        rest = rest[file.write(rest) :]


def _remove(generation: Path) -> None:
    """Delete a generation; one that is half deleted has no plan any more, and so does not count."""
    (generation / PLAN_FILE).unlink(missing_ok=True)
    shutil.rmtree(generation, ignore_errors=True)  # files that others still have open may stay on some systems
    _remove_if_empty(generation.parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
