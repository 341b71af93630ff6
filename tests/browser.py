"""A look at a page in headless Chromium: does every player's source decode, and does text overflow?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

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
    for budget in (20_000, 200_000, 2_000_000, *[20_000_000] * 4):  # ms of its clock, which waits for no decoder
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
