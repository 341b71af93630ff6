"""Pages in a real browser, headless Chromium: every player has a source that decodes, and no text overflows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from browser import BROWSER, look_at

from selva.evaluation.page_sound import page_sound
from selva.utils.html_report import Media, Page, ReportSound, curves_png

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def page_of(folder: Path, sounds: list[ReportSound]) -> Path:
    page = Page("A very_long_name_without_any_space_" * 4, "two sounds")
    page.cards([("verdict", "hardly any effect", "--a_flag_that_is_long " * 4), ("loss", "0.123 → 0.456", "")])
    page.section("Listen", "a/path/that/goes/on/and/on/" * 8)
    page.sounds("clip_" * 40, sounds)
    page.table(("a", "b"), [("x" * 200, "1"), ("y", "2")])
    page.image(curves_png([("loss", [1, 2], [1.0, 0.5])], "loss"), "a curve")
    page.code("python infer.py " + "--option value " * 20)
    page.write(folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("width", [500, 1280])
def test_everything_plays_and_nothing_overflows(tmp_path, width):
    tone = torch.sin(torch.arange(16_000) / 5) * 0.3
    page = page_of(tmp_path, [page_sound(label, "a note", tone, 16_000) for label in ("before", "after", "recorded")])
    found = look_at(page, tmp_path, width)
    assert found == {"players": 3, "broken": [], "overflowing": []}


def test_the_probe_sees_what_is_broken(tmp_path):
    tone = np.zeros(16_000, np.float32)
    page = page_of(tmp_path, [ReportSound("x", "", Media(b"no sound", "audio/mpeg"), tone, 16_000)])
    page.write_text(page.read_text(encoding="utf-8").replace("overflow-wrap: anywhere;", ""), encoding="utf-8")
    found = look_at(page, tmp_path, 500)
    assert len(found["broken"]) == 1 and any(text.startswith("H1") for text in found["overflowing"])
