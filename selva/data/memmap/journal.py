"""Journals of the rows that are done: append-only files, one per process, that several machines may share.

    journal-000001.jsonl    {"host": "node3", "pid": 4711}  who writes
                            {"row": 7, "digest": "9f2c..."}     the row holds what this digest stands for
                            {"row": 8, "digest": null}          left out: there will be no such row
                            {"row": 9, "digest": "...", "carried": true}    taken over, not looked at yet by its owner
                            {"row": 7, "void": true}            forget it: it is made again
    journal-000001.lock     held while the process lives; the system lets go of it however the process ends

A process writes its own file only, so nothing has to be locked for a line. Where two files speak of one row, the
younger file counts. A line that a killed process left unfinished counts as not written.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from selva.utils.lock import file_lock

PATTERN = "journal-*.jsonl"


@dataclass(frozen=True)
class Entry:
    """State of a row.

    Attributes:
        digest: of everything that decided its content; None for a row that is left out.
        carried: it comes from an earlier work list, and its owner has not said yet that it is current.
    """

    digest: str | None
    carried: bool = False


class RowJournal:
    """The journal of this process in ``folder``. Make it while no other process makes one, that is, under a lock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"journal-{_last_number(folder) + 1:06d}.jsonl"
        self._lock = file_lock(self.path.with_suffix(".lock"))
        self._lock.acquire()
        self._file = open(self.path, "x", encoding="utf-8")  # noqa: SIM115 -- closed by close()
        self.append([{"host": socket.gethostname(), "pid": os.getpid()}])

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines, and return when they are on the disk and other machines can see them."""
        self._file.writelines(json.dumps(line) + "\n" for line in lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._lock.release()


def entry_line(row: int, entry: Entry) -> dict[str, Any]:
    """Return the line that records the state of a row."""
    return {"row": row, "digest": entry.digest, **({"carried": True} if entry.carried else {})}


def void_line(row: int) -> dict[str, Any]:
    """Return the line that revokes all earlier lines about a row."""
    return {"row": row, "void": True}


def replay(folder: Path) -> dict[int, Entry]:
    """Return the state of every row that the journals of a folder mention."""
    entries: dict[int, Entry] = {}
    for path in sorted(folder.glob(PATTERN)):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    content = json.loads(line)
                    row = int(content["row"])
                    void, entry = "void" in content, Entry(content.get("digest"), content.get("carried", False))
                except (ValueError, LookupError, TypeError, RecursionError):  # unfinished: its process was killed
                    continue
                if void:
                    entries.pop(row, None)
                else:
                    entries[row] = entry
    return entries


def living_writers(folder: Path) -> list[str]:
    """Return the processes that are still writing here, on any machine, as "process 4711 on node3"."""
    living = []
    for path in sorted(folder.glob(PATTERN)):
        lock = file_lock(path.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            living.append(_writer(path))
        else:
            lock.release()
    return living


def _writer(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            header = json.loads(file.readline())
        return f"process {header['pid']} on {header['host']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return f"the process of {path.name}"


def _last_number(folder: Path) -> int:
    return max((int(path.stem.rpartition("-")[2]) for path in folder.glob(PATTERN)), default=0)
