"""Results computed once per data folder and kept in ``<data_dir>/.selva_cache``, so that the next run starts at once.

    latents/<key>.safetensors  texts/<key>.safetensors    tensors; the key is a hash of everything that decides them
    files.json                                            file name -> size, times, inode, and facts found out about it

Nothing in it is ever needed: entries that are missing, damaged or made with other settings are made again, and the
folder can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selva.utils.files import atomic_path, atomic_write_text, source_hash
from selva.utils.torch_files import READ_ERRORS

log = logging.getLogger(__name__)

CACHE_FOLDER = ".selva_cache"
FILES_FILE = "files.json"
# A file may change again within one tick of its time stamp and look the same; what is younger is read every time.
SETTLED_NS = 2_000_000_000
BASIC_STAMP = {"size", "mtime_ns"}  # what every version has written

Settings = Mapping[str, Any]  # anything that JSON can hold; equal settings mean equal content


class DataCache:
    """The cache of one data folder; a temporary folder holds entries that cannot be written there.

    Args:
        data_dir: whose cache; a read-only one is read from and left as it is.
        enabled: False keeps everything in the temporary folder, which is deleted at the end of the process.
    """

    def __init__(self, data_dir: Path, enabled: bool = True) -> None:
        self.folder = data_dir / CACHE_FOLDER if enabled else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._writable_folder = self.folder  # None once it cannot be written to
        self._files = self._read_files()
        self._files_changed = False

    # -- tensors -------------------------------------------------------------------------------------------------------

    def load(self, kind: str, settings: Settings) -> dict[str, Tensor] | None:
        """Return the tensors that were saved with exactly these settings; None if they have to be made (again)."""
        for folder in self._folders():
            path = folder / _entry_name(kind, settings)
            if not path.is_file():
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    stored = (file.metadata() or {}).get("settings")
                    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, *READ_ERRORS) as error:
                log.warning("%s: damaged (%s), made again", path, error)
                continue
            if stored == _canonical(settings) and all(bool(torch.isfinite(x).all()) for x in tensors.values()):
                return tensors
            log.warning("%s: does not hold what its name says, made again", path)
        return None

    def save(self, kind: str, settings: Settings, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under these settings, whole or not at all."""
        def write(folder: Path) -> None:
            with atomic_path(folder / _entry_name(kind, settings)) as temporary:
                contiguous = {name: x.contiguous() for name, x in tensors.items()}
                save_file(contiguous, temporary, metadata={"settings": _canonical(settings)})

        self._write(write)

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
            text = json.dumps(self._files, indent=0, sort_keys=True)
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
        temporary = Path(self._temporary.name) if self._temporary is not None else None
        return [folder for folder in (temporary, self.folder) if folder is not None]

    def _write(self, write: Callable[[Path], None]) -> None:
        """Call ``write`` with the folder to write to; once the data folder refuses, always with the temporary one."""
        if self._writable_folder is not None:
            try:
                write(self._writable_folder)
                return
            except OSError as error:
                self._writable_folder = None
                log.warning("%s: cannot be written (%s); latents are kept in a temporary folder and will be made again "
                            "in the next run", self.folder, error)
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="selva_cache_")
        write(Path(self._temporary.name))


def _canonical(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


def _entry_name(kind: str, settings: Settings) -> str:
    return f"{kind}/{hashlib.sha256(_canonical(settings).encode()).hexdigest()[:40]}.safetensors"


def _is_record(record: Any) -> bool:
    parts = [record.get("stamp"), record.get("notes")] if isinstance(record, dict) else [None]
    return all(isinstance(part, dict) for part in parts) and all(isinstance(x, int) for x in record["stamp"].values())
