"""Files whose final name never holds half of them, and hashes of their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from selva.utils.errors import UsageError, UserError

PARTIAL_PREFIX = ".partial-"  # folders that hold an unfinished file; one that outlives its process can be deleted
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # for a folder; VirtualBox shares, AFS, gocryptfs


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; leaving the block moves the file written there onto ``path``.

    The data are on the disk before the rename, so after a power cut ``path`` holds the old file or the new one. If the
    block raises, or the process is interrupted inside it, ``path`` is untouched and what was written is removed.

    The temporary file has the final name, because writers (soundfile, matplotlib, NumPy) choose the format by it, and
    lies in a hidden folder beside ``path``: after a SIGKILL, a listing of ``*.npz`` does not meet the remains.

    The block must write exactly this one file and close it. The folder of ``path`` is created.

    Raises:
        FileNotFoundError: the block ended without writing the file.
        IsADirectoryError: ``path`` is a folder.
        OSError: names ``path``, for a full disk too.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file of that name was to be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        flush_file(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        if error.errno is None or (error.filename is not None and not str(error.filename).startswith(str(folder))):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # "No space left on device" names no file
    finally:
        _remove_partial(folder)


def _remove_partial(folder: Path) -> None:
    """Remove the hidden folder of a temporary file, empty by now if all went well; no error of it hides another one.

    ``shutil.rmtree`` that Ctrl-C or an alarm interrupts may close a descriptor twice: its "Bad file descriptor" would
    take the place of the interruption.
    """
    try:
        folder.rmdir()
    except OSError:  # the block raised, and left a part of its file
        with suppress(OSError):
            shutil.rmtree(folder)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all; line ends are kept as they are in ``text``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_utf8(text))


def as_utf8(text: str) -> bytes:
    r"""Return a text as UTF-8; what a path holds that is none, on disks from before it, is written as ``\udce9``.

    JSON reads that back as it was, so it finds the file again.
    """
    return text.encode("utf-8", "backslashreplace")


def sound_path(path: str | os.PathLike[str]) -> Any:
    """Return a path as soundfile takes it: text, or bytes, which its types do not name, where it is not UTF-8."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


@contextmanager
def native_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the path of a file to be read as libraries in C++ and Rust take it, which have to be given UTF-8.

    That of a file whose name or folder is not UTF-8 is the one of its descriptor, which is open as long as this lasts;
    such names are there on Linux only.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with open(name, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield name


def append_whole(path: Path, content: bytes) -> None:
    """Append ``content`` to a file, whole or not at all: where it does not fit, the file is cut back to what it was."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest):]
        except OSError:
            file.truncate(size)
            raise


def next_aside(folder: Path) -> Path:
    """Return the first of ``previous_001`` (002, ...) that a folder lacks, for files that others will replace."""
    number = 1
    while (aside := folder / f"previous_{number:03d}").exists():
        number += 1
    return aside


def check_own_output(flag: str, path: Path, suffix: str, is_ours: Callable[[Path], bool]) -> None:
    """Raise if a file that is to be written has another ending, or would replace one that the program did not write.

    Args:
        flag: that names the file, for messages. is_ours: tells the files of the program from others of that ending.

    Raises:
        UsageError: with what to do.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(f"{flag} {path}: ends in {path.suffix or 'nothing'}, expected a name that ends in {suffix}")
    if path.is_file() and not is_ours(path):
        raise UsageError(f"{flag} {path}: is there already, and was not written by this program; it is kept. Name "
                         "another file, or move it away")


def why_not_written(error: OSError) -> str:
    """Return the reason why a file could not be written, in words."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = error.strerror or str(error) or type(error).__name__
    return f"the disk is full ({reason})" if full else reason


def check_can_write(folder: Path) -> None:
    """Raise if no file could be made in ``folder``, or in the nearest of the folders above that exists; leaves nothing.

    Raises:
        ValueError: names the folder and the reason.
    """
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {why_not_written(error)}; choose another folder") from error


def flush_file(path: Path) -> None:
    """Write the content of a file through to the disk."""
    # Opened for update, because Windows cannot flush a file that is open for reading only.
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can: Windows opens no folder, some file systems flush none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links; other than ``Path.resolve``, a link that leads to itself ends nothing."""
    return Path(os.path.realpath(path))


def source_hash(path: Path) -> str:
    """Return the SHA-256 of a file's whole content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def status_hash(paths: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and times of those of the files that exist; none of them is read."""
    status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths) if path.is_file()]
    return hashlib.sha256(repr(status).encode()).hexdigest()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in the lines of a file; an unfinished one counts as not written."""
    if not path.is_file():
        return []
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                lines.append(content)
    return lines
