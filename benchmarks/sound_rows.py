"""Rows of `soundbench.py`: one JSON line per run, added to by any number of processes; and intervals over runs.

A run has outcomes of single scenes, so an interval holds what both cause: the choice of scenes, and that of sounds,
clips and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selva.utils.errors import UserError
from selva.utils.files import append_whole
from selva.utils.lock import file_lock

Row = Mapping[str, Any]
LEVEL, RESAMPLES = 0.95, 4000


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none where there is no file.

    Raises:
        UserError: a line is no JSON; names it.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON ({error}); repair or remove it") from error
    return rows


def append_row(path: Path, row: Row) -> bool:
    """Append a row, whole or not at all; return False where there is one of that key already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f".{path.name}.lock")):
        if any(other["key"] == row["key"] for other in read_rows(path)):
            return False
        append_whole(path, (json.dumps(row, separators=(",", ":")) + "\n").encode())
    return True


# -- intervals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % interval; they are None where there is nothing to tell them from."""

    mean: float
    low: float | None
    high: float | None

    def excludes(self, value: float) -> bool:
        """Return True if ``value`` lies outside; False without bounds."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def interval(groups: Sequence[Sequence[float]]) -> Interval:
    """Return the mean over groups of the means in them, with its percentile bootstrap interval.

    Groups are drawn with replacement and then values in each, as there are two sources of chance (Davison and
    Hinkley, 1997, section 3.8). One group alone gives the interval of its values; a single value has none.

    Args:
        groups: for every run the outcomes of its scenes, or its one figure.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not arrays:
        return Interval(float("nan"), None, None)
    mean = float(np.mean([array.mean() for array in arrays]))
    if len(arrays) == 1 and len(arrays[0]) == 1:
        return Interval(mean, None, None)
    rng = np.random.default_rng(0)
    inside = np.stack([  # (groups, RESAMPLES) means of every group, drawn anew each time
        array[rng.integers(len(array), size=(RESAMPLES, len(array)))].mean(axis=1) for array in arrays
    ])
    chosen = rng.integers(len(arrays), size=(len(arrays), RESAMPLES))
    means = inside[chosen, np.arange(RESAMPLES)].mean(axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def hits(part: Row) -> list[float]:
    """Return 1 for every scene that was recognised and 0 for the others."""
    return [float(one == "1") for one in part["hits"]]


def scenes_of_all(row: Row, part: str) -> int:
    """Return the number of scenes, the first ones, that judge every checkpoint of a row."""
    return min(len(one[part]["hits"]) for one in row["checkpoints"])


def steps_to(row: Row, share: float = 0.9) -> int | None:
    """Return the step of the first checkpoint with this share of the new scenes recognised; None if there is none.

    Of the last checkpoint too, only the scenes count that judge those before it.
    """
    count = scenes_of_all(row, "new")
    return next((one["step"] for one in row["checkpoints"] if sum(hits(one["new"])[:count]) >= share * count), None)


def compared(rows: Iterable[Row], references: Iterable[Row], values: Callable[[Row], Sequence[float]]) -> Interval:
    """Return by how much a method is above its reference, scene by scene, over the cells that both have."""
    ours, theirs = ({cell_of(row): values(row) for row in some} for some in (rows, references))
    common = sorted(ours.keys() & theirs.keys())
    return interval([np.subtract(ours[cell], theirs[cell]).tolist() for cell in common])


def cell_of(row: Row) -> tuple[Any, ...]:
    """Return the place of a row in the table."""
    return row["scenes"], row["sound"], row["clips"], row["seed"]
