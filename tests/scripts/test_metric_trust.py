"""The benchmark of the figures of an evaluation, at its smallest; which figure is good is not judged here."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import spoilt_sounds
import torch

from benchmarks import metric_trust
from selva.media import write_audio
from toyworld.judging import RATE, fit_classifier, timing
from toyworld.measure import single_cases


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two classes, short scenes, two levels."""
    for module in (metric_trust, spoilt_sounds):
        monkeypatch.setattr(module, "STRUCK", ("bell", "wood"))
        monkeypatch.setattr(module, "LEVELS", {"timing": (0.0, 0.3), "class": (0.0, 1.0), "noise": (-99.0, 0.0),
                                               "adapter": (0.0, 1.0)})
    monkeypatch.setattr(spoilt_sounds, "RESAMPLES", 20)
    monkeypatch.setattr(metric_trust, "DURATION_SEC", 3.0)
    monkeypatch.setattr(metric_trust, "CLASSIFIER", lambda: fit_classifier(count=3, names=("bell", "gong")))


def run(folder: Path, *options: str) -> int:
    return metric_trust.main(["--work", str(folder / "work"), "--document", str(folder / "page.md"), "--count", "1",
                              *options])


def test_parts_are_measured_kept_and_not_made_again(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "--only", "timing") == 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.flac")}
    assert len(stamps) == 2 * (1 + 1 + 2)  # reference, plain, two levels; of two scenes
    assert run(tmp_path, "--only", "timing", "noise", "class") == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    figures = json.loads((tmp_path / "work/metric_trust.json").read_text())
    assert set(figures) == {"timing", "noise", "class"}
    assert figures["timing"]["correlations"]["onset_f1"]["value"] > 0.8  # 300 ms late are heard
    assert figures["noise"]["correlations"]["log_spectral_distance_db"]["value"] > 0.8
    page = (tmp_path / "page.md").read_text()
    assert "time offset, 0 to 400 ms" in page and "adapter" not in page and page.count("| onset F1 |") == 2
    assert "4 sounds of 2 scenes" in page and page.strip() in capsys.readouterr().out


def test_the_adapter_part_goes_through_the_scripts_and_sorts_by_strength(tmp_path, monkeypatch):
    called = []

    def script(name, *arguments):
        called.append(Path(name).stem)
        words = list(map(str, arguments))
        if name == "infer.py":
            strength, out = float(words[words.index("--strength") + 1]), Path(words[words.index("--output") + 1])
            for path in (tmp_path / "work/gong/reference").glob("*.flac"):
                if strength == 1:
                    shutil.copy(path, Path(out, path.name)) if out.is_dir() else shutil.copytree(path.parent, out)
                else:
                    write_audio(out / path.name, torch.randn(3 * RATE) * 0.1, RATE)
        elif "--seed" in words:
            for case, number in zip(single_cases(["gong"], 3, 0, 3.0), (1, 2, 3), strict=True):
                place = tmp_path / "work/gong/reference" / f"gong_{number:03d}.flac"
                write_audio(place, torch.from_numpy(case.scene.sound(RATE)), RATE)
            (tmp_path / "work/gong/reference/prompts.txt").write_text("gong\n")

    monkeypatch.setattr(metric_trust, "_run", script)
    assert run(tmp_path, "--only", "adapter") == 0
    assert called == ["make_demo_clips", "extract_features", "train_lora", "make_demo_clips", "infer", "infer"]
    found = json.loads((tmp_path / "work/metric_trust.json").read_text())["adapter"]
    assert found["correlations"]["log_spectral_distance_db"]["value"] > 0.9 and found["sounds"] == 6
    assert found["recognised"][0] == 1
    assert "recognised as a gong" in (tmp_path / "page.md").read_text()


def test_sounds_are_wrong_by_what_is_said():
    (case,) = single_cases(["bell"], 1, 5, 8.0)
    events, sound = case.events(), case.scene.sound(RATE)
    for seconds in (0.2, -0.2):
        late = spoilt_sounds.shifted(sound, seconds)
        inside = [time + seconds for time in events if 0 < time + seconds < 7.8]
        assert len(late) == len(sound) and timing(late, inside).f1 > 0.9 > 0.5 > timing(late, events).f1
    noise = spoilt_sounds.noisy(sound, -20.0, 0) - sound
    ratio = 10 * math.log10(float(np.mean(noise**2) / np.mean(sound**2)))
    assert ratio == pytest.approx(-20, abs=0.3) and spoilt_sounds.noisy(sound, -99.0, 0) is sound
    count = len(events)
    for share in (0.0, 0.5, 1.0):
        assert len(spoilt_sounds.wrong_strokes(case, share)) == round(share * count)
        assert timing(spoilt_sounds.with_wrong_class(case, share), events).f1 > 0.7  # at the same moments
    classifier = fit_classifier(count=6, names=("bell", "wood"))
    heard = [classifier.classify(spoilt_sounds.with_wrong_class(case, share)) for share in (0.0, 1.0)]
    assert heard == ["bell", "wood"]


def test_rank_correlation_in_closed_form():
    a = np.arange(6.0)
    assert spoilt_sounds.spearman(a, np.exp(a)) == pytest.approx(1)
    assert spoilt_sounds.spearman(a, -(a**3)) == pytest.approx(-1)
    assert spoilt_sounds.ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1.0, 2.5]
    assert spoilt_sounds.spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)  # 1-6*2/60
    assert math.isnan(spoilt_sounds.spearman(a, np.ones(6)))


def test_a_higher_figure_that_is_better_counts_the_other_way_and_missing_ones_are_left_out():
    items = [(f"scene{i}", truth, {"onset_f1": 1 - truth, "onset_offset_sec": -truth if truth < 0.3 else None})
             for i in range(4) for truth in (0.1, 0.2, 0.3)]
    found = spoilt_sounds.correlation(items, "onset_f1")
    assert [found.value, found.low, found.high] == pytest.approx([1, 1, 1]) and found.items == 12
    offset = spoilt_sounds.correlation(items, "onset_offset_sec")  # its absolute value counts
    assert offset.value == pytest.approx(1) and offset.items == 8
