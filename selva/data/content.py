"""Content of the clips that a run is trained on, to be compared when it is continued.

Names alone say little: a file may hold another sound, another prompt or another stretch than before. A step file
therefore stores a few hashes of every clip, and what has changed can be named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from selva.data.dataset import ClipDataset
from selva.utils.text import listed

# What is compared, and the words for it. The sound is the same where its file or its latents are: the tags of a file
# may change, and another device computes other latents.
ASPECTS = ("features", "sound", "latents", "prompt", "windows")
WORDS = {"features": "other features", "sound": "another sound", "prompt": "another prompt",
         "windows": "another length or other windows (--duration)"}
NAMED = 5  # clips of one kind in a message


def content_state(clips: ClipDataset) -> dict[str, Any]:
    """Return the names of clips and (clips, aspects) int64 hashes of their content, 0 where it is unknown."""
    rows = [[_number(content.get(aspect, "")) for aspect in ASPECTS]
            for content in (clips.content(index) for index in range(len(clips)))]
    hashes = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(ASPECTS))
    return {"ids": list(clips.ids), "aspects": list(ASPECTS), "hashes": hashes}


def joined(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of :func:`content_state` of two sets as that of both."""
    assert one["aspects"] == two["aspects"]
    return {**one, "ids": [*one["ids"], *two["ids"]], "hashes": torch.cat((one["hashes"], two["hashes"]))}


def content_changes(before: Mapping[str, Any], now: Mapping[str, Any], order: bool = True) -> list[str]:
    """Return one text for every kind of difference between two results of :func:`content_state`, with the clips.

    Args:
        order: another order of the same clips is a difference.
    """
    old, new = (dict(zip(state["ids"], _rows(state), strict=True)) for state in (before, now))
    changes = [
        ("new", [name for name in new if name not in old]),
        ("gone", [name for name in old if name not in new]),
    ]
    changed: dict[str, list[str]] = {aspect: [] for aspect in WORDS}
    for name, row in new.items():
        for aspect in _different(old.get(name, row), row):
            changed[aspect].append(name)
    changes += [(WORDS[aspect], names) for aspect, names in changed.items()]
    found = [f"{what}: {listed(names, NAMED)}" for what, names in changes if names]
    if order and not found and before["ids"] != now["ids"]:
        found.append("the same clips in another order or number")
    return found


def _different(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    different = [name for name in ASPECTS if before.get(name) and now.get(name) and before[name] != now[name]]
    if "sound" in different and "latents" not in different and before.get("latents") and now.get("latents"):
        different.remove("sound")
    return [name for name in different if name in WORDS]


def _rows(state: Mapping[str, Any]) -> Sequence[dict[str, int]]:
    return [dict(zip(state["aspects"], row, strict=True)) for row in state["hashes"].tolist()]


def _number(text: str) -> int:
    """Return 63 bits of a hash of a text, never 0; 0 for an empty one."""
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1 or 1
