"""``metrics.jsonl``: the numbers of a run, one row per step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selva.utils.files import atomic_write_text

log = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with a ``step``; appended to, and cut back when resuming.

    Args:
        path: the file; None keeps the rows in memory only (processes other than rank 0).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._tensorboard = None
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.rows.append(json.loads(line))
                except (json.JSONDecodeError, RecursionError):
                    log.warning("%s: dropped an unfinished line", path)  # the process was killed while writing it

    def cut_after(self, step: int) -> None:
        """Forget the rows of steps after ``step``, which a resumed run will write again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        assert self.path is not None
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows.extend(rows)
        if self._tensorboard is not None:
            for row in rows:
                for key, value in row.items():
                    if isinstance(value, float):
                        self._tensorboard.add_scalar(key, value, row["step"])
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def mirror_to_tensorboard(self, folder: Path) -> None:
        """Write every number that is appended from now on to event files in ``folder`` too.

        Raises:
            ValueError: the package ``tensorboard`` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"--tensorboard: {error}; install it with `pip install tensorboard`") from error
        self._tensorboard = SummaryWriter(str(folder))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of the rows that have a finite ``key``."""
        rows = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        return [row["step"] for row in rows], [row[key] for row in rows]


def smoothed(values: Sequence[float], decay: float = 0.98) -> list[float]:
    """Return the exponential moving average, corrected for its start so that the first value is not overweighted."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(average / weight)
    return result
