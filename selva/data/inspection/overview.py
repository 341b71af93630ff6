"""One picture of a data set: of every clip its frames, its spectrogram and its waveform, on one time axis."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.audio.config import SILENCE_DB
from selva.audio.silence import block_power
from selva.data.folder import MANIFEST_FILE
from selva.data.inspection.measures import ClipReport, Inspection, find_variant
from selva.data.inspection.report import PNG_TITLE, fit, sign_of, summary
from selva.features import load_features
from selva.inputs.suffixes import VIDEO_SUFFIXES
from selva.media import probe, read_audio, read_video
from selva.sequence import CLIP_FPS, SHORTEST_SEC
from selva.utils.errors import UserError
from selva.utils.files import atomic_path, json_lines, real_path, source_hash
from selva.utils.plots import BLUE, GREY, INK, RED, new_figure
from selva.utils.spectrogram import draw_levels, mel_levels

log = logging.getLogger(__name__)

COLUMN_IN, STRIP_IN, SPECTRUM_IN, WAVE_IN, TITLE_IN = 5.2, 0.62, 1.05, 0.38, 0.5  # inches
DOTS_PER_IN = 130
Found = tuple[Path, float]  # a video, and the second at which a clip of it begins
TILE_PIXELS = 96  # height of a frame
COLOURS = {"!": RED, "?": "#9a5b00", " ": INK}
WAVE_COLOUR, SILENCE_COLOUR = BLUE, "#d9dce1"


def choose_clips(inspection: Inspection, most: int) -> list[int]:
    """Return the indices of the clips to show, in order: those with a sign first, the others spread evenly."""
    marked = sorted((i for i, clip in enumerate(inspection.clips) if sign_of(clip) != " "),
                    key=lambda i: sign_of(inspection.clips[i]) != "!")[:most]
    plain = [i for i, clip in enumerate(inspection.clips) if sign_of(clip) == " "]
    room = min(most - len(marked), len(plain))
    spread = [plain[k * len(plain) // room] for k in range(room)]
    return sorted(marked + spread)


def write_overview(inspection: Inspection, path: Path, video_dir: Path | None, most: int = 24) -> None:
    """Write a PNG of up to ``most`` clips.

    Args:
        path: ends in .png. video_dir: where the videos of the clips lie; a folder without them, or None: no frames.

    Raises:
        ValueError: there is no clip to draw, or ``path`` ends otherwise.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: the overview is a .png")
    shown = choose_clips(inspection, most)
    if not shown:
        raise UserError(f"{inspection.folder}: there is no clip to draw")
    rows = find_variant(Path(inspection.folder), None).rows if inspection.kind == "memmap" else None
    videos = {} if rows is not None else find_videos(inspection, video_dir, shown)
    columns = 1 if len(shown) == 1 else 2 if len(shown) <= 8 else 3
    num_rows = math.ceil(len(shown) / columns)
    strip = STRIP_IN if videos else 0.0
    wave = 0.0 if rows is not None else WAVE_IN
    cell_in = TITLE_IN + strip + SPECTRUM_IN + wave + 0.3
    figure = new_figure(columns * COLUMN_IN, num_rows * cell_in + 0.7)
    figure.set_layout_engine("none")
    height_in = num_rows * cell_in + 0.7
    figure.text(0.5, 1 - 0.3 / height_in, _headline(inspection, len(shown)), ha="center", va="center", fontsize=11,
                weight="bold")
    for place, index in enumerate(shown):
        report = inspection.clips[index]
        left = (place % columns) * COLUMN_IN + 0.5
        top = height_in - 0.6 - (place // columns) * cell_in
        cell = _Cell(figure, left, top, COLUMN_IN - 0.65, columns * COLUMN_IN, height_in)
        cell.title(report)
        if rows is not None:
            cell.latents(rows["mean"][index], report.duration_sec or 8.0)
        else:
            cell.sound(report, strip, videos.get(report.id))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_IN, metadata={"Title": PNG_TITLE})


def _headline(inspection: Inspection, shown: int) -> str:
    some = "" if shown == len(inspection.clips) else f" ({shown} of them shown)"
    return f"{real_path(inspection.folder).name}: {summary(inspection)}{some}"


