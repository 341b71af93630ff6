"""Request to stop a run, by Ctrl-C or SIGTERM, so that it can be continued."""

from __future__ import annotations

import logging
import signal
from typing import Any

from selva.utils.errors import Terminated

log = logging.getLogger(__name__)


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.signal = number
        log.warning("stopping after this step and saving; once more stops at once")
