"""selva.partition.captioning.labels: the best of a list of captions, doubts, and choices that are remembered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selva.partition.captioning.labels import Choice, LabelChooser, choose, read_labels
from selva.utils.errors import UserError


def test_the_best_two_captions_are_found_by_their_cosines():
    captions = np.array([[0.0, 2.0], [3.0, 3.0], [5.0, 0.0]])  # 90, 45 and 0 degrees
    found = choose(np.array([0.5, 0.0]), captions, ["a bell", "a gong", "a dog"])
    assert (found.caption, found.second) == ("a dog", "a gong")
    assert found.score == pytest.approx(1.0) and found.second_score == pytest.approx(0.5**0.5)
    assert choose(np.array([1.0, 0.0]), captions[:1], ["a bell"]).second is None


@pytest.mark.parametrize(
    ("choice", "doubt"),
    [
        (Choice("a dog", 0.4, "a fox", 0.3), ""),
        (Choice("a dog", 0.1, "a fox", -0.3), "'a dog' fits best, but only 0.10, less than --min_score 0.2"),
        (Choice("a dog", 0.4, "a fox", 0.37), "'a dog' 0.40 and 'a fox' 0.37 fit nearly alike, by less than "
                                              "--min_margin 0.05"),
        (Choice("a dog", 0.4), ""),
        (Choice("", 0.0, is_silent=True), "it is silent"),
    ],
)
def test_doubts_are_explained(choice, doubt):
    assert choice.doubt(0.2, 0.05) == doubt


def test_labels_are_lines(tmp_path, caplog):
    path = tmp_path / "labels.txt"
    path.write_text("# of the garden\na dog  barks\n\n#2 starts\na bird\na dog barks\n")
    assert read_labels(path) == ["a dog barks", "#2 starts", "a bird"]
    assert "taken once: a dog barks" in caplog.text
    path.write_text("# nothing\n\n")
    with pytest.raises(UserError, match=r"labels\.txt: no captions in it"):
        read_labels(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_labels(tmp_path / "no.txt")


class Ears:
    """In place of CLAP: the embedding of a sound is its first two samples."""

    def __init__(self) -> None:
        self.heard = 0

    def text(self, caption):
        return np.array([1.0, 0.0] if caption == "left" else [0.0, 1.0])

    def sound(self, sound):
        self.heard += 1
        return sound[:2].numpy()


def test_choices_are_remembered_as_long_as_labels_and_model_are_the_same(tmp_path):
    ears, sound = Ears(), torch.tensor([3.0, 4.0])

    def chooser(labels=("left", "right"), identity="a"):
        return LabelChooser(ears, labels, tmp_path / "choices.jsonl", identity)  # type: ignore[arg-type]

    assert chooser().known("hash") is None
    first = chooser().choose(sound, "hash")
    assert (first.caption, first.score, first.second_score) == ("right", pytest.approx(0.8), pytest.approx(0.6))
    assert chooser().known("hash") == first and ears.heard == 1
    assert chooser().known("another") is None
    assert chooser(identity="b").known("hash") is None
    assert chooser(labels=("left", "right", "above")).known("hash") is None


def test_silence_is_not_listened_to(tmp_path):
    ears = Ears()
    assert LabelChooser(ears, ["left"], tmp_path / "c", "a").choose(torch.zeros(9), "h").is_silent  # type: ignore[arg-type]
    assert ears.heard == 0