def find_videos(inspection: Inspection, video_dir: Path | None, clips: Sequence[int] | None = None) -> dict[str, Found]:
    """Return {id: (video, second at which the clip begins)} for the clips whose video is known.

    Features name the content of their video, so another video of the same name is never taken for it; where they do
    not, the one video that is called like the clip is. Looked at are the videos of ``video_dir`` and the one that
    the manifest of the extraction names.

    Args:
        clips: indices of those to find, all if None; a video is read whole to be known.
    """
    videos = [] if video_dir is None else sorted(
        path for path in video_dir.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    folder = Path(inspection.folder)
    sources = {str(row.get("id")): Path(str(row.get("source"))) for row in json_lines(folder / MANIFEST_FILE)}
    hashes: dict[Path, str] = {}

    def has_content(path: Path, sha256: str) -> bool:
        if path not in hashes:
            hashes[path] = source_hash(path)
        return hashes[path] == sha256

    found: dict[str, Found] = {}
    for index in range(len(inspection.clips)) if clips is None else clips:
        clip = inspection.clips[index]
        settings = _settings(folder / f"{clip.id}.npz")
        name, sha256 = str(settings.get("source")), settings.get("source_sha256")
        if Path(clip.path).suffix.lower() in VIDEO_SUFFIXES:
            video = Path(clip.path)  # before extraction, the clip itself
        elif sha256 is None:
            called = [path for path in videos if path.stem == clip.id]
            video = called[0] if len(called) == 1 else None
        else:
            near = sorted(videos, key=lambda path: (path.name != name, path.stem != clip.id))
            source = [sources[clip.id]] if clip.id in sources and sources[clip.id].is_file() else []
            video = next((path for path in [*source, *near] if has_content(path, str(sha256))), None)
        start = settings.get("start_sec", 0.0)
        if video is not None:
            found[clip.id] = (video, float(start) if isinstance(start, int | float) else 0.0)
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        return load_features(path).settings or {} if path.is_file() else {}
    except (ValueError, OSError):
        return {}  # the table says what is wrong with it


class _Cell:
    """One clip in the picture; all lengths in inches from the upper left corner of what is drawn."""

    def __init__(self, figure: Any, left: float, top: float, width: float, total_width: float, total_height: float):
        self.figure, self.left, self.top, self.width = figure, left, top, width
        self.total_width, self.total_height = total_width, total_height

    def axes(self, height: float, share: Any = None) -> Any:
        """Return new axes of ``height`` below what is drawn so far."""
        self.top -= height
        box = (self.left / self.total_width, self.top / self.total_height,
               self.width / self.total_width, (height - 0.03) / self.total_height)
        axes = self.figure.add_axes(box, sharex=share)
        for spine in axes.spines.values():
            spine.set_linewidth(0.4)
        axes.tick_params(labelsize=6, length=2, width=0.4, pad=1.5)
        return axes

    def title(self, report: ClipReport) -> None:
        facts = [f"{report.duration_sec:.2f} s" if report.duration_sec else ""]
        if report.sound is not None:
            loudness = report.sound.loudness_lufs
            facts.append("" if loudness is None else f"{loudness:.1f} LUFS")
            facts.append(f"{100 * report.sound.silent_share:.0f} % silent")
        sign = sign_of(report)
        words = "; ".join(report.problems + report.notes) or report.prompt
        for text, down, size, colour in (
            (f"{report.id}   {'   '.join(fact for fact in facts if fact)}", 0.14, 8, COLOURS[sign]),
            (words, 0.31, 6.5, COLOURS[sign] if sign != " " else GREY),
        ):
            self.figure.text(self.left / self.total_width, (self.top - down) / self.total_height,
                             fit(text, 98 if size < 8 else 70), fontsize=size, color=colour, va="center",
                             parse_math=False)
        self.top -= 0.42

    def sound(self, report: ClipReport, strip: float, video: tuple[Path, float] | None) -> None:
        waveform, rate = _read(Path(report.path), report.duration_sec)
        seconds = waveform.shape[1] / rate if waveform is not None else report.duration_sec or 8.0
        if strip:
            self._frames(self.axes(strip), video, seconds, strip)
        spectrum = self.axes(SPECTRUM_IN)
        wave = self.axes(WAVE_IN, spectrum)
        spectrum.tick_params(labelbottom=False)
        wave.set_yticks([])
        if waveform is None:
            for axes in (spectrum, wave):
                axes.set_facecolor(SILENCE_COLOUR)
                axes.set_yticks([])
        else:
            levels = mel_levels(waveform.mean(dim=0), rate)
            draw_levels(spectrum, levels, seconds, rate, float(levels.max()), size=6)  # below its own loudest point
            spectrum.set_xlabel("")
            draw_wave(wave, waveform, rate, seconds)
        wave.set_xlim(0, seconds)
        wave.set_xlabel("seconds", fontsize=6, labelpad=1)

    def latents(self, mean: np.ndarray, seconds: float) -> None:
        axes = self.axes(SPECTRUM_IN)
        centred = mean - mean.mean(axis=0)
        limit = max(1e-6, float(np.percentile(np.abs(centred), 99)))
        axes.imshow(centred.T, aspect="auto", origin="lower", extent=(0, seconds, 0, mean.shape[1]), cmap="RdBu_r",
                    vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_ylabel("latent channel", fontsize=6, labelpad=1)
        axes.set_xlabel("seconds", fontsize=6, labelpad=1)

    def _frames(self, axes: Any, video: tuple[Path, float] | None, seconds: float, strip: float) -> None:
        axes.set_xticks([])
        axes.set_yticks([])
        picture = None if video is None else frame_strip(*video, seconds, self.width / (strip - 0.03))
        if picture is None:
            axes.set_facecolor("#f1f3f4")
            axes.text(0.5, 0.5, "no video", transform=axes.transAxes, ha="center", va="center", fontsize=6,
                      color="#80868b")
        else:
            axes.imshow(picture, aspect="auto", extent=(0, 1, 0, 1))


def _read(path: Path, seconds: float | None) -> tuple[Tensor | None, int]:
    """Return the sound of a clip as far as it is used; None if it cannot be read."""
    try:
        waveform, rate = read_audio(path, 0.0, seconds)
    except (ValueError, OSError):
        return None, 1
    return (waveform, rate) if torch.isfinite(waveform).all() else (None, 1)


def frame_strip(path: Path, start_sec: float, seconds: float, shape: float) -> np.ndarray | None:
    """Return (height, width, 3) uint8: frames side by side, each from the middle of the time that it stands above.

    Args:
        shape: width of the strip as a multiple of its height. Frames keep their shape, but for what makes them fit.

    Returns None if the video cannot be read; the extraction says why.
    """
    try:
        video = read_video(path, min(seconds, _seconds_of(path, seconds, start_sec)), start_sec,
                           clip_size=2 * TILE_PIXELS, sync_size=16)
    except (ValueError, OSError) as error:
        log.warning("its video frames cannot be drawn: %s", error)
        return None
    frames = video.clip_frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, 3), squares
    height, width = video.source_size
    count = max(1, round(shape * height / width))
    tile = round(TILE_PIXELS * shape / count)
    columns = np.linspace(0, frames.shape[2] - 1, tile).round().astype(int)
    lines = np.linspace(0, frames.shape[1] - 1, TILE_PIXELS).round().astype(int)
    chosen = [min(len(frames) - 1, round((k + 0.5) * seconds / count * CLIP_FPS)) for k in range(count)]
    tiles = [frames[t][lines][:, columns] for t in chosen]
    for shown in tiles[1:]:
        shown[:, 0] = 255  # a line between two frames
    return np.concatenate(tiles, axis=1)


def _seconds_of(path: Path, seconds: float, start_sec: float) -> float:
    duration = probe(path).duration_sec
    return seconds if duration is None else max(SHORTEST_SEC, duration - start_sec)


def draw_wave(axes: Any, waveform: Tensor, rate: int, seconds: float, points: int = 1200) -> None:
    """Draw (channels, samples) scaled to its peak, as training scales it, with what is silent shaded."""
    mono = waveform.mean(dim=0)
    mono = mono / mono.abs().max().clamp_min(1e-9)
    size = max(1, len(mono) // points)
    blocks = mono[: len(mono) // size * size].reshape(-1, size)
    times = (np.arange(len(blocks)) + 0.5) * size / rate
    silent = (block_power(waveform, rate) < 10 ** (SILENCE_DB / 10)).numpy()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(int), [0]]))) * seconds / len(silent)
    for begin, end in edges.reshape(-1, 2):
        axes.axvspan(begin, end, color=SILENCE_COLOUR, linewidth=0)
    axes.fill_between(times, blocks.min(dim=1).values.numpy(), blocks.max(dim=1).values.numpy(), color=WAVE_COLOUR,
                      linewidth=0.2)
    axes.set_ylim(-1.05, 1.05)
