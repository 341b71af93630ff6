"""Settings that a continued run has changed: named once, with the flags that keep what was before."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from selva.utils.settings import Setting, settings_of

log = logging.getLogger(__name__)


def warn_of_changes(
    saved: Path, before: Mapping[str, Any], now: Mapping[str, Any], config: type, free: Collection[str] = ()
) -> None:
    """Say in one warning which settings are others than before; without a change, or of what is not known, nothing.

    Args:
        saved: the state from which the run goes on.
        before, now: values by the names of the flags. Those of ``before`` may be texts, as JSON stores them.
        config: the dataclass that declares the settings. free: names of settings that every resume may change.
    """
    pairs = [(setting, _words(before[setting.name]), _words(now[setting.name])) for setting in settings_of(config)
             if setting.name in before and setting.name in now and setting.name not in free]
    changed = [pair for pair in pairs if pair[1] != pair[2]]
    if changed:
        log.warning("%s: goes on with other settings than before: %s. To keep what was before, give %s with --resume "
                    "(a resumed run takes its settings from the command line and --config, not from the saved step)",
                    saved, ", ".join(f"--{setting.name} was {was or 'not given'} and is {is_ or 'not given'}"
                                     for setting, was, is_ in changed),
                    " ".join(_flag(setting, was) for setting, was, _ in changed))


def _words(value: Any) -> str:
    """Return a value as a command line holds it, of a list or of its text too; nothing for None."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    text = "" if value is None else str(value)
    if text[:1] in ("[", "(") and text[-1:] in ("]", ")"):
        return text[1:-1].replace(", ", " ").rstrip(",")
    return "" if text == "None" else text


def _flag(setting: Setting, value: str) -> str:
    """Return the part of a command line that gives a setting this value."""
    if setting.kind is bool:
        return f"--{setting.name}" if value == "True" else f"no --{setting.name}"
    return f"--{setting.name} {value}" if value else f"no --{setting.name}"
