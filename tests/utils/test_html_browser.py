"""Pages in a real browser, headless Chromium: every player has a source that decodes, and no text overflows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from selva.evaluation.page_sound import page_sound
from selva.utils.html_report import Media, Page, ReportSound, curves_png

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

# Runs inside the page: decodes every source, and lists elements whose content is wider than they are.
PROBE = """<script>
window.addEventListener("load", async () => {
  const found = {players: 0, broken: [], overflowing: []};
  for (const player of document.querySelectorAll("audio, video")) {
    found.players += 1;
    try {
      const bytes = Uint8Array.from(atob(player.src.split(",")[1]), c => c.charCodeAt(0)).buffer;
      const sound = await new OfflineAudioContext(1, 1, 48000).decodeAudioData(bytes);
      if (!(sound.duration > 0.5)) found.broken.push("empty");
    } catch (error) { found.broken.push(String(error)); }
  }
  for (const image of document.images) if (!image.naturalWidth) found.broken.push("image " + image.alt);
  for (const element of document.querySelectorAll("html, h1, h2, h3, p, pre, figcaption, .card, td, th"))
    if (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display != "inline")
      found.overflowing.push(element.tagName + ": " + element.textContent.slice(0, 40));
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found);
  document.body.appendChild(out);
});
</script>"""


def look_at(page: Path, folder: Path, width: int) -> dict:
    """Return what the probe found in a copy of a page, and leave a screenshot of the page in ``folder``."""
    text = page.read_text(encoding="utf-8")
    probed = folder / "probed.html"
    probed.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    options = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               f"--window-size={width},1200"]
    found = None
    for budget in (20_000, 200_000, 2_000_000, 20_000_000):  # ms of its own clock, which does not wait for decoders
        dump = subprocess.run([*options, f"--virtual-time-budget={budget}", "--dump-dom", probed.as_uri()],
                              capture_output=True, text=True, timeout=120, check=True).stdout
        found = re.search(r'<pre id="found">(.*?)</pre>', dump, re.DOTALL)
        if found is not None:
            break
    picture = folder / f"screenshot_{width}.png"
    subprocess.run([*options, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 10_000
    assert found is not None, "the probe did not come to its end"
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


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
