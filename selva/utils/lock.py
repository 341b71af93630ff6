"""Locks between processes: of a folder, by a file that says who holds it; of a file, even where systems have none."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from selva.utils.errors import UserError

log = logging.getLogger(__name__)

POLL_SEC = 0.2
_CANNOT_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_LOCKED_BYTE = 1 << 30  # Windows keeps others from reading a locked byte; this one lies far behind the text


class FolderInUse(UserError):
    """Another process holds the lock of a folder."""


class FolderLock:
    """Lock of a folder that one process at a time may change: a file with ``process 123 on HOST since TIME``.

    To be used in a ``with`` statement.

    The operating system lets go of the lock when its process ends, however that happens, so the lock of a dead process
    is taken over. Whether a process of another host is alive cannot be seen from here: its lock counts as held as long
    as its file is there.

    Args:
        path: the lock file; its folder is made if need be and, where nothing else has come into it, removed again.
        what: what the process does with the folder, for messages: "trains", "encodes".
        wait: wait for the other process and say so, instead of raising; the lock of another host is then passed over.

    Raises:
        FolderInUse: on entering, another process holds it.
        OSError: on entering, the folder or the file cannot be written.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self.path, self.what, self.wait = path, what, wait
        self._descriptor: int | None = None
        self._made: list[Path] = []  # folders, the innermost first

    def __enter__(self) -> FolderLock:
        self._make_folder()
        try:
            said = False
            while not self._try():
                if not self.wait:
                    raise FolderInUse(self._in_use())
                if not said:
                    log.warning("%s: %s, which %s here; waiting until it has finished", self.path.parent,
                                self._owner() or "another process", self.what)
                    said = True
                time.sleep(POLL_SEC)
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        assert self._descriptor is not None
        if os.name == "nt":  # an open file cannot be deleted there
            os.close(self._descriptor)
            self.path.unlink(missing_ok=True)
        else:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
        self._descriptor = None
        self._remove_made()

    def _try(self) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor) or not self._is_still_there(descriptor):
                os.close(descriptor)
                return False
            before = os.read(descriptor, 1000).decode("utf-8", "replace").strip()
            if before and not self._is_of_this_host(before):
                if not self.wait:
                    raise FolderInUse(self._in_use())
                log.warning("%s: was left by %s; going on", self.path, before)
            elif before:
                log.warning("%s: was left by %s, which is no longer there; taken over", self.path, before)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.ftruncate(descriptor, 0)
            _write_owner(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _is_still_there(self, descriptor: int) -> bool:
        """Return False where the process that held the lock has deleted the file since it was opened."""
        try:
            return os.name == "nt" or os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    @staticmethod
    def _is_of_this_host(owner: str) -> bool:
        return f" on {socket.gethostname()} since " in owner or " since " not in owner  # cut text: killed while writing

    def _owner(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def _in_use(self) -> str:
        owner = self._owner()
        where = "" if self._is_of_this_host(owner) else (
            f" It is another machine's: if that process is no longer there, delete {self.path}.")
        return (f"{self.path.parent}: in use by {owner or 'another process'}, which {self.what} here; wait until it "
                f"has finished, stop it, or choose another folder.{where}")

    def _make_folder(self) -> None:
        folder = self.path.parent
        self._made = []
        while not folder.exists() and folder != folder.parent:
            self._made.append(folder)
            folder = folder.parent
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _remove_made(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something is in it now
                return


def _write_owner(descriptor: int) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    try:
        os.write(descriptor, text.encode())
    except OSError as error:  # a full disk: the lock holds without its text
        log.debug("the text of a lock was not written: %s", error)


def _lock(descriptor: int) -> bool:
    """Return True if the open file is locked for this process now, False if another one has it."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError) as error:  # a file system without locks, or a Python without the module for them
        log.warning("there are no locks here (%s): do not start another process in the same folder", error)
    return True


def file_lock(path: str | os.PathLike[str]) -> BaseFileLock:
    """Return a lock that is not held yet; the threads of a process share it. Its folder has to exist.

    The system lets go of it however a process ends. Some network file systems have no such locks: there a file that
    exists is the lock, and what a killed process leaves has to be deleted by hand where it is not noticed.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return lock
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _CANNOT_LOCK:
            raise
        soft = Path(f"{path}.soft")
        log.warning("%s: this file system cannot lock files; the file %s is the lock instead. If a run was killed and "
                    "the next one waits, delete it", Path(path).parent, soft.name)
        return SoftFileLock(soft, thread_local=False)
    lock.release()
    return lock
