"""Locks between processes, on file systems that cannot lock files too."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

_CANNOT_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


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
