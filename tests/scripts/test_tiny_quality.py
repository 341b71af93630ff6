"""The benchmark of the built-in model, at its smallest; what it says of the model is not judged here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import tiny_quality
from benchmarks.tiny_tables import BEGIN_MARK, TITLE, figures_text
from selva.utils.document import END_MARK, with_block
from selva.weights.load import load_generator
from toyworld import measure
from toyworld.judging import Classifier, fit_classifier


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two classes, short scenes, a quickly fitted classifier."""
    classes = {name: tiny_quality.CLASSES[name] for name in ("bell", "rain")}
    for module in (tiny_quality, measure):
        monkeypatch.setattr(module, "CLASSES", classes)
    monkeypatch.setattr(tiny_quality, "fit_classifier", measure_classifier)
    monkeypatch.setattr(tiny_quality, "DURATION_SEC", 2.0)


def measure_classifier():
    return fit_classifier(count=3, names=("bell", "rain", "gong"))


def run(tmp_path, *options: str) -> int:
    return tiny_quality.main([
        "--output", str(tmp_path / "figures.json"), "--document", str(tmp_path / "model.md"), "--count", "1",
        "--num_steps", "1", "--device", "cpu", *options,
    ])


def test_parts_are_measured_and_kept(tmp_path, capsys):
    assert run(tmp_path, "--only", "base") == 0
    assert run(tmp_path, "--only", "selection") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"base", "selection"}
    base = figures["base"]
    assert base["scenes"] == 2 and base["true_sound"]["timing_f1"] > 0.9 and base["true_sound"]["class_accuracy"] == 1
    assert set(base["classes"]) == {"bell", "rain"}
    assert figures["selection"]["scenes"] == 3
    text = (tmp_path / "model.md").read_text()
    assert "## Timing and class" in text and "## Selection" in text and "| true sound" not in text
    assert text.count("the true sound itself") == 1
    assert str(tmp_path / "model.md") in capsys.readouterr().out


def test_a_generator_of_ones_own_is_measured_and_the_page_of_the_shipped_one_stays(tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    page = tiny_quality.ROOT / "docs" / "tiny_model.md"
    before, own = page.read_bytes(), tmp_path / "mine.safetensors"
    save_file(tiny_quality.random_generator(load_generator("tiny_16k")).state_dict(), own)
    monkeypatch.chdir(tmp_path)
    small = ["--only", "base", "--count", "1", "--num_steps", "1", "--device", "cpu"]
    assert tiny_quality.main([*small, "--generator", str(own)]) == 0
    base = json.loads((tmp_path / "tiny_quality_mine.json").read_text())["base"]
    assert base["generated"] == base["random_weights"]  # which are the same weights, and the same noise
    assert page.read_bytes() == before and "## Timing and class" in capsys.readouterr().out
    assert tiny_quality.main([*small, "--generator", "nowhere.pth"]) == 2


@pytest.mark.slow
def test_a_whole_generator_is_taught_beside_an_adapter(tmp_path):
    for name, text in {"lora": "steps: 2\nbatch_size: 2\npreview: false\n", "base": "steps: 2\nbatch_size: 2\n"
                       "sample_every: 0\nclip_features: empty\nhold_out: 0\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert run(tmp_path, "--only", "finetuning", "--sounds", "gong", "--clips", "2", "--preset",
               str(tmp_path / "lora.yaml"), "--finetune", str(tmp_path / "base.yaml")) == 0
    rows = json.loads((tmp_path / "figures.json").read_text())["finetuning"]
    assert set(rows) == {"gong, adapter", "gong, whole generator"}
    assert rows["gong, adapter"]["before"]["timing_f1"] >= 0 and rows["gong, whole generator"]["size_bytes"] > 10**7
    assert rows["gong, adapter"]["size_bytes"] < rows["gong, whole generator"]["size_bytes"]
    assert "| gong, whole generator |" in (tmp_path / "model.md").read_text()


def test_the_random_generator_has_the_scale_but_not_the_weights_of_the_real_one():
    like = load_generator("tiny_16k")
    other = tiny_quality.random_generator(like)
    torch.testing.assert_close(other.latent_std, like.latent_std)
    torch.testing.assert_close(other.latent_mean, like.latent_mean)
    assert not torch.equal(other.final_layer.conv.weight, like.final_layer.conv.weight)


def test_margins_are_of_the_right_class():
    class Scores(Classifier):
        def scores(self, sound):
            return np.array([3.0, 1.0])

    class QualityBench(tiny_quality.QualityBench):
        def __init__(self) -> None:
            self.classifier = Scores(("bell", "rain"), np.zeros((2, 80)), np.eye(80))

    cases = measure.single_cases(["bell", "rain"], 1, 0, 2.0)
    assert tiny_quality.margins([np.zeros(1)] * 2, cases, QualityBench()) == [2.0, -2.0]


FIGURES = {
    "selection": {"scenes": 4, "f1_named": 0.8, "f1_other": 0.2, "difference": 0.6, "class_accuracy": 0.75},
    "guidance": {
        "scenes": 4, "strengths": {"4.5": {"timing_f1": 0.8, "class_accuracy": 0.9, "margin": 12.0}},
        "negative_scenes": 2,
        "negative": {"with": {"avoided": 0.1, "other": 0.8, "sounds_like_avoided": 0.0}},
    },
}


def updated_document(text: str, figures: dict) -> str:
    return with_block(text or TITLE, BEGIN_MARK, figures_text(figures))


def test_the_document_keeps_what_people_wrote():
    first = updated_document("# Title\n\nWritten by hand.\n", {"selection": FIGURES["selection"]})
    assert first.startswith("# Title\n\nWritten by hand.\n\n" + BEGIN_MARK) and "| 0.80 | 0.20 | 0.60 | 75 % |" in first
    more = first + "\nAfterwards.\n"
    second = updated_document(more, FIGURES)
    assert second.startswith("# Title\n\nWritten by hand.\n\n") and second.endswith(f"{END_MARK}\n\nAfterwards.\n")
    assert second.count(BEGIN_MARK) == 1 and "| 4.5 | 0.80 | 90 % | 12 |" in second
    assert updated_document(second, FIGURES) == second
    assert updated_document("", FIGURES).startswith("# tiny_16k")
    assert "Timing and class" not in figures_text(FIGURES)  # what was not measured is not there
