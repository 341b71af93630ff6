"""Cutting of recordings into clips: the windows or segments taken, those left out and the reason, and their sound.

    recording --header--> windows (or given segments) --silence--> clips --> clips.tsv, clips_val.tsv, captions.tsv
                                                             \\--> <id>.flac, <id>.txt
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from selva.audio.silence import MOSTLY_SILENT, SilenceMap, find_silence
from selva.inputs.media_files import say_not_taken, visible_files
from selva.inputs.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from selva.media import audio_length, read_audio, write_audio
from selva.media.audio import flac_problem, warn_of_cancellation
from selva.partition.config import CuttingConfig
from selva.partition.pieces import WrittenPieces
from selva.partition.segments import Segment, move_borders
from selva.partition.windows import WINDOW_SEC, Window, partition, write_table
from selva.sequence import SHORTEST_SEC
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text, source_hash
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

LEFT_OUT_COLUMNS = ("file", "id", "start_sec", "end_sec", "reason")
VIDEO_REASON = "a video; extract_features.py --windows cuts videos"
OVERSHOOT_SEC = 0.05  # given times are rounded; a segment that ends this much too late is cut without a word


@dataclass(frozen=True)
class LeftOut:
    """A recording that gives no clip, or a stretch of it if it has times.

    Attributes:
        failed: it should have given one and could not be read; False for what the rules leave out.
        unwritten: it gave one, whose sound could not be written.
    """

    path: Path
    reason: str
    id: str = ""
    start_sec: float | None = None
    end_sec: float | None = None
    failed: bool = False
    unwritten: bool = False

    def __str__(self) -> str:
        clip = f" {self.id}" if self.id else ""
        times = "" if self.start_sec is None else f" ({self.start_sec:.2f} to {self.end_sec:.2f} s)"
        return f"{self.path}{clip}{times}: {self.reason}"


def write_left_out(path: Path, items: Iterable[LeftOut], data_dir: Path) -> None:
    """Write what was left out as tab-separated text with a header and paths below ``data_dir``, whole or not at all."""
    def time(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.3f}"

    rows = ((item.path.relative_to(data_dir).as_posix(), item.id, time(item.start_sec), time(item.end_sec), item.reason)
            for item in items)
    write_table(path, LEFT_OUT_COLUMNS, rows)


def collect_recordings(data_dir: Path, recursive: bool = False) -> tuple[dict[str, Path], list[LeftOut]]:
    """Return {name: recording} of ``data_dir`` in the order of the files, and the files that might have been meant.

    Args:
        recursive: take the subfolders too; ``a/b/dog.flac`` is called ``a_b_dog`` then, as videos are in extraction.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no audio file in it, or two in different folders would have the same name.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    recordings: dict[str, Path] = {}
    left_out: list[LeftOut] = []
    videos: dict[str, Path] = {}
    clashes: list[str] = []
    files = sorted(visible_files(data_dir, recursive), key=lambda path: path.parts)
    say_not_taken(data_dir, files, AUDIO_SUFFIXES, recursive)
    for path in files:
        suffix, name = path.suffix.lower(), "_".join(path.relative_to(data_dir).with_suffix("").parts)
        if suffix in VIDEO_SUFFIXES:
            videos[name] = path
        if suffix not in AUDIO_SUFFIXES:
            continue
        if not path.is_file():
            left_out.append(LeftOut(path, "leads to no file", failed=True))
            continue
        other = recordings.setdefault(name, path)
        if other.parent != path.parent:
            clashes.append(f"{other} and {path} would both be called {name}")
        elif other is not path:
            kept, left = sorted((other, path), key=_preference)
            recordings[name] = kept
            left_out.append(LeftOut(left, f"{kept.name} has the same name and is used instead"))
    if clashes:
        raise UserError(f"{listed(clashes, separator='; ')}; rename one of them")
    if not recordings:
        deeper = "" if recursive else " (its subfolders were not searched; --recursive does)"
        instead = "; ".join(f"{path.name}: {VIDEO_REASON}" for path in list(videos.values())[:1])
        raise UserError(f"{data_dir}: no recordings in this folder{deeper}; looked for {' '.join(AUDIO_SUFFIXES)}"
                        + (f"; {instead}" if instead else ""))
    # A video beside a recording of its name is what the recording belongs to.
    left_out += [LeftOut(path, VIDEO_REASON)
                 for name, path in videos.items() if name not in recordings]
    return recordings, left_out


