"""Sounds to be compared: pairs of files by their names, and the figures of a pair that need no network."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.audio.loudness import integrated_loudness, rms_db
from selva.audio.metrics import compare_sounds, spectral_shape
from selva.audio.silence import silent_share
from selva.inputs.delimited import find_delimiter, read_text_table, refuse_long_rows
from selva.inputs.file_names import same_name
from selva.inputs.media_files import by_name, say_choice, say_not_taken, visible_files
from selva.inputs.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from selva.media import prepare_audio, read_audio
from selva.media.audio import cancellation, mean_power
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

STFT_SIZES = (512, 1024, 2048)  # with hops of a quarter of each
LENGTHS_DIFFER_SEC = 0.1


@dataclass(frozen=True)
class SoundPair:
    """A generated sound and the recording of its name; ``video`` and ``caption`` where there are any."""

    name: str
    generated: Path
    reference: Path
    video: Path | None
    caption: str | None


def sounds_in(folder: Path) -> dict[str, Path]:
    """Return {name: file} of the sounds in a folder, and of the videos, whose sound counts, in the order of the names.

    Of several files of one name a sound goes before a video, and among sounds the first kind of ``AUDIO_SUFFIXES``.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it holds no sound and no video.
    """
    found = _by_name(folder, (*AUDIO_SUFFIXES, *VIDEO_SUFFIXES))
    if not found:
        raise UserError(f"{folder}: no sounds and no videos in it (its subfolders were not searched); looked for "
                        f"{' '.join((*AUDIO_SUFFIXES, *VIDEO_SUFFIXES))}")
    return found


def _by_name(folder: Path, suffixes: tuple[str, ...], say: bool = True) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    files = list(visible_files(folder))
    found = by_name(files, suffixes)
    if found and say:
        say_not_taken(folder, files, suffixes)
        say_choice(folder, found.values())
    return {name: found[name][0] for name in sorted(found)}


def find_pairs(generated: Path, reference: Path, videos: Path | None, captions: Path | None) -> list[SoundPair]:
    """Return the pairs of two folders in the order of their names; names without a partner are logged.

    Raises:
        UserError: a folder without sounds, no pair at all, or a table that is no table of captions.
        FileNotFoundError: a folder does not exist.
    """
    ours, theirs = sounds_in(generated), sounds_in(reference)
    names = [name for name in ours if name in theirs]
    if not names:
        raise UserError(
            f"no sound in {generated} has the name of one in {reference} ({listed(list(ours), 3)}; "
            f"{listed(list(theirs), 3)}); files are paired by their names without the ending")
    for folder, of_folder, other in ((generated, ours, reference), (reference, theirs, generated)):
        alone = [name for name in of_folder if name not in names]
        if alone:
            log.warning("%s: left out, without a partner in %s: %d of %s: %s", folder, other, len(alone),
                        counted(len(of_folder), "sound"), listed(alone))
    pictures = _by_name(videos if videos is not None else reference, VIDEO_SUFFIXES, say=videos is not None)
    texts = read_captions(captions) if captions is not None else {}
    without = [name for name in names if captions is not None and name not in texts]
    if without:
        log.warning("%s: no caption for %d of %s: %s", captions, len(without), counted(len(names), "sound"),
                    listed(without))
    return [SoundPair(name, ours[name], theirs[name], pictures.get(name), texts.get(name)) for name in names]


def read_captions(path: Path) -> dict[str, str]:
    """Return {name: caption} of a table with the columns ``id`` or ``name``, and ``caption``, ``prompt`` or ``label``.

    Names are as :func:`same_name` has them; of several captions of one name the last counts, and a warning says so.

    Raises:
        UserError: not such a table, or a row with more cells than columns.
    """
    table = read_text_table(path, find_delimiter(path), (), "a table with the columns id and caption")
    key = next((column for column in ("id", "name") if column in table.columns), None)
    text = next((column for column in ("caption", "prompt", "label") if column in table.columns), None)
    if key is None or text is None:
        raise UserError(f"{path}: has the columns {', '.join(table.columns)}; expected id (or name) and caption")
    refuse_long_rows(path, table)
    captions: dict[str, str] = {}
    changed = set()
    for _, cells in table.rows:
        name, caption = same_name((cells[key] or "").strip()), (cells[text] or "").strip()
        if name and caption:
            if captions.setdefault(name, caption) != caption:
                changed.add(name)
            captions[name] = caption
    if changed:
        log.warning("%s: several captions, of which the last counts: %s", path, listed(sorted(changed)))
    return captions


def read_mono(path: Path) -> tuple[Tensor, int]:
    """Return (samples,) float32 mean of the channels and the rate of a file.

    Raises:
        UserError: no sound, damaged, values that are not finite, or channels that cancel each other.
    """
    waveform, rate = read_audio(path)
    mono = waveform.mean(dim=0)
    if not torch.isfinite(mono).all():
        raise UserError(f"{path}: the sound has values that are not finite (NaN or infinite)")
    if reason := cancellation(mean_power(waveform), mean_power(mono)):
        raise UserError(f"{path}: {reason}")
    return mono, rate


def at_rate(sound: Tensor, rate: int, target_rate: int) -> Tensor:
    """Return (samples,) at another rate, at the level that it had; silence as it is."""
    if rate == target_rate:
        return sound
    if not bool(sound.any()):
        return torch.zeros(round(len(sound) * target_rate / rate))
    return prepare_audio(sound, rate, target_rate, normalize="none")


def pair_figures(sound: Tensor, reference: Tensor, rate: int) -> dict[str, Any]:
    """Return the figures of a pair of (samples,) sounds at one rate that need no network.

    Beside those of :func:`selva.audio.metrics.compare_sounds`: ``stft_distance``, ``loudness_difference_lu``,
    ``centroid_difference_oct``, ``silent_share_difference`` (generated minus recorded each), the recording's own
    ``reference_lufs`` and ``reference_rms_db`` (the level of all of it), ``common_sec`` and ``length_difference_sec``.
    None where a number has no meaning.
    """
    figures = compare_sounds(sound, reference, rate)
    length = min(len(sound), len(reference))
    both = sound[:length], reference[:length]
    shapes = [spectral_shape(part, rate) for part in both]
    loudness = [integrated_loudness(part[None], rate) for part in both]
    silent = [silent_share(part[None], rate) for part in both]
    figures |= {
        "stft_distance": stft_distance(*both),
        "loudness_difference_lu": _difference(*loudness),
        "centroid_difference_oct": None,
        "silent_share_difference": silent[0] - silent[1],
        "reference_lufs": loudness[1],
        "reference_rms_db": level if math.isfinite(level := rms_db(reference)) else None,
        "common_sec": length / rate,
        "length_difference_sec": (len(sound) - len(reference)) / rate,
    }
    if shapes[0] is None or shapes[1] is None:  # one of them is silent, and a distance to silence tells nothing
        figures["stft_distance"] = None
    else:
        figures["centroid_difference_oct"] = math.log2(shapes[0].centroid_hz / shapes[1].centroid_hz)
    return figures


def _difference(a: float | None, b: float | None) -> float | None:
    return a - b if a is not None and b is not None and math.isfinite(a - b) else None


def stft_distance(sound: Tensor, reference: Tensor) -> float | None:
    """Return the multi-resolution STFT distance of two (samples,) sounds (arXiv:1910.11480); 0 for equal ones.

    The mean over three resolutions of the spectral convergence, and of the mean difference of the logarithms of the
    magnitudes, added. Not symmetric: relative to the reference. None for a reference without any sound, or less of it
    than the longest window.
    """
    if len(reference) < max(STFT_SIZES) or not bool(reference.any()):
        return None
    total = 0.0
    for size in STFT_SIZES:
        window = torch.hann_window(size, dtype=torch.float64)
        ours, theirs = (torch.stft(x.double(), size, size // 4, window=window, return_complex=True).abs()
                        for x in (sound, reference))
        convergence = torch.linalg.norm(theirs - ours) / torch.linalg.norm(theirs)
        logarithms = (theirs.clamp(min=1e-7).log() - ours.clamp(min=1e-7).log()).abs().mean()
        total += float(convergence + logarithms)
    return total / len(STFT_SIZES)
