"""Errors that end a command in a way of their own."""

from __future__ import annotations


class UsageError(ValueError):
    """The command line or the settings file is wrong: exit code 2."""


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException, like KeyboardInterrupt, so that no handler for errors swallows it."""
