"""Writer of MMAudio's training data: a stream of rows from any number of processes, in the order of a work list.

    with MemmapWriter("data/vgg-train", variant, [("a", "a dog barking"), ...], video=True) as writer:
        if not writer.is_current(0, digest):
            writer.write(0, {"mean": mean, ...}, digest)       # or writer.skip(0)
        writer.publish_if_complete()                           # data/vgg-train/ and data/vgg-train.tsv are there

A row goes to its slot as soon as it is made, so memory does not grow with the set and nothing has to be merged or
sorted at the end. Whichever process finds all rows accounted for closes the gaps that left-out rows leave, and moves
the folder into place. A process may be killed at any point: the next run does the rest, and the files are the same.
:mod:`selva.data.memmap.files` says what lies where.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.data.memmap.files import (
    DATA_FOLDER,
    SEAL_FILE,
    Plan,
    SetFiles,
    content_of,
    is_open,
    remove,
    remove_if_empty,
    same_plan,
)
from selva.data.memmap.journal import Entry, RowJournal, entry_line, living_writers, replay, void_line
from selva.data.memmap.labels import check_table
from selva.data.memmap.reader import row_shapes
from selva.models.variants import Variant
from selva.utils.errors import UserError
from selva.utils.lock import file_lock
from selva.utils.text import counted

# A line of the journal is written once the values of its row are on the disk, so it is true even after a power cut and
# for another machine. Waiting for the disk at every row would cost more than making a few rows again.
FLUSH_SEC, FLUSH_ROWS = 5.0, 64


class MemmapWriter:
    """A memmap that is being written, by this process and perhaps by others at the same time.

    All processes are given the same work list and settings, each writes rows of its own. For every row of its share, a
    process asks :meth:`is_current` and then calls :meth:`write` or :meth:`skip`; at the end, and as often as it likes,
    :meth:`publish_if_complete`. Rows of an earlier run with the same id, label and settings are taken over. The threads
    of a process may share a writer.

    Args:
        folder: what is to be written; ``<folder>.tsv`` and ``<folder>.rows.json`` come to lie beside it.
        variant: whose latents and features the rows are.
        rows: (id, label or caption) of every clip of the whole work list, in the order of the rows.
        video: False for sound without pictures: no features of frames, and the table has captions.
        settings: what decides the content of all rows alike, anything that JSON can hold.
        recipe: what else the caller was asked for, such as where in its video every row begins; "" if there is nothing.
            A set of another recipe is another set, of which no row counts that has not been confirmed.

    Raises:
        ValueError: an empty list, an id that comes twice, an id or a label that MMAudio could not read, another run is
            writing other data here, or files are in the way that are not of such a set.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        variant: Variant,
        rows: Sequence[tuple[str, str]],
        *,
        video: bool,
        settings: Mapping[str, Any] | None = None,
        recipe: str = "",
    ) -> None:
        self.files = SetFiles(folder)
        self.shapes = row_shapes(variant, video)
        self.ids = [clip_id for clip_id, _ in rows]
        self._check_ids()
        check_table(rows, self.files.folder)
        plan = {"column": "label" if video else "caption", "shapes": self.shapes, "settings": settings or {},
                "rows": list(rows), **({"recipe": recipe} if recipe else {})}
        self._plan: Plan = json.loads(json.dumps(plan))
        self._entries: dict[int, Entry] = {}
        self._confirmed: dict[int, str | None] = {}  # rows of the published set that this process found current
        self._generation: Path | None = None  # None: what is published is the result of this work list
        self._journal: RowJournal | None = None
        self._tensor_files: dict[str, FileIO] = {}
        self._pending: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self.files.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = file_lock(self.files.lock)
        self._threads = threading.RLock()
        with self._lock:
            self._enter()

    def _check_ids(self) -> None:
        if not self.ids:
            raise UserError(f"{self.files.folder}: no clips to write")
        if len(set(self.ids)) < len(self.ids):
            twice = next(clip_id for clip_id in self.ids if self.ids.count(clip_id) > 1)
            raise UserError(f"{self.files.folder}: the id {twice!r} comes more than once, every clip needs its own")

    # -- rows ----------------------------------------------------------------------------------------------------------

    def is_current(self, index: int, digest: str) -> bool:
        """Return True where row ``index`` is there with this digest already; otherwise it has to be made."""
        with self._threads:
            entry = self._entries.get(index)
            if entry is None:
                return False
            if entry.digest != digest:
                if self._generation is not None:
                    self._claim(index)  # so that nobody publishes what was just found to be out of date
                return False
            if self._generation is None:
                self._confirmed[index] = digest
            elif entry.carried:
                self._note(index, Entry(digest))
            return True

    def digests(self) -> dict[int, str]:
        """Return the digest of every row that is known to be there, by its index; a copy that other processes may use.

        What it names, :meth:`is_current` still has to confirm.
        """
        return {index: entry.digest for index, entry in self._entries.items() if entry.digest is not None}

    def write(self, index: int, rows: Mapping[str, Tensor], digest: str) -> None:
        """Write row ``index`` of every tensor.

        Args:
            rows: key -> one row, of the shape that :func:`selva.data.memmap.reader.row_shapes` says.
            digest: of everything that decided the values.

        Raises:
            ValueError: a key is missing or unknown, a shape is wrong, or a value is not finite; names the clip.
        """
        values = {key: self._checked(index, key, rows) for key in self.shapes}
        if unknown := set(rows) - set(self.shapes):
            raise UserError(f"clip {self.ids[index]!r}: {', '.join(sorted(unknown))} is not part of this set, "
                             f"expected {', '.join(self.shapes)}")
        with self._threads:
            self._claim(index)
            for key, value in values.items():
                _write_at(self._tensor_files[key], index * value.nbytes, value)
            self._note(index, Entry(digest))

    def skip(self, index: int) -> None:
        """Leave row ``index`` out: its clip cannot be used. The next run asks for it again."""
        with self._threads:
            if self._generation is None and self._entries[index].digest is None:
                self._confirmed[index] = None
                return
            self._claim(index)
            self._note(index, Entry(None))

    def _checked(self, index: int, key: str, rows: Mapping[str, Tensor]) -> np.ndarray:
        """Return one row of one tensor as it is stored."""
        assert 0 <= index < len(self.ids), index
        if key not in rows:
            raise UserError(f"clip {self.ids[index]!r}: {key} is missing")
        value = torch.as_tensor(rows[key]).detach().to("cpu", torch.float32).contiguous()
        if tuple(value.shape) != self.shapes[key]:
            raise UserError(f"clip {self.ids[index]!r}: {key} is {tuple(value.shape)}, expected {self.shapes[key]}")
        if num_bad := int((~torch.isfinite(value)).sum()):
            raise UserError(f"clip {self.ids[index]!r}: {key} has {counted(num_bad, 'value')} that are not finite")
        return value.numpy().astype("<f4", copy=False)

    def _claim(self, index: int) -> None:
        """Make sure that nobody publishes before row ``index`` is accounted for anew."""
        if self._is_open() and index not in self._entries:
            return  # nobody can: it is missing
        with self._lock:
            if not self._is_open():
                self._enter(force=True)
            if self._entries.pop(index, None) is not None:
                self._pending.append(void_line(index))
                self.flush()

    def _is_open(self) -> bool:
        return self._generation is not None and is_open(self._generation)

    def _note(self, index: int, entry: Entry) -> None:
        self._entries[index] = entry
        self._pending.append(entry_line(index, entry))
        if len(self._pending) >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_SEC:
            self.flush()

    def flush(self) -> None:
        """Bring everything that was written to the disk: first the values, then the lines that say so."""
        with self._threads:
            if self._pending:
                for file in self._tensor_files.values():
                    os.fsync(file.fileno())
                assert self._journal is not None  # lines are only noted within a generation
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

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish_if_complete(self) -> bool:
        """Move the set into place if every row, of all processes, is written or left out; return True if it is there.

        Rows that are current count from the moment that their process has called this.

        Raises:
            ValueError: all rows are left out. What was published before stays.
        """
        with self._threads:
            self.flush()
            with self._lock:
                if self._generation is None:
                    generation = self.files.newest()
                    if generation is None or not is_open(generation) or not same_plan(
                        content_of(generation).plan, self._plan
                    ):
                        self._keep_confirmed()
                        return True
                    self._enter()  # another process has found a change meanwhile
                if not self._is_open():  # another process was faster
                    self._enter()
                    return self._generation is None
                assert self._generation is not None  # it is open
                self._entries = replay(self._generation)
                if self.num_missing:
                    return False
                digests = [self._entries[index].digest for index in range(len(self.ids))]
                self.files.seal(self._generation, self._plan, digests)
                self._enter()
            return True

    @property
    def num_missing(self) -> int:
        """Number of rows that nobody has written, left out or confirmed, as far as this process knows."""
        return len(self.ids) - sum(not entry.carried for entry in self._entries.values())

    # -- generations: one per work list, the newest counts; all of this happens under the lock -------------------------

    def _enter(self, force: bool = False) -> None:
        """Join the generation of this work list, or begin one; none is needed for what is published already.

        Args:
            force: begin one even then, because a row has changed.
        """
        self._leave()
        generation = self.files.newest()
        if generation is not None and (generation / SEAL_FILE).is_file():
            self.files.publish(generation)
            generation = None
        published = self.files.published()
        is_published = published is not None and same_plan(published.plan, self._plan)
        found = content_of(generation) if generation is not None else None
        if generation is not None and found is not None and not same_plan(found.plan, self._plan):
            if writers := living_writers(generation):
                raise UserError(f"{self.files.folder}: another run with other clips or settings is writing it "
                                 f"({', '.join(writers)}); wait for its end, or choose another folder. If it runs no "
                                 f"more, delete {generation}/*.lock")
            outdated = generation
            generation = None if is_published else self.files.begin(self._plan, [found, published])
            remove(outdated)
        began = generation is None and (force or not is_published)
        if began:
            generation = self.files.begin(self._plan, [published])
        self._generation = generation
        if generation is None:
            assert published is not None
            self._entries = published.entries
            remove_if_empty(self.files.partial)
            return
        self._entries = replay(generation)
        self._journal = RowJournal(generation)
        for key in self.shapes:
            self._tensor_files[key] = FileIO(generation / DATA_FOLDER / f"{key}.memmap", "r+")
        self._repeat_confirmed(began)

    def _repeat_confirmed(self, of_others: bool) -> None:
        """Confirm in a generation what this process, and those before it, have found current in the published set.

        Args:
            of_others: the generation is new; later, others may be about to write what they have confirmed before.
        """
        earlier = replay(self.files.confirmed_of(self._plan)) if of_others else {}
        known = {index: entry.digest for index, entry in earlier.items()} | self._confirmed
        for index, digest in known.items():
            entry = self._entries.get(index)
            if (entry is None and digest is None) or (entry is not None and entry.carried and entry.digest == digest):
                self._note(index, Entry(digest))
        self.flush()

    def _keep_confirmed(self) -> None:
        """Remember the rows that this process has found current, until all processes have said so of theirs."""
        folder = self.files.confirmed_of(self._plan)
        known = replay(folder)
        new = {index: Entry(digest) for index, digest in self._confirmed.items() if known.get(index) != Entry(digest)}
        if len(known | new) == len(self.ids):
            self.files.forget_confirmed()
        elif new:
            folder.mkdir(parents=True, exist_ok=True)
            journal = RowJournal(folder)
            journal.append(entry_line(index, entry) for index, entry in new.items())
            journal.close()

    def _leave(self) -> None:
        for file in self._tensor_files.values():
            file.close()
        if self._journal is not None:
            self._journal.close()
        self._tensor_files, self._journal, self._generation, self._pending = {}, None, None, []


def _write_at(file: FileIO, position: int, values: np.ndarray) -> None:
    file.seek(position)
    rest = values.data.cast("B")
    while rest:  # a full disk, among others, takes only a part and complains at the next one
        rest = rest[file.write(rest) :]
