"""The best of a list of captions for a sound, by CLAP, and the cases in which nobody should trust it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from selva.evaluation.encoders import Clap
from selva.media.audio import SILENCE_LEVEL
from selva.utils.errors import UserError
from selva.utils.files import append_whole, json_lines
from selva.utils.text import listed, read_text, text_lines

log = logging.getLogger(__name__)

EXAMPLE = "laion/clap-htsat-unfused"


@dataclass(frozen=True)
class Choice:
    """The two captions that fit a sound best, with the cosines between sound and caption, in [-1, 1].

    Attributes:
        second: None where there is only one caption to choose from.
        is_silent: digital silence, which fits nothing.
    """

    caption: str
    score: float
    second: str | None = None
    second_score: float | None = None
    is_silent: bool = False

    def doubt(self, min_score: float, min_margin: float) -> str:
        """Return the reason why the choice is to be left to the user, "" if there is none."""
        if self.is_silent:
            return "it is silent"
        if self.score < min_score:
            return f"{self.caption!r} fits best, but only {self.score:.2f}, less than --min_score {min_score:g}"
        if self.second_score is not None and self.score - self.second_score < min_margin:
            return (f"{self.caption!r} {self.score:.2f} and {self.second!r} {self.second_score:.2f} fit nearly alike, "
                    f"by less than --min_margin {min_margin:g}")
        return ""


def read_labels(path: Path) -> list[str]:
    """Return the captions of a file, one a line; empty lines and those that begin with ``#`` and a space are left out.

    Raises:
        FileNotFoundError: no such file.
        UserError: no caption in it, or neither UTF-8 nor UTF-16 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--labels {path}: no such file")
    lines = [" ".join(line.split()) for line in text_lines(read_text(path))]
    found = [line for line in lines if line and not line.startswith("# ") and line != "#"]
    labels = list(dict.fromkeys(found))
    if not labels:
        raise UserError(f"--labels {path}: no captions in it, expected one a line")
    if len(labels) < len(found):
        twice = sorted({label for label in labels if found.count(label) > 1})
        log.warning("%s: given more than once, taken once: %s", path, listed(twice))
    return labels


def choose(sound: np.ndarray, captions: np.ndarray, labels: Sequence[str]) -> Choice:
    """Return the best two captions of a sound.

    Args:
        sound: (dim,) embedding. captions: (labels, dim) embeddings.
    """
    lengths = np.linalg.norm(captions, axis=1) * np.linalg.norm(sound)  # (labels,)
    scores = captions @ sound / lengths  # (labels,)
    order = np.argsort(-scores, kind="stable")
    best = int(order[0])
    if len(order) == 1:
        return Choice(labels[best], float(scores[best]))
    second = int(order[1])
    return Choice(labels[best], float(scores[best]), labels[second], float(scores[second]))


class LabelChooser:
    """Chooses a caption for each sound; what was chosen from these labels by this model before is remembered.

    Args:
        journal: file of the choices, to which lines are appended.
        identity: of the model.
    """

    def __init__(self, clap: Clap, labels: Sequence[str], journal: Path, identity: str) -> None:
        self.clap, self.labels, self.journal = clap, list(labels), journal
        self._recipe = hashlib.sha256(json.dumps([identity, self.labels]).encode()).hexdigest()
        self._known = {row["key"]: row for row in json_lines(journal) if isinstance(row.get("key"), str)}
        self._captions = np.stack([clap.text(label) for label in self.labels])  # (labels, dim)

    def known(self, content: str) -> Choice | None:
        """Return the choice for a sound of this hash if it was made before."""
        row = self._known.get(f"{self._recipe} {content}")
        try:
            return Choice(**row["choice"]) if row else None
        except (TypeError, LookupError):  # of another version
            return None

    def choose(self, sound: Tensor, content: str) -> Choice:
        """Return the choice for (samples,) at 48 kHz, and remember it under the hash of its file."""
        if not len(sound) or sound.abs().max().item() <= SILENCE_LEVEL:
            choice = Choice("", 0.0, is_silent=True)
        else:
            choice = choose(self.clap.sound(sound), self._captions, self.labels)
        line = json.dumps({"key": f"{self._recipe} {content}", "choice": vars(choice)}, ensure_ascii=False)
        append_whole(self.journal, f"{line}\n".encode())
        return choice
