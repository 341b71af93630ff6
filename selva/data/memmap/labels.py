"""Texts that MMAudio's reader takes for missing values: it reads the table of a memmap with pandas and its defaults.

A label that is empty, or ``None``, ``null``, ``NA`` ..., arrives there as a NaN, at which its trainer stops. So a table
never holds one, be it as an id or as a label.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from selva.utils.errors import UserError
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

# pandas.read_csv, parameter na_values; "" and "None" included.
MISSING_THERE = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
))
NAMED = 5  # clips in a message


def is_missing_there(text: str) -> bool:
    """Return True for a text that MMAudio's reader takes for no value at all."""
    return text in MISSING_THERE


def labels_or_fallback(rows: Iterable[tuple[str, str]], folder_name: str) -> list[str]:
    """Return the label of every (id, label); the folder's name, and a word in the log, where MMAudio cannot read it.

    Raises:
        ValueError: a name is needed, and that of the folder cannot be read either.
    """
    rows = list(rows)
    without = [(clip_id, label) for clip_id, label in rows if is_missing_there(label)]
    if not without:
        return [label for _, label in rows]
    named = listed([f"{clip_id} ({label!r})" for clip_id, label in without], NAMED)
    if is_missing_there(folder_name):
        raise UserError(f"these clips have no label that MMAudio can read: {named}; give them prompts (--prompt, "
                        f"prompts.txt), or the output folder another name than {folder_name!r}")
    log.warning("no prompt, or none that MMAudio can read, so the folder's name, %r, is the prompt: %d of %s: %s",
                folder_name, len(without), counted(len(rows), "clip"), named)
    return [folder_name if is_missing_there(label) else label for _, label in rows]


def check_table(rows: Sequence[tuple[str, str]], folder: object) -> None:
    """Raise where a table would hold a text that MMAudio's reader takes for missing.

    Args:
        folder: of the memmap, for the message.

    Raises:
        ValueError: names the ids, or the clips whose label it is.
    """
    if ids := sorted({clip_id for clip_id, _ in rows if is_missing_there(clip_id)}):
        raise UserError(f"{folder}: MMAudio's reader takes the ids {listed([repr(i) for i in ids], NAMED)} for missing "
                        "values; rename these clips")
    if bad := [f"{clip_id} ({label!r})" for clip_id, label in rows if is_missing_there(label)]:
        raise UserError(f"{folder}: MMAudio's reader takes the labels of these clips for missing values: "
                        f"{listed(bad, NAMED)}; give them a prompt")
