"""Log lines of the package on stderr."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from selva.utils.torchrun import is_main_process

log = logging.getLogger(__name__)

COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}


class LineFormatter(logging.Formatter):
    """``message`` for news, ``warning: message`` for trouble; coloured on a terminal unless NO_COLOR is set."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        text = f"{record.levelname.lower()}: {text}"
        if on_terminal() and "NO_COLOR" not in os.environ:
            return f"{COLOURS.get(record.levelno, '')}{text}\033[0m"
        return text


class LineHandler(logging.StreamHandler):
    """Handler that goes on where a line cannot be written: a log that nobody reads is no reason to stop."""

    def handleError(self, record: logging.LogRecord) -> None:
        ended = isinstance(sys.exc_info()[1], OSError)  # of a pipe, or of the room on a disk
        if not ended and not getattr(self.stream, "closed", False):
            super().handleError(record)


def on_terminal() -> bool:
    """Return True if stderr is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed by someone
        return False


class ResultStream:
    """Standard output whose reader may leave, as ``head`` does: the results are in files, so the work goes on.

    Everything else is that of the stream itself.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # the path of a file that this stream cannot name
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._nobody_reads(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._nobody_reads(error)

    def _nobody_reads(self, error: OSError) -> None:
        """Let what is written from now on vanish, what is still in the buffer too: it could not be written either.

        Raises:
            OSError: the error, if it is another one than a reader who left, such as a full disk.
        """
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        # Windows has no error of its own for it.
        if not isinstance(error, BrokenPipeError) and not (os.name == "nt" and error.errno == errno.EINVAL):
            raise error
        log.info("the reader of the output has gone (a closed pipe); the work goes on")


@contextlib.contextmanager
def results_on_stdout() -> Iterator[None]:
    """Let the work in this block go on when the reader of standard output leaves; flush what was printed at its end.

    Raises:
        OSError: what was printed cannot be written for another reason.
    """
    stream = sys.stdout
    results = ResultStream(stream)
    sys.stdout = results  # pyright: ignore[reportAttributeAccessIssue]  -- all that print() needs
    try:
        yield
        results.flush()
    except BaseException:  # --help ends in one
        with contextlib.suppress(OSError, ValueError):  # nothing may hide the error; a closed stream is a ValueError
            results.flush()
        raise
    finally:
        if sys.stdout is results:
            sys.stdout = stream


def open_missing_streams() -> None:
    """Put the null device where stdin, stdout or stderr was closed by whoever started the process.

    Otherwise the next file to be opened takes such a number, and what a library prints ends up in that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 -- stays open to the end


def setup_logging(debug: bool = False) -> None:
    """Send the package's log to stderr; processes other than rank 0 only report errors."""
    open_missing_streams()
    handler = LineHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h.formatter, LineFormatter)] + [handler]
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if debug else logging.INFO
    logging.getLogger("selva").setLevel(level if is_main_process() else logging.ERROR)
