"""Log lines of the package on stderr."""

from __future__ import annotations

import logging
import os
import sys

from selva.utils.torchrun import is_main_process

COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}


class LineFormatter(logging.Formatter):
    """``message`` for news, ``warning: message`` for trouble; coloured on a terminal unless NO_COLOR is set."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        text = f"{record.levelname.lower()}: {text}"
        if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            return f"{COLOURS.get(record.levelno, '')}{text}\033[0m"
        return text


def setup_logging(debug: bool = False) -> None:
    """Send the package's log to stderr; processes other than rank 0 only report errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h.formatter, LineFormatter)] + [handler]
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if debug else logging.INFO
    logging.getLogger("selva").setLevel(level if is_main_process() else logging.ERROR)
