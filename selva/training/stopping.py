"""Request to stop a run, by Ctrl-C, SIGTERM or a closed terminal (SIGHUP), so that it can be continued."""

from __future__ import annotations

import logging
import signal
from typing import Any

from selva.utils.errors import Terminated

log = logging.getLogger(__name__)


class StopRequest:
    """Turns the first of these signals into a request to stop after the current step; a second one stops at once.

    Of several processes all stop together, after the next step.

    SIGHUP counts where the system has it and nobody ignores it: under ``nohup`` a run outlives its terminal.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
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
