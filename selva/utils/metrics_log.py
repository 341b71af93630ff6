"""``metrics.jsonl``: the numbers of a run, one row per step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selva.utils.errors import UserError
from selva.utils.files import append_whole, atomic_write_text, why_not_written

log = logging.getLogger(__name__)

SET_LOSS = "val_loss/"  # before the name of a data set: the loss of its held-out clips


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with a ``step``; appended to, and cut back when resuming.

    A number that is not finite is ``null`` in the file, as JSON knows no NaN; files that hold NaN are read too. Rows
    that cannot be written, on a full disk for example, are kept in memory and written with later ones.

    Args:
        path: the file; None keeps the rows in memory only (processes other than rank 0).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._unwritten = 0  # rows at the end that are not in the file yet
        self._rewrite = False  # the file holds other rows than the first ones
        self._warned = False
        self._tensorboard = None
        self.listener: Callable[[Sequence[dict[str, Any]]], None] | None = None  # gets all rows that are appended
        if path is not None and path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                        raise UserError
                except (ValueError, RecursionError):
                    log.warning("%s: dropped an unfinished line", path)  # the process was killed while writing it
                    self._rewrite = True
                else:
                    self.rows.append(row)

    @property
    def last_step(self) -> int:
        """The highest step that a row is of; 0 without rows."""
        return max((row["step"] for row in self.rows), default=0)

    def cut_after(self, step: int) -> None:
        """Forget the rows of steps after ``step``, which a resumed run will write again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._rewrite = True
        self.flush()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows.extend(rows)
        self._unwritten += len(rows)
        if self.listener is not None:
            self.listener(rows)
        if self._tensorboard is not None:
            try:
                for row in rows:
                    for key, value in row.items():
                        if isinstance(value, float):
                            self._tensorboard.add_scalar(key, value, row["step"])
            except OSError as error:
                log.error("the curves for TensorBoard end at step %d: %s", rows[-1]["step"], why_not_written(error))
                self._tensorboard = None
        self.flush()

    def flush(self) -> bool:
        """Write what is not in the file yet; return False, and say so once, if it cannot be written now."""
        if self.path is None:
            return True
        try:
            if self._rewrite:
                atomic_write_text(self.path, _lines(self.rows))
            elif self._unwritten:
                append_whole(self.path, _lines(self.rows[-self._unwritten :]).encode("utf-8"))
        except OSError as error:
            if not self._warned:
                log.error("%s: not written, %s; its rows are kept in memory until they can be written", self.path,
                          why_not_written(error))
            self._warned = True
            return False
        self._rewrite, self._unwritten, self._warned = False, 0, False
        return True

    def mirror_to_tensorboard(self, folder: Path, purge_step: int | None = None) -> None:
        """Write every number that is appended from now on to event files in ``folder`` too.

        Args:
            purge_step: what event files of before hold from this step on is no longer shown.

        Raises:
            ValueError: the package ``tensorboard`` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"--tensorboard: {error}; install it with `pip install tensorboard`") from error
        self._tensorboard = SummaryWriter(str(folder), purge_step=purge_step)

    def set_losses(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return the series of the losses of each data set's held-out clips, by its name; {} where there is one set."""
        keys = dict.fromkeys(key for row in self.rows for key in row if key.startswith(SET_LOSS))
        return {key.removeprefix(SET_LOSS): self.series(key) for key in keys}

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of the rows that have a finite ``key``."""
        rows = [row for row in self.rows if row.get(key) is not None and math.isfinite(row[key])]
        return [row["step"] for row in rows], [row[key] for row in rows]


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def _finite(value: Any) -> Any:
    """Return ``value`` with None in place of every number that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def smoothed(values: Sequence[float], decay: float = 0.98) -> list[float]:
    """Return the exponential moving average, corrected for its start so that the first value is not overweighted."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(average / weight)
    return result
