"""Names that a mistyped or foreign name may have been meant for: "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

MOST = 3  # suggestions; more would be a list of everything


def nearest(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> list[str]:
    """Return the known names that ``name`` may stand for, the most likely first; none if nothing is near.

    Near is what is spelled almost the same, what begins with ``name`` (``cfg``, ``cfg_strength``), and what holds it as
    a word.

    Args:
        elsewhere: what other programs call something similar -> the known name.
    """
    known, name = list(known), name.lower().replace("-", "_")
    found = [elsewhere[name]] if elsewhere and name in elsewhere else []
    begins = [one for one in known if one.startswith(f"{name}_") or name.startswith(f"{one}_")]
    words = [one for one in known if name in one.split("_")]
    return list(dict.fromkeys([*found, *begins, *difflib.get_close_matches(name, known, MOST, 0.7), *words]))[:MOST]


def did_you_mean(names: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean --a or --b?` for the end of a message, "" without names."""
    names = [prefix + name for name in names]
    return f"; did you mean {' or '.join(names)}?" if names else ""
