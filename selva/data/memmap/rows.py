"""Rows of one tensor of a memmap, read from the file when they are asked for.

The file is not mapped into memory: a map takes address space for all of the set, which a limit (``ulimit -v``) refuses;
its pages count as memory of the process for as long as they are in the cache; and an error of the disk or of a file
system in the network ends the process without a word. A read takes the memory of its rows and fails with a message.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from pathlib import Path

import numpy as np

from selva.utils.errors import UserError
from selva.utils.text import counted

VALUE = np.dtype("<f4")
MOST_AT_ONCE = 2**24  # bytes, where they are copied once more


class RowFile:
    """Values (n, tokens, channels) of a file, float32: ``rows[3]``, ``rows[3, :10]`` and ``rows[3:7]`` read them.

    What is read is the caller's own. Threads may read at the same time.

    Args:
        path: holds the values row by row. shape: of all of them.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it has another size.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        found, expected = path.stat().st_size, math.prod(shape) * VALUE.itemsize
        if found != expected:
            raise UserError(f"{path}: has {counted(found, 'byte')}, expected {expected} for {shape}; copy it again")
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: int | slice | tuple[int, slice]) -> np.ndarray:
        """Return a row (tokens, channels), some tokens of it, or some neighbouring rows (m, tokens, channels)."""
        rows, tokens, channels = self.shape
        if isinstance(chosen, slice):
            first, last, step = chosen.indices(rows)
            assert step == 1, chosen
            count = max(0, last - first)
            return self._read(first * tokens * channels, count * tokens * channels).reshape(count, tokens, channels)
        row, part = chosen if isinstance(chosen, tuple) else (chosen, slice(None))
        if not -rows <= row < rows:
            raise IndexError(f"{self.path}: row {row} of {rows}")
        first, last, step = part.indices(tokens)
        assert step == 1, chosen
        count = max(0, last - first)
        return self._read((row % rows * tokens + first) * channels, count * channels).reshape(count, channels)

    def _read(self, place: int, count: int) -> np.ndarray:
        """Return ``count`` values from value ``place`` on."""
        values = np.empty(count, VALUE)
        rest, place = values.data.cast("B"), place * VALUE.itemsize
        while len(rest):
            done = self._read_into(rest, place)
            if not done:
                raise UserError(f"{self.path}: ends at byte {place}, although it was longer when it was opened; copy "
                                "it again")
            rest, place = rest[done:], place + done
        return values

    def _read_into(self, target: memoryview, place: int) -> int:
        """Read what comes at once into ``target`` and return the number of bytes."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file, [target], place)
        with self._turn:  # Windows knows no reading at a place
            os.lseek(self._file, place, os.SEEK_SET)
            found = os.read(self._file, min(len(target), MOST_AT_ONCE))
        target[: len(found)] = found
        return len(found)