def _preference(path: Path) -> tuple[bool, int]:
    """Return a key that sorts recordings of one name, FLAC first as MMAudio's own partition reads nothing else."""
    suffix = path.suffix.lower()
    return suffix != ".flac", AUDIO_SUFFIXES.index(suffix)


# -- cutting -----------------------------------------------------------------------------------------------------------


def cut_recording(
    path: Path, config: CuttingConfig, segments: Sequence[Segment] | None = None, name: str | None = None
) -> tuple[list[Window], list[LeftOut]]:
    """Return the clips of a recording, and the stretches of it that give none.

    Only the header is read, except to find silence.

    Args:
        segments: where to cut; None for windows.
        name: of the recording in the table; None for its stem.
    """
    name = path.stem if name is None else name
    try:
        num_samples, rate = audio_length(path)
        if segments is None:
            windows, left_out = _cut_windows(path, name, num_samples, rate, config)
        else:
            windows, left_out = _cut_segments(path, name, num_samples, rate, config, segments)
        if not (windows and (config.skip_silence or config.trim_silence)):
            return windows, left_out
        found = find_silence(path, config.silence_db)
    except (ValueError, OSError) as error:
        return [], [LeftOut(path, str(error).removeprefix(f"{path}: "), failed=True)]
    # Windows move to where sound is and are trimmed there; segments stay, so what is left of them has to be sound.
    steps = (_skip_silence, _trim) if segments is None else (_trim, _skip_silence)
    for step in steps:
        windows, reasons = step(windows, found, rate, config, segments is not None)
        left_out += [LeftOut(path, reason, w.id if segments else "", w.start_sample / rate, w.end_sample / rate)
                     for w, reason in reasons]
    return windows, left_out


Kept = tuple[list[Window], list[tuple[Window, str]]]  # clips to take, and those to leave out with the reason


def _skip_silence(
    windows: list[Window], silence: SilenceMap, _rate: int, config: CuttingConfig, given: bool
) -> Kept:
    if not config.skip_silence:
        return windows, []
    windows, silent = avoid_silence(windows, silence, move=not given)
    return windows, [(w, f"more than half of it is silent, below {config.silence_db:g} dB") for w in silent]


def _trim(windows: list[Window], silence: SilenceMap, rate: int, config: CuttingConfig, given: bool) -> Kept:
    if not config.trim_silence:
        return windows, []
    shortest = config.min_length_sec if given and config.min_length_sec is not None else SHORTEST_SEC
    trimmed, left_out = [], []
    for window in windows:
        start, end = silence.trimmed(window.start_sample, window.end_sample)
        if start == end:
            left_out.append((window, f"all of it is silent, below {config.silence_db:g} dB"))
        elif end - start < shortest * rate:
            left_out.append((window, f"{(end - start) / rate:.2f} s long without the silence at its ends, expected at "
                                     f"least {shortest:g} s"))
        else:
            trimmed.append(replace(window, start_sample=start, end_sample=end))
    return trimmed, left_out


def _cut_windows(
    path: Path, name: str, num_samples: int, rate: int, config: CuttingConfig
) -> tuple[list[Window], list[LeftOut]]:
    shortest = WINDOW_SEC if config.min_length_sec is None else config.min_length_sec
    windows = partition(name, num_samples, rate, shortest, config.max_windows)
    if windows:
        return windows, []
    wanted = "a clip takes" if config.min_length_sec is None else "expected at least"
    seconds = num_samples / rate
    whole = " as it is" if seconds < WINDOW_SEC else ""
    hint = (f"; --min_length_sec {math.floor(10 * seconds) / 10:g} takes it{whole}"
            if shortest > seconds >= max(1.0, shortest - 1.0) else "")
    return [], [LeftOut(path, f"{seconds:.2f} s long, {wanted} {shortest:g} s{hint}")]


