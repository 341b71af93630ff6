"""The report script on folders as the quickstart leaves them."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

from scripts import make_demo_clips, make_report
from selva.media import mux_video, write_audio
from selva.utils.html_report import Page


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, two new clips of a gong, noise as the sound before, the true sound as the sound after."""
    root = tmp_path_factory.mktemp("quickstart")
    true = root / "true"
    assert make_demo_clips.main(["--out", str(true), "--count", "2", "--size", "64", "--duration", "4"]) == 0
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(64_000).astype(np.float32) * 0.05)
    (root / "before").mkdir()
    shutil.copytree(true, root / "after")
    for video in true.glob("*.mp4"):
        mux_video(video, noise, 16_000, root / "before" / video.name)
    (root / "run").mkdir()
    (root / "run" / "meta.json").write_text(json.dumps({"variant": "tiny_16k", "rank": 16}))
    rows = [{"step": step, "loss": 1 / step, "sec_per_step": 2.0} for step in (1, 2, 3)]
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def report(root, *options: str) -> int:
    return make_report.main([
        "--run", str(root / "run"), "--before", str(root / "before"), "--after", str(root / "after"),
        "--output", str(root / "report.html"), *options,
    ])


def test_the_page_says_what_changed(folders, monkeypatch, capsys):
    monkeypatch.setattr(make_report, "FIT_COUNT", 6)
    assert report(folders, "--true", str(folders / "true"), "--title", "A gong") == 0
    assert capsys.readouterr().out.strip() == str(folders / "report.html")
    page = (folders / "report.html").read_text(encoding="utf-8")
    assert "recognised as gong" in page and "0 of 2 → 2 of 2" in page
    found = re.search(r"(\d\.\d\d) → (\d\.\d\d)", page)
    assert found is not None
    before, after = map(float, found.groups())
    assert before < 0.5 and after > 0.9
    assert page.count("<video") == 6 and "3 steps in 6 s" in page and "<h1>A gong</h1>" in page
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)


def test_without_truth_there_are_no_verdicts(folders, capsys):
    assert report(folders) == 0
    page = (folders / "report.html").read_text(encoding="utf-8")
    assert "heard as" not in page and page.count("<video") == 4


def test_sounds_without_videos_are_played_too(folders, tmp_path):
    root = tmp_path / "sounds"
    shutil.copytree(folders / "run", root / "run")
    for name in ("before", "after"):
        write_audio(root / name / "a.flac", torch.randn(16_000) * 0.1, 16_000)
    assert report(root) == 0
    assert (root / "report.html").read_text(encoding="utf-8").count("<audio") == 2


def test_clips_of_one_folder_only_are_named_with_the_reason(folders, tmp_path, capsys):
    root = shutil.copytree(folders, tmp_path / "copy")
    (root / "after" / "gong_002.mp4").unlink()
    (root / "after" / "gong_002.flac").unlink()
    (root / "after" / "manifest.jsonl").write_text(json.dumps({"id": "gong_002", "status": "failed",
                                                               "reason": "out of memory"}))
    shutil.copy(root / "after" / "gong_001.mp4", root / "after" / "late.mp4")
    assert report(root) == 0
    said, page = capsys.readouterr().err, (root / "report.html").read_text(encoding="utf-8")
    assert f"gong_002: left out, not in {root / 'after'}: out of memory" in said
    assert f"late: left out, not in {root / 'before'}" in said
    assert "<h2>Left out</h2>" in page and "1 clip is compared" in page and "out of memory" in page


def test_damaged_settings_beside_a_sound_do_not_end_the_page(folders, tmp_path, capsys):
    root = shutil.copytree(folders, tmp_path / "copy")
    (root / "after" / "gong_001.yaml").write_text("prompt: [")
    (root / "run" / "adapter_final.pt").write_bytes(b"an adapter")
    assert report(root) == 0
    assert "gong_001.yaml: cannot be read as YAML" in capsys.readouterr().err


def test_no_other_file_is_replaced(folders, tmp_path, capsys):
    root = shutil.copytree(folders, tmp_path / "copy")
    (root / "notes.html").write_text("<!doctype html><p>mine")
    for name, told in (("notes.html", "was not written by this program; it is kept"),
                       ("prompts.txt", "expected a name that ends in .html")):
        assert report(root, "--output", str(root / name)) == 2
        assert told in capsys.readouterr().err
    assert (root / "notes.html").read_text() == "<!doctype html><p>mine"
    for _ in range(2):  # its own page is made anew
        assert report(root, "--output", str(root / "page.html")) == 0


@pytest.mark.parametrize(("title", "code"), [("tiny_16k learns a new sound: gong", 0), ("Gongs of mine", 2)])
def test_the_page_of_an_earlier_quickstart_is_replaced(folders, tmp_path, title, code):
    """Pages did not say what they are then; a person's of that time is not taken for one."""
    root = shutil.copytree(folders, tmp_path / "copy")
    Page(title, "tiny_16k").write(root / "page.html")
    assert report(root, "--output", str(root / "page.html")) == code


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "run" / "meta.json").unlink(), "meta.json: no such file"),
        (lambda root: shutil.rmtree(root / "after"), "no such folder"),
        (lambda root: [p.unlink() for p in (root / "before").iterdir()], "no clip of the same name"),
        (lambda root: (root / "true" / "events.tsv").write_text("id\tsound\ngong_001\tgong\n"), "not an events.tsv"),
    ],
)
def test_what_is_missing_is_named(folders, tmp_path, capsys, spoil, words):
    root = shutil.copytree(folders, tmp_path / "copy")
    spoil(root)
    assert report(root, "--true", str(root / "true")) == 1
    assert words in capsys.readouterr().err
