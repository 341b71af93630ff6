"""Comparison of adapters and strengths on the same clips and seeds: one sheet of spectrograms, and figures.

    adapters.txt        # path strength [label] [times=LO-HI] [layers=PATTERN,...]; quote what has spaces; paths as
                        # given, or relative to this file
                        base
                        runs/dog/adapter_final.pt 0.5
                        runs/dog/adapter_final.pt 1.0  "dog, full"
                        runs/dog/adapter_final.pt 1.0  "dog, early"  times=0-0.5

    comparison.png      a row per clip and seed, a column per setup; the recorded sound first where there is one
    comparison.html     the sounds themselves with players, in one page
    comparison.json     every figure of every sound, and their means per setup

Everything is measured on the files as they were written, so that a restarted run says the same.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from selva.audio.metrics import compare_sounds, is_silent
from selva.data.folder import sound_beside
from selva.flow import WHOLE_INTERVAL, check_interval
from selva.inference.batch import AdapterSetup, BatchClip
from selva.inference.compare_page import comparison_page
from selva.inference.request import SoundRequest
from selva.inputs.file_names import same_name, written_path
from selva.inputs.media_files import by_name, say_choice, visible_files
from selva.inputs.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from selva.media import prepare_audio, probe, read_audio
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.html_report import Page
from selva.utils.plots import new_figure, save_figure
from selva.utils.spectrogram import LEVEL_LABEL, draw_levels, mel_levels
from selva.utils.text import counted, listed, number_in, read_text, text_lines

log = logging.getLogger(__name__)

BASE_LABEL = "base"
SHEET_FILE, FIGURES_FILE, PAGE_FILE = "comparison.png", "comparison.json", "comparison.html"
ROWS_PER_SHEET = 16
REFERENCE_SUFFIXES = (*AUDIO_SUFFIXES, *VIDEO_SUFFIXES)

# Figures in the table and on the sheet: key of compare_sounds, heading, format.
SHOWN = (
    ("log_spectral_distance_db", "LSD dB", "{:.1f}"),
    ("mel_cepstral_distortion_db", "MCD dB", "{:.1f}"),
    ("onset_f1", "onset F1", "{:.2f}"),
    ("lufs", "LUFS", "{:.1f}"),
    ("centroid_hz", "centroid Hz", "{:.0f}"),
    ("rolloff_hz", "roll-off Hz", "{:.0f}"),
    ("flatness", "flatness", "{:.3f}"),
)


# ---------------------------------------------------------------------------------------------------------------
# the list
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompareLine:
    """One setup: its name, (file, strength) of its adapters, none for the base model, and where they act."""

    label: str
    adapters: tuple[tuple[Path, float], ...]
    times: tuple[float, float] = WHOLE_INTERVAL
    layers: tuple[str, ...] = ()


def read_compare_list(path: Path) -> list[CompareLine]:
    """Return the setups in a list of lines ``path strength [label] [times=LO-HI] [layers=PATTERN,...]`` or ``base``.

    ``#`` begins a comment.

    Labels, which become folders, default to the name of the file (of a training run's, with its folder) and the
    strength.

    Raises:
        ValueError: names every line that is wrong: a missing file, a strength that is no number, a label used twice.
    """
    lines, problems = [], []
    for number, text in enumerate(text_lines(read_text(path)), 1):
        try:
            words = _words(text)
            if words:
                lines.append(_compare_line(words, path.parent))
                if any(line.label == lines[-1].label for line in lines[:-1]):
                    raise UserError(f"the label {lines[-1].label!r} is used twice; give another as the third word")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not lines and not problems:
        problems.append("it is empty, expected lines like `adapter.pt 1.0`")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return lines


def _words(text: str) -> list[str]:
    """Return the words of a line without its comment; quotation marks hold spaces, a backslash is a letter like others.

    Raises:
        ValueError: a quotation mark is not closed.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape = True, ""  # as in paths of Windows
    return list(lexer)


def _compare_line(words: list[str], folder: Path) -> CompareLine:
    if words == [BASE_LABEL]:
        return CompareLine(BASE_LABEL, ())
    line = " ".join(words)
    options = dict(word.split("=", 1) for word in words[2:] if word.startswith(("times=", "layers=")))
    words = words[:2] + [word for word in words[2:] if not word.startswith(("times=", "layers="))]
    if not 2 <= len(words) <= 3:
        raise UserError(f"{line!r} is not `base`, nor `path strength [label] [times=LO-HI] [layers=PATTERN,...]`; "
                        "quote what has spaces")
    path = Path(words[0])
    candidates = (written_path(words[0], start) for start in (Path(), folder))
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"{path}: no such file")
    strength = number_in(words[1])
    if not math.isfinite(strength):
        raise UserError(f"the strength is {words[1]!r}, expected a number"
                        + (", with a point" if re.fullmatch(r"[+-]?\d+,\d+", words[1]) else ""))
    times, layers = _times(options.get("times", "0-1")), tuple(filter(None, options.get("layers", "").split(",")))
    where = "".join(f" {re.sub(r'[^A-Za-z0-9.,_-]', '_', value)}" for value in options.values())
    label = words[2] if len(words) == 3 else f"{_short_name(found)} {strength:g}{where}"
    if re.search(r'[/\\:*?"<>|\0]', label) or label.startswith(".") or not label.strip():
        raise UserError(f"the label {label!r} cannot name a folder")
    return CompareLine(label, ((found, strength),), times, layers)


