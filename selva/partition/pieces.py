"""Files that a partition has written for its clips, remembered so that what others have put there stays."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from selva.media import read_audio
from selva.utils.files import real_path, source_hash

log = logging.getLogger(__name__)


class WrittenPieces:
    """Hashes of the files that were written to a folder of pieces, so that no other file is ever replaced.

    A journal beside the folder, to which several processes may append: ``.<folder>.pieces.jsonl``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = real_path(folder).with_name(f".{real_path(folder).name}.pieces.jsonl")
        self._hashes: dict[str, str] = {}
        lines = self.journal.read_bytes().splitlines() if self.journal.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
                self._hashes[str(row["file"])] = str(row["sha256"])
            except (ValueError, TypeError, LookupError, RecursionError):  # half a line of a killed process
                continue

    def check_replaceable(self, path: Path) -> None:
        """Raise if a file is there that is not as :meth:`add` has seen it, nor the damaged rest of such a sound.

        Raises:
            FileExistsError: with what to do.
        """
        if not path.exists() and not path.is_symlink():
            return
        known = self._hashes.get(path.name) if path.is_file() else None
        if known is None or (known != source_hash(path) and not (path.suffix == ".flac" and _is_damaged(path))):
            raise FileExistsError(f"{path}: partition_clips.py did not write it, or it was changed since; it is kept. "
                                  "Move it away, or choose another folder for the clips")

    def add(self, path: Path) -> None:
        """Remember a file as it is now."""
        self._hashes[path.name] = source_hash(path)
        line = json.dumps({"file": path.name, "sha256": self._hashes[path.name]}) + "\n"
        try:
            with open(self.journal, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            log.warning("%s: cannot be written (%s); a later run will not replace %s", self.journal, error, path)


def _is_damaged(path: Path) -> bool:
    try:
        read_audio(path)
    except (ValueError, OSError):
        return True
    return False
