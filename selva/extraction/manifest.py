"""Manifest of a work list: the result of every clip, from any number of processes that need not know of each other.

    manifest.jsonl              one line per clip in the order of the work list, once all of it has been gone through
    manifest.incomplete.jsonl   the same before that; clips that nobody has finished yet are "pending"
    <state>/shard_2_of_4.jsonl  journal of one process: who it is, a line per clip, and that it has come to the end
    <state>/shard_2_of_4.lock   held while that process lives

A process writes only its own journal. At its end it takes a lock for a moment, says so, and joins what all journals of
this work list say, so the last one to finish writes the manifest; nobody waits for anybody. The manifest says what the
output holds, not which run made it: after an interruption and a second run it is the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from selva.utils import torchrun
from selva.utils.errors import UserError
from selva.utils.files import as_utf8, atomic_write_text, json_lines, real_path
from selva.utils.lock import file_lock

log = logging.getLogger(__name__)

MANIFEST_FILE, INCOMPLETE_FILE = "manifest.jsonl", "manifest.incomplete.jsonl"
DONE, SKIPPED, FAILED, PENDING = "done", "skipped", "failed", "pending"

Row = dict[str, Any]  # id, source, start_sec, status, reason, files, duration_sec


@dataclass(frozen=True)
class Shard:
    """Share of a work list that this process does: every ``count``-th clip, beginning with ``index``.

    Attributes:
        index, count: 0 of 1 is everything.
        group: the shards that were started together and end together; this one alone if None.
        launch: the same in processes that were started together, another one at another time.
    """

    index: int = 0
    count: int = 1
    group: range | None = None
    launch: str = ""

    @classmethod
    def of_process(cls, index: int = 0, count: int = 1) -> Shard:
        """Return the share of this process, if ``torchrun`` divides the share ``index`` of ``count`` once more."""
        rank, size = torchrun.rank(), torchrun.world_size()
        return cls(index * size + rank, count * size, range(index * size, (index + 1) * size), torchrun.launch_id())

    @property
    def indices_in_group(self) -> range:
        return self.group if self.group is not None else range(self.index, self.index + 1)

    def own(self, num_clips: int) -> range:
        """Return the indices of this share."""
        return range(self.index, num_clips, self.count)

    def own_groups(self, keys: Sequence[Hashable]) -> list[int]:
        """Return the indices of this share if clips with the same key have to stay together."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return [index for index, key in enumerate(keys) if numbers[key] % self.count == self.index]


@dataclass(frozen=True)
class Outcome:
    """State of the work list when a process has finished.

    Attributes:
        complete: all shards have finished, the manifest is written.
        group_complete: all shards that were started together with this one have.
        group_failed: failed clips of that group so far.
        unfinished: numbers, from 1, of the shards that have not finished.
        totals: status -> number of clips, of all shards together.
    """

    complete: bool
    group_complete: bool
    group_failed: int
    unfinished: tuple[int, ...]
    totals: dict[str, int]


