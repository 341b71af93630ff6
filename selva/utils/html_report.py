"""HTML pages that open from disk, with everything inside: players, spectrograms, curves, numbers.

The one builder for the pages of training, comparison, evaluation and the quickstart.

    page = Page("A new sound", "20 clips, 400 steps")
    page.cards([("recognised", "0 of 3 → 3 of 3", "")])
    page.section("Listen", "What the model makes of new videos.")
    page.sounds("gong_001", [ReportSound("before", "heard as: bell", video_file, sound, rate)], event_times=[0.8, 2.1])
    page.write(path)
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.metrics_log import MetricsFile
from selva.utils.plots import draw_losses, new_figure
from selva.utils.spectrogram import NUM_PIXELS, draw_levels, mel_levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { --text: #1d2127; --soft: #5d6672; --line: #d9dee5; --back: #ffffff; --card: #f5f7fa; --good: #1c7c54; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --soft: #9aa4b2; --line: #333b46; --back: #14181d; --card: #1d232b; --good: #5fd0a0; }
}
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
body, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 2rem; margin: 0; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; font-weight: 600; }
p { margin: .3rem 0 .8rem; color: var(--soft); max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: 1rem;
         margin: 1.8rem 0; }
.card { background: var(--card); border-radius: .6rem; padding: 1rem 1.2rem; }
.card .what { color: var(--soft); font-size: .85rem; }
.good { color: var(--good); }
.card .value { font-size: 1.45rem; font-weight: 650; margin: .15rem 0; }
.sounds { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: .6rem; overflow: hidden; }
figure video, figure img, figure audio { display: block; width: 100%; }
figure video { background: #000; max-height: 17rem; object-fit: contain; }
figcaption { padding: .6rem .9rem .8rem; font-size: .9rem; color: var(--soft); }
figcaption b { color: var(--text); font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); max-width: 26rem;
         overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 500; }
img.wide { width: 100%; max-width: 56rem; border-radius: .6rem; }
pre { background: var(--card); border-radius: .6rem; padding: 1rem 1.2rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""

_MIME = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".mkv": "video/x-matroska",
         ".flac": "audio/flac", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".png": "image/png"}


@dataclass(frozen=True)
class Media:
    """A sound or a video in the bytes of its file, and their MIME type."""

    content: bytes
    mime: str


@dataclass(frozen=True)
class ReportSound:
    """One sound of a clip.

    Attributes:
        label: what it is, e.g. "before". note: one line about it.
        media: what is played, a video or a sound: a file, or its content.
        waveform: (samples,) of its spectrogram. rate: samples per second.
    """

    label: str
    note: str
    media: Path | Media
    waveform: np.ndarray
    rate: int


class Page:
    """A page that is filled from top to bottom.

    Args:
        title, subtitle: at its top; all texts are plain and are escaped here.
        about: said in its head only, for programs.
    """

    def __init__(self, title: str, subtitle: str, about: str = "") -> None:
        self.title, self.about = title, about
        self._parts = [f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(subtitle)}</p>"]

    def section(self, heading: str, text: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(heading)}</h2>" + (f"\n<p>{html.escape(text)}</p>" if text else ""))

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Add the main numbers: (what, value, note) each."""
        items = "".join(
            f'<div class="card"><div class="what">{html.escape(what)}</div>'
            f'<div class="value">{html.escape(value)}</div><div class="what">{html.escape(note)}</div></div>\n'
            for what, value, note in cards
        )
        self._parts.append(f'<div class="cards">\n{items}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in rows)
        first = f"<tr>{head}</tr>\n" if any(header) else ""
        self._parts.append(f'<div class="scroll"><table>\n{first}{body}</table></div>')

    def sounds(self, heading: str, sounds: Sequence[ReportSound], event_times: Sequence[float] = ()) -> None:
        """Add the sounds of one clip side by side, each with its player and its spectrogram.

        Args:
            event_times: seconds, marked in the spectrograms.
        """
        figures = []
        for sound in sounds:
            picture = data_uri(spectrogram_png(sound.waveform, sound.rate, event_times), "image/png")
            figures.append(
                f"<figure>\n{_player(sound.media)}\n"
                f'<img src="{picture}" alt="spectrogram, {html.escape(sound.label, quote=True)}">\n'
                f"<figcaption><b>{html.escape(sound.label)}</b><br>{html.escape(sound.note)}</figcaption>\n</figure>"
            )
        joined = "\n".join(figures)
        self._parts.append(f'<h3>{html.escape(heading)}</h3>\n<div class="sounds">\n{joined}\n</div>')

    def image(self, png: bytes, description: str) -> None:
        """Add a picture over the whole width."""
        text = html.escape(description, quote=True)
        self._parts.append(f'<img class="wide" src="{data_uri(png, "image/png")}" alt="{text}">')

    def code(self, text: str) -> None:
        """Add lines to copy."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def write(self, path: Path) -> None:
        """Write the page; nothing in it refers to another file or to the network."""
        body = "\n\n".join(self._parts)
        about = f'<meta name="description" content="{html.escape(self.about, quote=True)}">\n' if self.about else ""
        atomic_write_text(
            path,
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"{about}<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n"
            "</html>\n",
        )


def is_page(path: Path, about: str, titled: str) -> bool:
    """Return True if a file is a page with these words in its head, see :class:`Page`.

    Args:
        titled: beginning of the title of a page of ours from before pages had such words.
    """
    with open(path, "rb") as file:
        head = file.read(len(_STYLE.encode()) + 4096).decode("utf-8", "replace")
    said = f'<meta name="description" content="{html.escape(about, quote=True)}">'
    return said in head or (f"<title>{html.escape(titled)}" in head and "figcaption b {" in head)


def data_uri(content: bytes, mime: str) -> str:
    """Return a URI that holds the content itself."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _player(media: Path | Media) -> str:
    if isinstance(media, Path):
        suffix = media.suffix.lower()
        if suffix not in _MIME:
            raise UserError(f"{media}: a page cannot play it, expected one of {', '.join(_MIME)}")
        media = Media(media.read_bytes(), _MIME[suffix])
    kind = "audio" if media.mime.startswith("audio") else "video"
    return f'<{kind} controls preload="metadata" src="{data_uri(media.content, media.mime)}"></{kind}>'


# ---------------------------------------------------------------------------------------------------------------
# pictures
# ---------------------------------------------------------------------------------------------------------------


def spectrogram_png(
    waveform: np.ndarray, rate: int, event_times: Sequence[float] = (), height_in: float = 1.9
) -> bytes:
    """Return a PNG of the spectrogram of (samples,), from -80 to -10 dB of full scale, with marked times."""
    import torch

    levels = mel_levels(torch.from_numpy(np.asarray(waveform, dtype=np.float64)), rate)
    figure = new_figure(4.4, height_in)
    axes = figure.subplots()
    draw_levels(axes, levels, len(waveform) / rate, rate, -10.0, size=7)
    axes.vlines(list(event_times), 0.9 * NUM_PIXELS, NUM_PIXELS, color="#7fffd4", linewidth=1.5)
    return _png(figure)


def loss_png(metrics: MetricsFile) -> bytes | None:
    """Return a PNG of training loss, smoothed, and validation loss over the steps; None if there is no loss yet."""
    if not metrics.series("loss")[0]:
        return None
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    draw_losses(axes, metrics, raw=True)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def curves_png(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], what: str) -> bytes:
    """Return a PNG of (label, steps, values) each as a line over the steps; ``what`` names the vertical axis."""
    figure = new_figure(8, 2.8)
    axes = figure.subplots()
    for label, steps, values in curves:
        axes.plot(steps, values, marker="o", markersize=3, linewidth=1.5, label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(what)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    """Return the figure as a PNG of 64 colours, a third of the bytes; spectrograms and curves look the same."""
    from PIL import Image

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    Image.open(drawn).convert("RGB").quantize(64).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
