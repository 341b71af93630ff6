"""Settings files: YAML with the names of flags, as arguments of a command line. Needs no PyTorch.

Every value goes through the flag's own type and choices, so a file can set nothing that the command line could not.
"""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from selva.utils.errors import UserError
from selva.utils.settings import Removed, Synonyms, removed_problems
from selva.utils.suggestions import did_you_mean, nearest
from selva.utils.text import counted
from selva.utils.yaml_file import parse_yaml, yaml_text

FOLDER_FILE = "selva.yaml"  # in the working folder: the settings that all scripts share
_REPR = reprlib.Repr()
_REPR.maxlevel = 2  # a few lines of YAML with aliases can stand for more text than fits into memory


def _short(value: Any) -> str:
    """Return a value for a message, in 100 characters or so."""
    return _REPR.repr(value)


class SettingsFile:
    """The settings in a file.

    Args:
        path: the file.
        name: what messages call it.
        fail: ends the program with a message; it does not return.
    """

    def __init__(self, path: Path, name: str, fail: Callable[[str], NoReturn]) -> None:
        import yaml

        self.name, self._fail = name, fail
        try:
            text = yaml_text(path, name)
            self.settings = parse_yaml(text, name) or {}
        except UserError as error:
            self._fail(str(error))
        self.written = yaml.load(text, yaml.BaseLoader)
        if not isinstance(self.settings, dict):
            self.fail(f"holds a {type(self.settings).__name__}, expected lines like `steps: 2000`")

    def fail(self, message: str) -> NoReturn:
        self._fail(f"{self.name}: {message}")

    def check_names(self, known: Collection[str], elsewhere: Mapping[str, str]) -> None:
        """Fail if there are settings that are none of ``known``, in a file that all scripts share."""
        names = {str(key).replace("-", "_"): str(key) for key in self.settings}
        if unknown := [key for name, key in names.items() if name not in known]:
            hints = (f"{key}{did_you_mean(nearest(key, known, elsewhere))}" for key in unknown)
            self.fail(f"unknown settings {'; '.join(hints)} (it takes what scripts share: {', '.join(known)}; others "
                      "go into a file that --config names)")

    def keep(self, names: Collection[str]) -> None:
        """Leave out all settings but these."""
        self.settings = {key: value for key, value in self.settings.items() if str(key).replace("-", "_") in names}

    def check_choices(self, flags: Mapping[str, argparse.Action]) -> None:
        """Fail if a value is none that this script takes; argparse would not say that it is from a file."""
        for key, value in self.settings.items():
            choices = flags[str(key).replace("-", "_")].choices
            if choices is not None and value is not None and value not in choices:
                self.fail(f"{key} is {_short(value)}, expected one of {', '.join(map(str, choices))}")

    def arguments(
        self, flags: Mapping[str, argparse.Action], elsewhere: Mapping[str, str], given: Sequence[str],
        removed: Mapping[str, Removed],
    ) -> tuple[list[str], dict[str, list]]:
        """Return the settings as arguments, to stand before those of a command line.

        Positional arguments have no place before others; they come back separately, with their values converted.

        Args:
            flags: {name: its flag}. elsewhere: names of other programs -> ours, for hints.
            given: the command line.
            removed: settings of earlier versions; where they are off, they are passed over.
        """
        if problems := removed_problems({str(key).replace("-", "_"): v for key, v in self.settings.items()}, removed):
            self.fail("; ".join(problems))
        self.keep({str(key).replace("-", "_") for key in self.settings} - removed.keys())
        unknown = [str(key) for key in self.settings if str(key).replace("-", "_") not in flags]
        if unknown:
            hints = (f"{key}{did_you_mean(nearest(key, flags, elsewhere))}" for key in unknown)
            self.fail(f"unknown settings {'; '.join(hints)}")
        self._check_given_once(flags)
        arguments: list[str] = []
        positionals: dict[str, list] = {}
        for key, value in self.settings.items():
            action = flags[str(key).replace("-", "_")]
            if not action.option_strings:
                if value is not None:
                    positionals[action.dest] = self._texts(action, value)
                continue
            collects = isinstance(action, argparse._AppendAction)  # the command line replaces, it does not add
            if value is None or (collects and any(o in given for o in action.option_strings)):
                continue
            self._check_values(action, value, self.written.get(key))
            arguments += self._as_arguments(action, value)
        return arguments, positionals

    def _check_given_once(self, flags: Mapping[str, argparse.Action]) -> None:
        """Fail if a setting is there under two of its names."""
        names: dict[str, str] = {}
        for key in map(str, self.settings):
            first = names.setdefault(flags[key.replace("-", "_")].dest, key)
            if first != key:
                self.fail(f"{first} and {key} are the same setting; give one of them")

    def _texts(self, action: argparse.Action, value: Any) -> list:
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in values):
            self.fail(f"{action.dest} is {_short(value)}, expected a text or a list of texts; put what looks like a "
                      "number, a date, yes or no between quotation marks")
        try:
            return [action.type(v) if callable(action.type) else v for v in values]
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.fail(f"{action.dest} is {_short(value)}: {error}")

    def _check_values(self, action: argparse.Action, value: Any, written: Any) -> None:
        """Fail if a value is no text, number or list of these, or if YAML made another text of it.

        Args:
            written: the same as texts, as they stand in the file.
        """
        values, texts = (x if isinstance(x, list) else [x] for x in (value, written))
        if any(v is None or isinstance(v, list | dict | set | bytes) for v in values):
            self.fail(f"{action.dest} is {_short(value)}, "
                      "expected a single value or a list of single values"
                      + (", none of them empty" if None in values else ""))
        if action.nargs == 0 or not (action.type in (None, str, Path) or isinstance(action.type, Synonyms)):
            return
        for v, text in zip(values, texts, strict=False):
            if not isinstance(v, str) and isinstance(text, str) and str(v) != text:  # 0777 is 511, and 1:30 is 90
                self.fail(f"{action.dest} is {text}, which YAML reads as {v}; put it between quotation marks")

    def _as_arguments(self, action: argparse.Action, value: Any) -> list[str]:
        flag = action.option_strings[0]
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                self.fail(f"{action.dest} is {_short(value)}, expected true or false")
            if isinstance(action, argparse.BooleanOptionalAction):
                return [flag if value else "--no_" + flag[2:]]
            return [flag] if value else []
        values = value if isinstance(value, list) else [value]
        if isinstance(action, argparse._AppendAction):
            return [f"{flag}={v}" for v in values]
        if action.nargs in ("+", "*") or len(values) == action.nargs:
            return [flag, *map(str, values)]
        if len(values) != 1 or isinstance(values[0], dict) or action.nargs is not None:
            expected = counted(action.nargs, "value") if isinstance(action.nargs, int) else "a single value"
            self.fail(f"{action.dest} is {_short(value)}, expected {expected}")
        return [f"{flag}={values[0]}"]
