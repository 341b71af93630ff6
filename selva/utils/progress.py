"""Progress bars, for a terminal or another program, and seconds per stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from selva.utils.logging import on_terminal
from selva.utils.text import clock
from selva.utils.torchrun import is_main_process

log = logging.getLogger(__name__)

Watcher = Callable[[str, int, int], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher of progress", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell a program around this one how far everything in the block is.

    Args:
        watcher: called with what is done, the number of finished items, and of all; what it raises ends the work.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Progress:
    """Progress of ``total`` items on stderr: a bar on a terminal, else a plain line every ``interval_sec`` seconds.

    The watcher of :func:`watched`, if there is one, is told too.
    """

    def __init__(self, total: int, what: str, unit: str = "it", interval_sec: float = 10.0) -> None:
        self.total, self.what, self.unit, self.interval_sec = total, what, unit, interval_sec
        self.done, self.start = 0, time.monotonic()
        self._last_line = self.start
        self._bar = None
        if on_terminal() and is_main_process():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True)

    def update(self, done: int, note: str = "") -> None:
        """Set the number of finished items; ``note`` stands behind the bar or the line."""
        step, self.done = done - self.done, done
        if (watcher := _watcher.get()) is not None:
            watcher(self.what, done, self.total)
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(step)
            except OSError:  # the terminal is gone
                self._bar = None
        elif time.monotonic() - self._last_line >= self.interval_sec and is_main_process():
            self._last_line = time.monotonic()
            seconds = self._last_line - self.start
            eta = seconds / max(done, 1) * (self.total - done)
            log.info("%s %d/%d %s, %.2g %s/s, %s left %s", self.what, done, self.total, self.unit, done / seconds,
                     self.unit, clock(eta), note)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class StageTimes:
    """Seconds spent in each named stage, in the order in which they were first entered; ``str()`` lists them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for ``name``; blocks may repeat, but not nest."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {f'{s:.1f} s' if s < 60 else clock(s)}" for name, s in self.seconds.items())