def _times(text: str) -> tuple[float, float]:
    try:
        start, end = map(float, text.split("-"))
    except ValueError as error:
        raise UserError(f"times={text}: expected two times such as times=0-0.7") from error
    return check_interval("times", (start, end))


def _short_name(path: Path) -> str:
    """Return "dog final" for runs/dog/adapter_final.pt, whose stem alone says little, and else the stem."""
    run = path.absolute().parent.name
    return f"{run} {path.stem.removeprefix('adapter_')}" if path.stem.startswith("adapter_") and run else path.stem


# ---------------------------------------------------------------------------------------------------------------
# recorded sounds
# ---------------------------------------------------------------------------------------------------------------


def check_reference_dir(folder: Path) -> None:
    """Raise a ValueError if ``folder`` holds no sound to compare with."""
    if not folder.is_dir() or not any(path.suffix.lower() in REFERENCE_SUFFIXES for path in visible_files(folder)):
        raise UserError(f"--reference {folder}: expected a folder with sounds or videos "
                        f"({' '.join(REFERENCE_SUFFIXES)})")


def reference_sound(
    name: str, request: SoundRequest, folder: Path | None, duration_sec: float, rate: int
) -> Tensor | None:
    """Return (samples,) of the sound that was recorded with a clip, None if there is none.

    From ``folder`` if one is given (a sound that begins with the clip), else from the video itself or from beside the
    features, where it is the one that training takes. A recording that ends early is followed by silence.
    """
    path, start_sec = None, 0.0
    if folder is not None:
        paths = by_name(visible_files(folder), REFERENCE_SUFFIXES).get(same_name(name), [])
        path = paths[0] if paths else None
        if path is None:
            log.warning("%s: not compared with a recorded sound, as --reference %s has none of this name", name, folder)
        else:
            say_choice(folder, [paths])
    elif isinstance(request.features, Path):
        path = sound_beside(request.features)
    try:
        if folder is None and request.video is not None and "audio" in probe(request.video).streams:
            path, start_sec = request.video, request.start_sec
        if path is None:
            return None
        waveform, source_rate = read_audio(path, start_sec, duration_sec)
        return prepare_audio(waveform, source_rate, rate, round(duration_sec * rate), normalize="none", pad=True)
    except (ValueError, OSError) as error:
        log.warning("%s: not compared with its recorded sound: %s", name, error)
        return None


