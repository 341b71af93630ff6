"""Ways in which a training is done that are no settings: a run goes on in those in which it was begun."""

from __future__ import annotations

import zlib

from selva.checkpoint import TrainingState

# Ways of this version that a step file records. A run that was begun in another way goes on in that one.
WAYS = {"split": "by set, none whole", "dropout": "by step", "prompts": "one of all"}
WAYS_BEFORE = {"split": "by clip", "dropout": "by random state", "prompts": "the last"}  # where none is recorded
SPLITS_BY_SET = ("by set", WAYS["split"])  # the first might hold out all clips of a small set


def dropout_seed(seed: int, rank: int, step: int) -> int:
    """Return the seed of the dropout masks of one step in one process, so that they need no random state of before."""
    return zlib.crc32(f"dropout {seed} {rank} {step}".encode())


def ways_of(saved: TrainingState) -> dict[str, str]:
    """Return the ways of a run that is continued; those of this version for one of another program's."""
    return {**WAYS_BEFORE, **saved.extra.get("ways", {})} if saved.extra else dict(WAYS)