def _cut_segments(
    path: Path, name: str, num_samples: int, rate: int, config: CuttingConfig, segments: Sequence[Segment]
) -> tuple[list[Window], list[LeftOut]]:
    shortest = SHORTEST_SEC if config.min_length_sec is None else config.min_length_sec
    windows, left_out = [], []
    if not segments:
        left_out.append(LeftOut(path, "no segment of it is given"))
    moved = segments
    if config.slice_start_offset or config.slice_end_offset:
        moved = move_borders(segments, config.slice_start_offset, config.slice_end_offset)
    for given, segment in zip(segments, moved, strict=True):
        start, end = round(segment.start_sec * rate), round(segment.end_sec * rate)
        if start < num_samples and end > num_samples + OVERSHOOT_SEC * rate:
            log.warning("%s: %s ends at %.2f s, but the recording after %.2f s; cut there",
                        path, segment.id, segment.end_sec, num_samples / rate)
        if start < 0 < end:
            log.warning("%s: %s begins %.2f s before the recording with its moved border; cut there",
                        path, segment.id, -segment.start_sec)
        start, end = max(start, 0), min(end, num_samples)
        if end <= start and given.start_sec < given.end_sec and given.start_sec * rate < num_samples:
            reason = (f"the moved borders leave nothing of it ({segment.start_sec:.2f} to {segment.end_sec:.2f} s of "
                      f"{num_samples / rate:.2f} s)")
        elif start >= num_samples:
            reason = f"begins after the end of the recording ({num_samples / rate:.2f} s)"
        elif end - start < max(1, shortest * rate):
            reason = f"{(end - start) / rate:.2f} s long, expected at least {shortest:g} s"
        else:
            windows.append(Window(segment.id, name, start, end))
            continue
        left_out.append(LeftOut(path, reason, given.id, given.start_sec, given.end_sec))
    return windows, left_out


def avoid_silence(
    windows: Sequence[Window], silence: SilenceMap, move: bool = True
) -> tuple[list[Window], list[Window]]:
    """Return the windows to take, and those that are more than half silent and stay so.

    Windows that are not mostly silent stay where they are. Each other one, in order, moves to the free place where
    least of it is silent, the nearest of several; a place is free if no window that is taken lies in it, and places are
    50 ms apart. What is taken is numbered anew, by time, if anything moved or is missing.

    Args:
        move: False only drops, as given segments have their place.
    """
    kept = [w for w in windows if silence.share(w.start_sample, w.end_sample - w.start_sample) <= MOSTLY_SILENT]
    silent = [w for w in windows if w not in kept]
    if not silent or not move:
        return kept, silent
    dropped = []
    for window in silent:
        place = _best_place(window, kept, silence)
        if place is None:
            dropped.append(window)
        else:
            kept.append(replace(window, start_sample=place, end_sample=place + window.end_sample - window.start_sample))
    kept.sort(key=lambda window: window.start_sample)
    return [replace(w, id=f"{w.name}_{index}") for index, w in enumerate(kept)], dropped


def _best_place(window: Window, taken: Sequence[Window], silence: SilenceMap) -> int | None:
    """Return the best start of ``window``, None if every free place is mostly silent."""
    length = window.end_sample - window.start_sample
    starts = np.arange(0, silence.num_samples - length + 1, silence.block)
    starts = np.append(starts, silence.num_samples - length)  # the very end is between two places
    for other in taken:
        starts = starts[(starts + length <= other.start_sample) | (starts >= other.end_sample)]
    if not len(starts):
        return None
    shares = silence.share(starts, length)
    best = np.lexsort((np.abs(starts - window.start_sample), np.round(shares, 6)))[0]
    return int(starts[best]) if shares[best] <= MOSTLY_SILENT else None


# -- validation --------------------------------------------------------------------------------------------------------


def same_recordings(recordings: Mapping[str, Path]) -> list[list[str]]:
    """Return the names of recordings with the same content, in groups of two and more; only equal sizes are read.

    A recording that cannot be read is in none.
    """
    sizes: dict[int, list[str]] = {}
    contents: dict[str, list[str]] = {}
    for name, path in recordings.items():
        sizes.setdefault(path.stat().st_size, []).append(name)
    for name in (name for names in sizes.values() if len(names) > 1 for name in names):
        contents.setdefault(source_hash(recordings[name]), []).append(name)
    return [names for names in contents.values() if len(names) > 1]