# ---------------------------------------------------------------------------------------------------------------
# figures
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One clip with one seed: its sounds by the index of their setup.

    Attributes:
        reference: (samples,) recorded sound or None. sounds: (samples,) each, at ``rate``.
        figures: of every sound, by setup.
    """

    name: str
    seed: int
    prompt: str
    rate: int
    reference: Tensor | None
    sounds: dict[int, Tensor]
    figures: dict[int, dict[str, Any]]


def write_comparison(
    folder: Path, clips: Sequence[BatchClip], setups: Sequence[AdapterSetup], reference_dir: Path | None
) -> list[Path]:
    """Write the figures, the sheets and the page of everything that was made; return their paths."""
    rows = compare_rows(clips, reference_dir)
    warn_of_silence(rows, [setup.label for setup in setups])
    means = [mean_figures([row.figures[i] for row in rows if i in row.figures]) for i in range(len(setups))]
    for line in figures_table(setups, means):
        log.info("%s", line)
    content = {
        "settings": [
            {"label": setup.label, "adapters": [[str(path), s] for path, s in setup.specs],
             "times": list(setup.times), "layers": list(setup.layers), "mean": mean}
            for setup, mean in zip(setups, means, strict=True)
        ],
        "sounds": [
            {"clip": row.name, "seed": row.seed, "prompt": row.prompt, "setting": setups[index].label,
             "has_reference": row.reference is not None, **row.figures[index]}
            for row in rows for index in sorted(row.figures)
        ],
    }
    paths = [folder / FIGURES_FILE]
    atomic_write_text(paths[0], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for first in range(0, len(rows), ROWS_PER_SHEET):
        number = first // ROWS_PER_SHEET + 1
        name = SHEET_FILE if number == 1 else SHEET_FILE.replace(".png", f"_{number}.png")
        plot_sheet(rows[first : first + ROWS_PER_SHEET], [setup.label for setup in setups], folder / name)
        paths.append(folder / name)
    if rows:
        _page(rows, setups, means).write(folder / PAGE_FILE)
        paths.append(folder / PAGE_FILE)
    return paths


def _page(rows: Sequence[Row], setups: Sequence[AdapterSetup], means: Sequence[dict[str, float | None]]) -> Page:
    clips = [
        (f"{row.name}, seed {row.seed}" + (f": {row.prompt}" if row.prompt else ""), row.rate, row.reference,
         row.sounds, {index: _caption(row, index, ", ") for index in row.sounds})
        for row in rows
    ]
    return comparison_page([setup.label for setup in setups], clips, figures_cells(setups, means))


def compare_rows(clips: Sequence[BatchClip], reference_dir: Path | None = None) -> list[Row]:
    """Return the rows of all clips of which something was made, read and measured."""
    rows = []
    for clip in clips:
        made = [(variation, *_read_sound(variation.files.written[0])) for variation in clip.made]
        if not made:
            continue
        rate = made[0][2]
        duration_sec = len(made[0][1]) / rate
        reference = reference_sound(clip.name, clip.request, reference_dir, duration_sec, rate)
        for seed in sorted({variation.seed for variation, *_ in made}):
            sounds = {variation.setup: sound for variation, sound, _ in made if variation.seed == seed}
            figures = {index: compare_sounds(sound, reference, rate) for index, sound in sounds.items()}
            rows.append(Row(clip.name, seed, clip.request.prompt or "", rate, reference, sounds, figures))
    return rows


def warn_of_silence(rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Name the sounds that are silent: they have no distances, so the means of their setup are of the others."""
    silent = [f"{row.name}, seed {row.seed}, {labels[index]}"
              for row in rows for index, sound in sorted(row.sounds.items()) if is_silent(sound)]
    if silent:
        log.warning("%s among %d: no distance to silence means anything, so the means leave out: %s",
                    counted(len(silent), "silent sound"), sum(len(row.sounds) for row in rows),
                    listed(silent, separator="; "))


def _read_sound(path: Path) -> tuple[Tensor, int]:
    waveform, rate = read_audio(path)
    return waveform.mean(dim=0), rate


