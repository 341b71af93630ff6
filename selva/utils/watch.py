"""Watch over processes that train together: when one is gone, the others say which, and end.

Without it they would wait for hours at the next message that the missing one does not send. Every process shows life in
the store that they share, and looks for the others there.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from selva.utils.distributed import World

log = logging.getLogger(__name__)

PULSE_SEC, SILENCE_SEC = 3.0, 40.0
EXIT_FAILED = 1


@contextmanager
def watched(world: World, leave: Callable[[int], None] = os._exit) -> Iterator[None]:
    """Watch over the other processes while the block runs; end this one, with a message, when one of them is gone.

    A process that leaves the block by an error tells the others; one that is killed, or hangs as a whole, falls silent.

    Args:
        leave: ends the process at once, as it may hang in a message that will never come.
    """
    if world.size == 1:
        yield
        return
    watch = _Watch(world, leave)
    watch.start()
    try:
        yield
        world.wait()  # for those that still write, and may fail at that
    except BaseException as error:
        if _is_of_a_message(error):  # because somebody is gone: the watch says who, and ends this process
            log.error("a message between the processes failed (%s); looking for the one that is gone",
                      str(error).splitlines()[0])
            watch.wait()
        watch.tell(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    finally:
        watch.stop()


def _is_of_a_message(error: BaseException) -> bool:
    """Return True for an error of the communication: gloo raises a plain RuntimeError."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _Watch:
    """Thread that shows life and looks for that of the others."""

    def __init__(self, world: World, leave: Callable[[int], None]) -> None:
        self.world, self.leave = world, leave
        # A connection of its own: the one of the training may be waiting.
        self._store = world.store.clone() if hasattr(world.store, "clone") else world.store
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._store.set(self._key("host"), f"process {self.world.rank} on {socket.gethostname()}")
        self._thread.start()

    def wait(self) -> None:
        """Wait for as long as it takes to see that another process is gone."""
        self._thread.join(timeout=SILENCE_SEC + 4 * PULSE_SEC)

    def stop(self) -> None:
        """End the watch; this process is not missed any more."""
        self._ended.set()
        self._thread.join(timeout=5 * PULSE_SEC)
        with suppress(RuntimeError):  # the store is gone with the process that held it
            self._store.set(self._key("left"), "1")

    def tell(self, reason: str) -> None:
        """Tell the others that this process ends, and why."""
        with suppress(RuntimeError):
            name = f"process {self.world.rank} on {socket.gethostname()}"
            self._store.set("selva/watch/failed", f"{name} ended: {reason}")

    def _key(self, what: str, rank: int | None = None) -> str:
        return f"selva/watch/{self.world.rank if rank is None else rank}/{what}"

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        while not self._ended.wait(PULSE_SEC):
            try:
                problem = self._look(seen)
            except RuntimeError as error:
                problem = f"process 0, with the store that all share, is gone ({str(error).splitlines()[0]})"
            if problem and not self._ended.is_set():
                log.error("%s; process %d ends too. Start again with --resume auto", problem, self.world.rank)
                for stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        stream.flush()
                self.leave(EXIT_FAILED)
                return

    def _look(self, seen: dict[int, tuple[int, float]]) -> str | None:
        """Show life; return a sentence about a process that is gone, None if all are there."""
        self._store.add(self._key("pulse"), 1)
        if self._store.check(["selva/watch/failed"]):
            return self._store.get("selva/watch/failed").decode()
        for rank in range(self.world.size):
            if rank == self.world.rank or self._store.check([self._key("left", rank)]):
                continue
            pulse, now = self._store.add(self._key("pulse", rank), 0), time.monotonic()
            if pulse != seen.get(rank, (-1, 0.0))[0]:
                seen[rank] = (pulse, now)
            elif now - seen[rank][1] > SILENCE_SEC:
                known = self._store.check([self._key("host", rank)])
                name = self._store.get(self._key("host", rank)).decode() if known else f"process {rank}"
                return f"{name} has shown no life for {SILENCE_SEC:.0f} s"
        return None
