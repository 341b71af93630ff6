"""Pairs in an output folder that the work list did not make: clips that are not in it any more, or fail now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from selva.extraction.manifest import DONE, Row
from selva.extraction.pairs import PairFolder
from selva.inputs.file_names import same_name
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)


def leftovers(folder: Path, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the ids of feature files that are not in the list of clips, and of those that are, but were not done."""
    states = {same_name(row["id"]): row["status"] for row in rows}
    found = {path.stem: states.get(same_name(path.stem)) for path in sorted(folder.glob("*.npz"))
             if not path.name.startswith(".")}
    return ([id_ for id_, status in found.items() if status is None],
            [id_ for id_, status in found.items() if status not in (None, DONE)])


def report_leftovers(pairs: PairFolder, rows: Sequence[Row], prune: bool) -> None:
    """Name the pairs that this work list did not make, or remove them.

    Args:
        rows: of the complete manifest. prune: remove them, but for what an extraction did not write.
    """
    unlisted, failed = leftovers(pairs.folder, rows)
    if prune:
        removed = [id_ for id_ in (*unlisted, *failed) if pairs.remove(id_)]
        if removed:
            log.warning("--prune: removed %s, not in the list or failed: %s", counted(len(removed), "clip"),
                        listed(removed))
        unlisted, failed = leftovers(pairs.folder, rows)
    kept = ", which --prune does not remove: features or sound are not by extract_features.py, or of an earlier version"
    advice = kept if prune else "; --prune removes them"
    if failed:
        log.warning("%s of an earlier run, failed or left out in this one, will be trained on%s: %s",
                    counted(len(failed), "clip"), advice, listed(failed))
    if unlisted:
        log.warning("%s of earlier runs in %s, not in this list, will be trained on%s: %s",
                    counted(len(unlisted), "clip"), pairs.folder, advice, listed(unlisted))
