"""Results computed once per data folder and kept in ``<data_dir>/.selva_cache``, so that the next run starts at once.

    latents/<key>.safetensors  texts/<key>.safetensors    tensors; the key is a hash of everything that decides them
    files.json                                            file name -> size, times, inode, and facts found out about it

Nothing in it is ever needed: entries that are missing, damaged or made with other settings are made again, and the
folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selva.utils.files import atomic_path, atomic_write_text, native_path, source_hash, why_not_written
from selva.utils.lock import FolderLock, file_lock
from selva.utils.torch_files import READ_ERRORS, write_safetensors
from selva.utils.torchrun import is_main_process

log = logging.getLogger(__name__)

CACHE_FOLDER = ".selva_cache"
FILES_FILE, LOCK_FILE = "files.json", "encoding.lock"
# A file may change again within one tick of its time stamp and look the same; what is younger is read every time.
SETTLED_NS = 2_000_000_000
TEMPORARY_PREFIX, ALIVE_FILE = "selva_cache_", "alive.lock"  # held by the process whose temporary folder it is
YOUNG_SEC = 60.0  # a folder so young may be between its making and its lock
BASIC_STAMP = {"size", "mtime_ns"}  # what every version has written

Settings = Mapping[str, Any]  # anything that JSON can hold; equal settings mean equal content


class DataCache:
    """The cache of one data folder; a temporary folder holds entries that cannot be written there.

    Where that one is full too, entries are kept in memory.

    Args:
        data_dir: whose cache; a read-only one is read from and left as it is.
        enabled: False keeps everything in the temporary folder, which :meth:`remove_temporary` deletes, or the end of
            the process.
        name: of the cache's folder in it.
    """

    def __init__(self, data_dir: Path, enabled: bool = True, name: str = CACHE_FOLDER) -> None:
        self.folder = data_dir / name if enabled else None
        self._temporary: TemporaryFolder | None = None
        self._memory: dict[str, dict[str, Tensor]] = {}  # file name -> entry that fits nowhere else
        _open_caches.add(self)
        remove_stale_folders()
        self._writable_folder = self.folder  # None once it cannot be written to
        self._files = self._read_files()
        self._files_changed = False

    @property
    def is_shared(self) -> bool:
        """True where other processes find what is saved here, as far as is known."""
        return self._writable_folder is not None

    # -- tensors -------------------------------------------------------------------------------------------------------

    def load(self, kind: str, settings: Settings) -> dict[str, Tensor] | None:
        """Return the tensors that were saved with exactly these settings; None if they have to be made (again)."""
        if (kept := self._memory.get(_entry_name(kind, settings))) is not None:
            return {name: x.clone() for name, x in kept.items()}
        for folder in self._folders():
            path = folder / _entry_name(kind, settings)
            if not path.is_file():
                continue
            try:
                with native_path(path) as readable, safe_open(readable, framework="pt") as file:
                    stored = (file.metadata() or {}).get("settings")
                    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, *READ_ERRORS) as error:
                log.warning("%s: this cache file is damaged (%s); it is computed again", path, error)
                continue
            if stored == _canonical(settings) and all(bool(torch.isfinite(x).all()) for x in tensors.values()):
                return tensors
            log.warning("%s: this cache file holds something else than its name says; it is computed again", path)
        return None

    def save(self, kind: str, settings: Settings, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under these settings, whole or not at all."""
        contiguous, name = {name: x.contiguous() for name, x in tensors.items()}, _entry_name(kind, settings)

        def write(folder: Path) -> None:
            with atomic_path(folder / name) as temporary:
                write_safetensors(contiguous, temporary, {"settings": _canonical(settings)})

        if not self._write(write):
            self._memory[name] = contiguous

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Let one process at a time fill the cache of this folder; another one waits and says for whom.

        Under torchrun rank 0 stands for all. A folder that cannot be written needs no lock.
        """
        with contextlib.ExitStack() as stack:
            if self._writable_folder is not None and is_main_process():
                with contextlib.suppress(OSError):
                    stack.enter_context(FolderLock(self._writable_folder / LOCK_FILE, "encodes", wait=True))
            yield

    # -- files ---------------------------------------------------------------------------------------------------------

    def note(self, path: Path, name: str, find_out: Callable[[], Any]) -> Any:
        """Return the result of ``find_out`` about a file of the data folder, anything that JSON can hold.

        It is called once, and again for another file, or a file that was written to: size and time alone do not tell
        two sounds apart that have swapped their names, the inode and the time of its last change do. Notes of version
        0.1.0, which knew only the first two, are believed by them. :meth:`flush` writes them down.
        """
        status = path.stat()
        stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns,
                 "inode": status.st_ino}
        record = self._files.get(path.name)
        if record is None or not record["stamp"].keys() >= BASIC_STAMP or record["stamp"].items() - stamp.items():
            record = {"stamp": stamp, "notes": {}}
        if name not in record["notes"]:
            record["notes"][name] = find_out()
            record["stamp"] = stamp
            if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
                self._files[path.name], self._files_changed = record, True
        return record["notes"][name]

    def content_hash(self, path: Path) -> str:
        """Return the SHA-256 of a file of the data folder."""
        return self.note(path, "sha256", lambda: source_hash(path))

    def flush(self) -> None:
        """Write the notes down."""
        if self._files_changed:
            # What another process has noted meanwhile stays; stamps tell which notes still hold.
            text = json.dumps({**self._read_files(), **self._files}, indent=0, sort_keys=True)
            self._write(lambda folder: atomic_write_text(folder / FILES_FILE, text))
            self._files_changed = False

    def _read_files(self) -> dict[str, dict[str, Any]]:
        try:
            records = json.loads((self.folder / FILES_FILE).read_text(encoding="utf-8")) if self.folder else {}
        except (OSError, ValueError, RecursionError):  # none yet, or damaged
            return {}
        if not isinstance(records, dict):
            return {}
        return {name: record for name, record in records.items() if _is_record(record)}

    # -- folders -------------------------------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        temporary = self._temporary.path if self._temporary is not None else None
        return [folder for folder in (temporary, self.folder) if folder is not None]

    def remove_temporary(self) -> None:
        """Delete the temporary folder and what is in memory only."""
        self._memory.clear()
        if self._temporary is not None:
            self._temporary.remove()
            self._temporary = None

    def _write(self, write: Callable[[Path], None]) -> bool:
        """Call ``write`` with the folder to write to; once the data folder refuses, always with the temporary one.

        Returns False if neither can be written.
        """
        if self._writable_folder is not None:
            try:
                write(self._writable_folder)
                return True
            except OSError as error:
                self._writable_folder = None
                log.warning("%s: cannot be written (%s); the cache goes to a temporary folder, so the next run "
                            "computes it again", self.folder, why_not_written(error))
        try:
            if self._temporary is None:
                self._temporary = TemporaryFolder()
            write(self._temporary.path)
        except OSError as error:
            if not self._memory:
                log.warning("the temporary folder cannot be written either (%s); latents are kept in memory",
                            why_not_written(error))
            return False
        return True


class TemporaryFolder:
    """A folder beside those of other programs that goes with this process, or at the next start if it was killed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._alive = file_lock(self.path / ALIVE_FILE)
        self._alive.acquire()

    def remove(self) -> None:
        self._alive.release()
        self._folder.cleanup()


