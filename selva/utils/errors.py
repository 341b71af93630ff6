"""Errors that end a command in a way of their own."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of a user, such as a file or a setting that cannot be used: one line, exit code 1.

    The message says what was found, what was expected and what to do. Whatever else is raised is a defect of ours.
    """


class UsageError(UserError):
    """The command line or the settings file is wrong: exit code 2."""


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException, like KeyboardInterrupt, so that no handler for errors swallows it."""
