"""Data sets with weights, as they are given on the command line: `folder` or `folder:3`; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.text import number_in


@dataclass(frozen=True)
class DataSource:
    """A data set and how often an epoch visits each of its clips.

    Attributes:
        weight: 3 is three times as often as 1; 0.5 visits another half of the clips in every epoch.
    """

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Return the source that ``folder`` or ``folder:weight`` names; a folder whose name ends so is itself.

        Raises:
            UserError: the weight is not a number above 0.
        """
        folder, colon, weight = text.rpartition(":")
        if not colon or not folder or Path(text).exists():
            return cls(Path(text))
        value = number_in(weight)
        if math.isnan(value) and weight != "nan":
            return cls(Path(text))  # C:\clips, or a folder that is not there
        if not 0 < value < math.inf:
            raise UserError(f"{text}: the weight is {weight}, expected a number above 0")
        return cls(Path(folder), value)


def parse_sources(texts: Iterable[str]) -> list[DataSource]:
    """Return the sources that the arguments of a flag name, see :meth:`DataSource.parse`.

    Raises:
        UserError: a weight is no number above 0, or a folder comes twice.
    """
    sources = [DataSource.parse(str(text)) for text in texts]
    seen: set[Path] = set()
    for source in sources:
        if real_path(source.path) in seen:
            raise UserError(f"{source.path}: is given twice; a weight does the same: {source.path}:2")
        seen.add(real_path(source.path))
    return sources


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a different name for every folder: its last part, or as many of its last parts as tell it from others."""
    parts = [real_path(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # one folder twice


def missing_folders(flag: str, sources: Sequence[DataSource]) -> list[str]:
    """Return a sentence for every source that is no folder."""
    return [f"{flag} {source.path}: {_missing(source.path)}" for source in sources if not source.path.is_dir()]


def _missing(path: Path) -> str:
    if not path.is_file():
        return "no such folder"
    folder = path.with_suffix("")
    meant = f"; give the memmap that it belongs to, {folder}" if (folder / "meta.json").is_file() else ""
    return f"is a file, expected a folder{meant}"