def remove_stale_folders() -> None:
    """Delete the temporary folders of processes that were killed; the system has let go of their locks.

    Those of an earlier version, which had no locks, and of other users stay.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError, Timeout):
            if not (folder / ALIVE_FILE).is_file() or time.time() - folder.stat().st_mtime < YOUNG_SEC:
                continue
            with file_lock(folder / ALIVE_FILE).acquire(blocking=False):
                files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
                size = sum(path.stat().st_size for path in files)
            shutil.rmtree(folder)
            log.info("removed %s (%.0f MB), left behind by a killed run", folder, size / 1e6)


# torchrun's processes leave without Python's own clean-up, see cli.leave.
_open_caches: weakref.WeakSet[DataCache] = weakref.WeakSet()


def remove_temporary_caches() -> None:
    """Delete the temporary folders of all caches of this process."""
    for cache in list(_open_caches):
        cache.remove_temporary()


def _canonical(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


def _entry_name(kind: str, settings: Settings) -> str:
    return f"{kind}/{hashlib.sha256(_canonical(settings).encode()).hexdigest()[:40]}.safetensors"


def _is_record(record: Any) -> bool:
    parts = [record.get("stamp"), record.get("notes")] if isinstance(record, dict) else [None]
    return all(isinstance(part, dict) for part in parts) and all(isinstance(x, int) for x in record["stamp"].values())