def hold_out(names: Collection[str], fraction: float, seed: int, same: Iterable[Collection[str]] = ()) -> set[str]:
    """Return the recordings to validate on: ``fraction`` of them, at least one, and never all.

    Whole recordings, because two windows of one are too alike to judge what was learnt. They are those whose hashes
    with the seed come first, so the choice does not depend on order, and a new recording changes little.

    Args:
        same: groups of recordings with the same content, which stay on one side.

    Raises:
        ValueError: fewer than two different recordings, or a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the share of recordings to validate on is {fraction}, expected more than 0 and less than 1")
    group_of = {name: frozenset((name,)) for name in names}
    group_of |= {name: frozenset(group) & set(names) for group in same for name in group if name in group_of}
    if len(set(group_of.values())) < 2:
        raise UserError(f"{counted(len(names), 'recording')}{' of the same content' if len(names) > 1 else ''} cannot "
                        "be split into training and validation, expected at least 2 different ones")
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    groups = list(dict.fromkeys(group_of[name] for name in ranked))
    wanted, held_out = min(len(names) - 1, max(1, round(fraction * len(names)))), set()
    for group in groups:
        if len(held_out) + len(group) <= wanted:
            held_out |= group
    return held_out or set(min(groups, key=len))


# -- sound -------------------------------------------------------------------------------------------------------------


def write_piece(
    recording: Path, window: Window, folder: Path, caption: str = "", written: WrittenPieces | None = None
) -> Path:
    """Write the sound of a clip as <id>.flac and its caption, if any, as <id>.txt; return the path of the sound.

    Level, rate and channels are those of the recording. Sound beyond full scale is scaled to fit, as it is for
    videos. Files that hold just that already are left alone, so a second run completes the first.

    Args:
        written: what was written to the folder before; None reads it.

    Raises:
        FileNotFoundError, ValueError: the recording cannot be read there, or FLAC cannot hold it.
        FileExistsError: a file of this name holds something else and was not written here.
    """
    return put_piece(*read_piece(recording, window), window, folder, caption, written)


def read_piece(recording: Path, window: Window) -> tuple[torch.Tensor, int]:
    """Return (channels, samples) and the rate of the sound of a clip, within full scale.

    Raises:
        FileNotFoundError, ValueError: the recording cannot be read there, or FLAC cannot hold it.
    """
    _, rate = audio_length(recording)
    length = window.end_sample - window.start_sample
    waveform, _ = read_audio(recording, window.start_sample / rate, length / rate)  # (channels, samples)
    if waveform.shape[1] < length - OVERSHOOT_SEC * rate:
        reached_sec = (window.start_sample + waveform.shape[1]) / rate
        raise UserError(f"{recording}: ends after {reached_sec:.2f} s, but its header promises at least "
                         f"{window.end_sample / rate:.2f} s; convert it")
    if problem := flac_problem(len(waveform), rate):
        raise UserError(f"{recording}: {problem}; convert it")
    if not torch.isfinite(waveform).all():
        raise UserError(f"{recording}: has values that are not finite (NaN or infinite)")
    if (peak := waveform.abs().max().item()) > 1:
        log.info("%s: %s peaks at %.3f and was scaled to 1", recording, window.id, peak)
        waveform = waveform / peak
    warn_of_cancellation(recording, waveform, window.id)
    return waveform, rate


def put_piece(
    waveform: torch.Tensor, rate: int, window: Window, folder: Path, caption: str = "",
    written: WrittenPieces | None = None,
) -> Path:
    """Write the (channels, samples) of :func:`read_piece` as :func:`write_piece` says; return the path of the sound.

    Raises:
        FileExistsError: a file of this name holds something else and was not written here.
        OSError: the disk is full, for example.
    """
    written = WrittenPieces(folder) if written is None else written
    path = folder / f"{window.id}.flac"
    note = path.with_suffix(".txt")
    holds_sound = _holds(path, waveform, rate)
    holds_note = not caption or (note.is_file() and note.read_bytes() == f"{caption}\n".encode())
    for file, holds in ((path, holds_sound), (note, holds_note)):
        if not holds:
            written.check_replaceable(file)
    if not holds_sound:
        write_audio(path, waveform, rate)
        written.add(path)
    if not holds_note:
        atomic_write_text(note, f"{caption}\n")
        written.add(note)
    return path


def _holds(path: Path, waveform: torch.Tensor, rate: int) -> bool:
    """Return True where a file holds ``waveform`` as writing it with 24 bits gives it."""
    try:
        found, found_rate = read_audio(path)
    except (ValueError, OSError):
        return False
    return found_rate == rate and found.shape == waveform.shape and (found - waveform).abs().max().item() < 2**-22


def forgotten_pieces(folder: Path, windows: Iterable[Window]) -> list[str]:
    """Return the names of sounds in ``folder`` that belong to none of ``windows``: of an earlier run, mostly."""
    ids = {window.id for window in windows}
    return sorted(path.name for path in folder.glob("*.flac") if path.stem not in ids and not path.name.startswith("."))
