"""The page about a run: whole, by itself, and safe from what people type."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from selva.utils.html_report import Page, ReportSound, loss_png, spectrogram_png
from selva.utils.metrics_log import MetricsFile

PNG = b"\x89PNG\r\n\x1a\n"


class Checker(HTMLParser):
    """Counts elements, and fails on tags that do not close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.counts, self.sources = [], {}, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page_text(tmp_path):
    video, sound = tmp_path / "a.mp4", tmp_path / "a.flac"
    video.write_bytes(b"video")
    sound.write_bytes(b"sound")
    page = Page("Gong <1>", "a & b")
    page.cards([("what", "0 → 1", 'a "note"')])
    page.section("<Listen>", "now")
    tone = np.sin(np.arange(16_000) / 5).astype(np.float32)
    sounds = [ReportSound("before", "x<y", video, tone, 16_000), ReportSound("after", "", sound, tone, 16_000)]
    page.sounds("clip", sounds, [0.5])
    page.table(("a", "b"), [("1", "<script>")])
    page.image(PNG, "loss")
    page.code("python x > y")
    page.write(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_holds_everything_itself(page_text):
    checker = Checker(page_text)
    assert [checker.counts[tag] for tag in ("video", "audio", "img", "figure")] == [1, 1, 3, 2]
    assert len(checker.sources) == 5 and all(source.startswith("data:") for source in checker.sources)
    video = next(source for source in checker.sources if source.startswith("data:video/mp4"))
    assert base64.b64decode(video.split(",")[1]) == b"video"
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page_text)
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures)


def test_texts_cannot_become_markup(page_text):
    assert "<script>" not in page_text and "&lt;script&gt;" in page_text
    assert "<h2>&lt;Listen&gt;</h2>" in page_text
    assert "<title>Gong &lt;1&gt;</title>" in page_text and "x&lt;y" in page_text and "python x &gt; y" in page_text


def test_a_file_that_cannot_be_played_is_refused(tmp_path):
    (tmp_path / "a.avi").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.avi: a page cannot play it"):
        Page("t", "s").sounds("c", [ReportSound("x", "", tmp_path / "a.avi", np.zeros(1600), 16_000)])


def test_spectrograms_show_sound_and_marks(tmp_path):
    import io

    from PIL import Image

    def pixels(sound, marks=()):
        return np.asarray(Image.open(io.BytesIO(spectrogram_png(sound, 16_000, marks))).convert("RGB")).astype(int)

    silent = pixels(np.zeros(16_000))
    for hz, is_low in ((300, True), (4000, False)):  # on a mel axis
        tone = pixels(np.sin(2 * np.pi * hz / 16_000 * np.arange(16_000)))
        rows = np.abs(tone - silent).sum(axis=(1, 2))
        assert bool(rows.argmax() > 0.5 * len(rows)) is is_low
    assert np.abs(pixels(np.zeros(16_000), [0.5]) - silent).max() > 100


def test_the_loss_picture_needs_a_loss():
    metrics = MetricsFile()
    assert loss_png(metrics) is None
    metrics.append([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val_loss": 1.5}])
    picture = loss_png(metrics)
    assert picture is not None and picture.startswith(PNG)