class ManifestWriter:
    """Journal of one process about its share of a work list, and the manifest that all journals make.

    Args:
        manifest: the file to be written in the end. state: folder for the journals.
        rows: (id, source, start_sec or None) of every clip of the whole list, in order.
        settings: everything else that makes two runs different; journals of other settings or lists do not count.
        shard: the share of this process.

    Raises:
        ValueError: another living process does this share, or a file is in the way that is no manifest.
    """

    def __init__(
        self, manifest: Path, state: Path, rows: Sequence[tuple[str, str, float | None]], settings: Any, shard: Shard
    ) -> None:
        self.manifest, self.state, self.rows, self.shard = manifest, state, list(rows), shard
        self.incomplete = manifest.with_name(manifest.name.replace(MANIFEST_FILE, INCOMPLETE_FILE))
        check_replaceable(manifest)
        places = [(clip_id, _place(source), start_sec) for clip_id, source, start_sec in self.rows]
        self.work_list = _hash([places, settings])
        # Earlier versions took the paths as they were given.
        self._work_lists = {self.work_list, _hash([self.rows, settings])}
        self._traits = _traits(places, settings)
        state.mkdir(parents=True, exist_ok=True)
        self._lock = file_lock(state / "lock")
        self._own_lock = file_lock(self._path(shard.index).with_suffix(".lock"))
        with self._lock:  # what is there from earlier is no longer certain
            self._enter()
            manifest.unlink(missing_ok=True)
            path = self._path(shard.index)
            path.write_bytes(b"")
            # As as_utf8 does; closed by close().
            self._journal = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._write({"work_list": self.work_list, "shard": shard.index, "of": shard.count, "launch": shard.launch,
                         "host": socket.gethostname(), "pid": os.getpid(), "traits": self._traits})

    def _enter(self) -> None:
        """Take the lock of this share.

        Raises:
            ValueError: another living process does this share, or one that overlaps with it.
        """
        others = [self._path(self.shard.index)]
        others += [path.with_suffix(".jsonl") for path in sorted(self.state.glob("shard_*_of_*.lock*"))
                   if not path.name.partition(".")[0].endswith(f"_of_{self.shard.count}")]
        for path in dict.fromkeys(path.with_name(path.name.partition(".")[0] + ".jsonl") for path in others):
            own = path == others[0]
            lock = self._own_lock if own else file_lock(path.with_suffix(".lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                self._own_lock.release()
                raise UserError(
                    f"{self.manifest.parent}: {_writer(path)} is writing {path.stem.replace('_', ' ')} here, and this "
                    "one would do the same clips; wait for its end, or choose another --output_dir") from error
            if not own:
                lock.release()

    def record(
        self, index: int, status: str, reason: str = "", files: Sequence[str] = (), duration_sec: float | None = None
    ) -> None:
        """Record the result of clip ``index``. ``files`` are relative to the folder of the manifest."""
        content = {"status": status, "reason": reason, "files": list(files), "duration_sec": duration_sec}
        self._write({"index": index, **content})

    def finish(self) -> Outcome:
        """Record that this share is finished, and write the manifest of all shares so far."""
        with self._lock:
            self._write({"finished": True})
            journals = {number: self._read(number) for number in range(self.shard.count)}
            unfinished = tuple(number + 1 for number, journal in journals.items() if not journal.finished)
            for number in unfinished:
                self._name_difference(number - 1)
            target = self.incomplete if unfinished else self.manifest
            atomic_write_text(target, self._joined(journals))
            if not unfinished:
                self.incomplete.unlink(missing_ok=True)
                self._remove_foreign_journals()
        group = [journals[number] for number in self.shard.indices_in_group]
        return Outcome(
            complete=not unfinished,
            group_complete=all(journal.finished and journal.launch == self.shard.launch for journal in group),
            group_failed=sum(row["status"] == FAILED for journal in group for row in journal.rows.values()),
            unfinished=unfinished,
            totals=dict(Counter(row["status"] for journal in journals.values() for row in journal.rows.values())),
        )

    def close(self) -> None:
        self._journal.close()
        self._own_lock.release()

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- journals ------------------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.state / f"shard_{number + 1}_of_{self.shard.count}.jsonl"

    def _write(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._journal.flush()

    def _read(self, number: int) -> _Journal:
        """Return the journal of a shard about this work list; an empty one if it has not begun."""
        lines = list(json_lines(self._path(number)))
        if not lines or lines[0].get("work_list") not in self._work_lists:
            return _Journal("", {}, finished=False)
        rows = {line["index"]: line for line in lines[1:] if "index" in line}
        return _Journal(lines[0].get("launch", ""), rows, finished="finished" in lines[-1])

    def _name_difference(self, number: int) -> None:
        """Say why the journal of a share does not count, if it is about another work list."""
        header = next(iter(json_lines(self._path(number))), {})
        if "work_list" not in header or header["work_list"] in self._work_lists:
            return
        traits = header.get("traits")
        before = traits if isinstance(traits, dict) else {}
        different = [f"{key} was {before[key]} there and is {value} here" if isinstance(value, int | float | str)
                     and len(str(value)) < 40 else key for key, value in self._traits.items()
                     if key in before and before[key] != value]
        log.warning("part %d of %d was done for other clips or with other settings (%s), so it does not count here",
                    number + 1, self.shard.count, "; ".join(different) or "it does not say which")

    def _joined(self, journals: dict[int, _Journal]) -> str:
        found = {index: row for journal in journals.values() for index, row in journal.rows.items()}
        pending = {"status": PENDING, "reason": "no process has finished it yet", "files": [], "duration_sec": None}
        text = []
        for index, (clip_id, source, start_sec) in enumerate(self.rows):
            row: Row = {"id": clip_id, "source": source, "start_sec": start_sec}
            row |= {key: found.get(index, pending)[key] for key in pending}
            text.append(json.dumps(row, ensure_ascii=False) + "\n")
        return "".join(text)

    def _remove_foreign_journals(self) -> None:
        """Delete what earlier runs with another number of shards have left."""
        own = {self._path(number) for number in range(self.shard.count)}
        for path in self.state.glob("shard_*_of_*.jsonl"):
            if path not in own:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)


def _hash(content: Any) -> str:
    return hashlib.sha256(as_utf8(json.dumps(content, sort_keys=True, ensure_ascii=False))).hexdigest()


def _place(source: str) -> str:
    """Return the one name of a file, however it was given; a source that is no file is its own name."""
    return str(real_path(source)) if os.path.exists(source) or os.path.basename(source) != source else source


def _traits(places: Sequence[tuple[str, str, float | None]], settings: Any) -> dict[str, Any]:
    """Return the settings that tell two work lists apart, by names that a message can use; long ones as hashes."""
    parts = settings if isinstance(settings, list | tuple) else [settings]
    traits: dict[str, Any] = {"number of clips": len(places)}
    for part in parts:
        traits |= {f"--{key}": value for key, value in part.items()} if isinstance(part, dict) else {}
    columns = ([place[column] for place in places] for column in range(3))
    traits |= {f"the {name}": _hash(column) for name, column in zip(("ids", "videos", "starts"), columns, strict=True)}
    rest = [part for part in parts if not isinstance(part, dict)]
    return traits | ({"the prompts": _hash(rest)} if rest else {})


def _writer(path: Path) -> str:
    """Return who writes a journal."""
    header = next(iter(json_lines(path)), {})
    return f"process {header.get('pid', '(unknown)')} on {header.get('host', 'an unknown machine')}"


@dataclass(frozen=True)
class _Journal:
    launch: str
    rows: dict[int, dict[str, Any]]
    finished: bool


def read_manifest(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a manifest, in the order of the work list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not a JSON object with an id and a status.
    """
    rows = []
    # Bytes, as a line of text would also end at a U+2028 in a prompt.
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict) or "id" not in row or "status" not in row:
            raise UserError(f"{path}: line {number} is no row of a manifest, expected an id and a status")
        rows.append(row)
    return rows


def check_replaceable(path: Path) -> None:
    """Return if a manifest may be written to ``path``: there is no file, or an earlier manifest.

    Raises:
        ValueError: another file of that name, as programs for speech have it, lies there.
    """
    try:
        read_manifest(path)
    except FileNotFoundError:
        return
    except UserError as error:
        raise UserError(f"{error}; it is in the way of the manifest, which is written here: move it, or choose another "
                        "folder for the output") from error
