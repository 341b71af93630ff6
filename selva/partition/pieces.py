"""Files that a program has written beside those of the user, remembered so that what others have put there stays."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from selva.media import read_audio
from selva.utils.files import real_path, source_hash

log = logging.getLogger(__name__)


class WrittenFiles:
    """Hashes of the files that a program has written to a folder, so that it never replaces another or an edited one.

    A journal beside the folder, to which several processes may append: ``.<folder>.<kind>.jsonl``.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.journal = real_path(folder).with_name(f".{real_path(folder).name}.{kind}.jsonl")
        self._hashes: dict[str, str] = {}
        lines = self.journal.read_bytes().splitlines() if self.journal.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
                self._hashes[str(row["file"])] = str(row["sha256"])
            except (ValueError, TypeError, LookupError, RecursionError):  # half a line of a killed process
                continue

    def is_known(self, path: Path) -> bool:
        """Return True if a file of this name was written here, whatever has become of it."""
        return path.is_file() and path.name in self._hashes

    def is_as_written(self, path: Path) -> bool:
        """Return True if a file is there as :meth:`add` has seen it."""
        return self.is_known(path) and self._hashes[path.name] == source_hash(path)

    def may_write(self, path: Path) -> bool:
        """Return True if nothing of anybody else would be lost by writing this file."""
        return not (path.exists() or path.is_symlink()) or self.is_as_written(path)

    def add(self, path: Path) -> None:
        """Remember a file as it is now."""
        self._hashes[path.name] = source_hash(path)
        line = json.dumps({"file": path.name, "sha256": self._hashes[path.name]}) + "\n"
        try:
            with open(self.journal, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            log.warning("%s: cannot be written (%s); a later run will not replace %s", self.journal, error, path)


class WrittenPieces(WrittenFiles):
    """The files that were written to a folder of pieces: ``.<folder>.pieces.jsonl``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pieces")

    def check_replaceable(self, path: Path) -> None:
        """Raise if a file is there that is not as :meth:`add` has seen it, nor the damaged rest of such a sound.

        Raises:
            FileExistsError: with what to do.
        """
        if not self.may_write(path) and not (self.is_known(path) and path.suffix == ".flac" and _is_damaged(path)):
            raise FileExistsError(f"{path} holds something else and is not, or no longer, what partition_clips.py has "
                                  "written; it is left as it is. Move it away, or choose another folder for the clips")


def _is_damaged(path: Path) -> bool:
    try:
        read_audio(path)
    except (ValueError, OSError):
        return True
    return False