def mean_figures(figures: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of every figure over the sounds that have it."""
    keys = dict.fromkeys(key for one in figures for key in one)
    means = {}
    for key in keys:
        values = [one[key] for one in figures if one.get(key) is not None]
        means[key] = sum(values) / len(values) if values else None
    return means


def figures_table(setups: Sequence[AdapterSetup], means: Sequence[dict[str, float | None]]) -> list[str]:
    """Return the lines of a table of the means, one per setup, with the figures that any of them has."""
    table = figures_cells(setups, means)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]


def figures_cells(setups: Sequence[AdapterSetup], means: Sequence[dict[str, float | None]]) -> list[list[str]]:
    """Return the cells of :func:`figures_table`, the header first."""
    shown = [column for column in SHOWN if any(mean.get(column[0]) is not None for mean in means)]
    table = [["mean over all sounds", *(heading for _, heading, _ in shown)]]
    for setup, mean in zip(setups, means, strict=True):
        table.append([setup.label, *(_formatted(mean.get(key), form) for key, _, form in shown)])
    return table


def _formatted(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


# ---------------------------------------------------------------------------------------------------------------
# the sheet
# ---------------------------------------------------------------------------------------------------------------

CELL_WIDTH_IN, CELL_HEIGHT_IN = 2.6, 1.5
CAPTION = (  # below a spectrogram
    ("log_spectral_distance_db", "LSD {:.1f}"), ("mel_cepstral_distortion_db", "MCD {:.1f}"),
    ("onset_f1", "F1 {:.2f}"), ("lufs", "{:.1f} LUFS"),
)
LEGEND = ("Compared with the recorded sound: LSD, log-spectral distance in dB, and MCD, mel-cepstral distortion in dB, "
          "smaller is nearer; F1, share of the strokes at the right times, 1 is all. LUFS: loudness.")


def plot_sheet(rows: Sequence[Row], labels: Sequence[str], path: Path) -> None:
    """Write a grid of spectrograms: a row per clip and seed, the recorded sound first where any row has one."""
    with_reference = any(row.reference is not None for row in rows)
    columns = [*(["recorded"] if with_reference else []), *labels]
    images = [[None if sound is None else mel_levels(sound, row.rate)
               for sound in _cells(row, len(labels), with_reference)] for row in rows]
    loudest = max(np.percentile(image, 99.9) for line in images for image in line if image is not None)
    figure = new_figure(2.2 + CELL_WIDTH_IN * len(columns), 0.7 + CELL_HEIGHT_IN * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="row", sharey=True)
    drawn = []
    for line, row, cells in zip(grid, rows, images, strict=True):
        seconds = max(len(sound) for sound in row.sounds.values()) / row.rate
        for column, (axes, image) in enumerate(zip(line, cells, strict=True)):
            if image is None:
                axes.set_frame_on(False)
                axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
                axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="gray")
                continue
            drawn.append(draw_levels(axes, image, seconds, row.rate, loudest, size=7, unit=" kHz"))
            axes.set_xlabel(_caption(row, column - with_reference), fontsize=7, labelpad=2)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter("{x:g} s")
        _label_row(line[0], row)
    for axes, label in zip(grid[0], columns, strict=True):
        axes.set_title(label, fontsize=9, fontweight="bold")
    bar = figure.colorbar(drawn[-1], ax=grid.ravel().tolist(), aspect=40, pad=0.01)
    bar.set_label(LEVEL_LABEL, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if any(row.figures.get(index) for row in rows for index in range(len(labels))) and with_reference:
        figure.supxlabel(textwrap.fill(LEGEND, max(60, round(14 * (2.2 + CELL_WIDTH_IN * len(columns))))), fontsize=7)
    save_figure(figure, path)


def _cells(row: Row, num_setups: int, with_reference: bool) -> list[Tensor | None]:
    return [*([row.reference] if with_reference else []), *(row.sounds.get(index) for index in range(num_setups))]


def _label_row(axes: Any, row: Row) -> None:
    lines = [*textwrap.wrap(row.name, 20)[:2], f"seed {row.seed}", *textwrap.wrap(row.prompt, 20)[:3]]
    axes.set_ylabel("\n".join(lines), fontsize=8, rotation=0, ha="right", va="center")


def _caption(row: Row, index: int, between: str = "   ") -> str:
    """Return the text below a spectrogram: the figures only, as the axis shows the seconds."""
    figures = row.figures.get(index)
    if figures is None:
        return ""
    shown = [(figures.get(key), short) for key, short in CAPTION]
    return between.join(short.format(value) for value, short in shown if value is not None)
