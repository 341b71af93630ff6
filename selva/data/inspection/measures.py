"""Inspection of a data set, clip by clip: measurements, problems that make a clip unusable, and oddities worth a note.

Three kinds of data sets: pairs of features and sound (or, before extraction, sounds and videos alone), and the packed
memmap of MMAudio. One clip is in memory at a time; of the others only the fingerprints that find near-duplicates.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selva.audio.config import SILENCE_DB
from selva.audio.loudness import true_peak_db
from selva.audio.silence import MOSTLY_SILENT
from selva.data.folder import FolderClip, scan_folder
from selva.data.inspection import duplicates
from selva.data.memmap.reader import MemmapDataset, is_memmap
from selva.data.padding import MAX_AUDIO_SHORTFALL_SEC
from selva.data.plan import plan_windows
from selva.data.summary import QUIET_LUFS, SoundStats, measure_waveform
from selva.features import load_features
from selva.inputs.file_names import same_name
from selva.inputs.media_files import say_choice, say_not_taken, visible_files
from selva.inputs.prompts import PROMPTS_FILE, read_prompts, read_sidecar
from selva.inputs.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from selva.media import read_audio
from selva.media.audio import SILENCE_LEVEL, cancellation, mean_power
from selva.models.variants import VARIANTS, Variant, get_variant
from selva.sequence import DEFAULT_DURATION_SEC, SAMPLING_RATES
from selva.utils.errors import UserError
from selva.utils.progress import Progress
from selva.utils.text import counted

log = logging.getLogger(__name__)

NORM_TOLERANCE = 0.02  # half precision moves a norm of 1 by less
OFFSET = 0.01  # mean of a sound, of full scale
CANCELLED_DB = 10.0  # the channels together against one alone
EDGE_SEC, CLICK_DB = 0.1, 12.0  # a peak so near to an end and so far above the rest is from cutting
LONGER_SEC = 1.0  # of sound than of features, before it is worth a word


@dataclass
class ClipReport:
    """One clip. Measurements that do not apply, or failed, are None.

    Attributes:
        id: its name in every message. path: its sound, or the folder of a memmap.
        duration_sec: of the features; without any, of the sound.
        sound: see :class:`selva.data.summary.SoundStats`. true_peak_db: dBTP.
        clip_norm: (lowest, highest) norm of a row of CLIP features; 1 as they leave the encoder.
        sync_norm, text_norm: mean norm of a row.
        latent_rms, latent_std: of a memmap: root mean square of the latents, mean deviation of their posterior.
        problems: reasons why it cannot be used. notes: oddities that may be meant.
    """

    id: str
    path: str
    prompt: str = ""
    prompt_source: str = ""
    duration_sec: float | None = None
    sound: SoundStats | None = None
    true_peak_db: float | None = None
    clip_norm: tuple[float, float] | None = None
    sync_norm: float | None = None
    text_norm: float | None = None
    latent_rms: float | None = None
    latent_std: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Likeness:
    """Clips that are the same or nearly: ``what`` is "sound", "video" or "latents"; ``similarity`` the lowest."""

    what: str
    ids: tuple[str, ...]
    similarity: float


@dataclass(frozen=True)
class Inspection:
    """A data set.

    Attributes:
        kind: "pairs", "sounds" or "memmap". left_out: (file, reason) of what looks like part of a clip and is none.
        compared: False if there are too many clips to look for near-duplicates; copies of a file are found anyway.
        undecided: pairs of sounds that are alike in their levels, and too many to compare their waveforms.
    """

    folder: str
    kind: str
    clips: list[ClipReport]
    left_out: list[tuple[str, str]]
    alike: list[Likeness]
    compared: bool
    undecided: int = 0

    @property
    def usable(self) -> bool:
        """True if there are clips, and everything in the folder can be used."""
        return bool(self.clips) and not self.left_out and not any(clip.problems for clip in self.clips)


class _Fingerprints:
    """Fingerprints of the clips so far, in the order in which they came."""

    def __init__(self) -> None:
        self.fingerprints: dict[str, list[tuple[str, np.ndarray]]] = {"sound": [], "latents": []}
        self.videos: list[tuple[str, Tensor, np.ndarray]] = []  # id, mean CLIP features, motion
        self.paths: list[Path] = []  # of the sounds that have a fingerprint
        self.hashes: dict[tuple[str, bytes], list[str]] = {}
        self.count = 0

    @property
    def full(self) -> bool:
        return self.count > duplicates.MOST_COMPARED

    def add(self, clip_id: str, what: str, values: Tensor) -> bool:
        """Remember the hash of a clip's content; return True if its fingerprint is wanted too."""
        digest = hashlib.sha256(values.contiguous().numpy().data).digest()
        self.hashes.setdefault((what, digest), []).append(clip_id)
        return not self.full

    def add_sound(self, clip_id: str, path: Path, waveform: Tensor, rate: int) -> None:
        if self.add(clip_id, "sound", waveform):
            self.paths.append(path)
            self.fingerprints["sound"].append((clip_id, duplicates.sound_fingerprint(waveform, rate)))

    def add_latents(self, clip_id: str, mean: Tensor) -> None:
        if self.add(clip_id, "latents", mean):
            self.fingerprints["latents"].append((clip_id, (mean - mean.mean(dim=0)).numpy()))

    def add_video(self, clip_id: str, clip_f: Tensor, sync_f: Tensor) -> None:
        if self.add(clip_id, "video", torch.cat([clip_f.flatten(), sync_f.flatten()])):
            self.videos.append((clip_id, clip_f.mean(dim=0), duplicates.motion_fingerprint(sync_f)))

    def find(self) -> tuple[list[Likeness], int]:
        """Return all groups, and the number of pairs left undecided, see :class:`Inspection`.

        Clips whose content is equal are one even where it has no pattern to compare.
        """
        found, undecided = [], 0
        fine = functools.lru_cache(maxsize=128)(self._fine)  # 1 MB each

        def closely(first: int, second: int) -> float:
            return duplicates.waveform_correlation(fine(first), fine(second))

        if not self.full:
            for what, items in self.fingerprints.items():
                hop_sec = duplicates.HOP_SEC if what == "sound" else DEFAULT_DURATION_SEC / max(
                    (len(values) for _, values in items), default=1)
                groups, open_pairs = duplicates.same_sounds(
                    [values for _, values in items], hop_sec, closely if what == "sound" else None)
                undecided += open_pairs
                found += [Likeness(what, ids, score)
                          for ids, score in duplicates.named_groups(groups, [i for i, _ in items])]
            groups = duplicates.same_videos([v[1] for v in self.videos], [v[2] for v in self.videos])
            found += [Likeness("video", ids, score)
                      for ids, score in duplicates.named_groups(groups, [v[0] for v in self.videos])]
        for (what, _), ids in self.hashes.items():
            if len(ids) > 1 and not any(group.what == what and set(ids) <= set(group.ids) for group in found):
                found.append(Likeness(what, tuple(ids), 1.0))
        return found, undecided

    def _fine(self, index: int) -> Tensor:
        return duplicates.fine_fingerprint(*read_audio(self.paths[index], 0.0, duplicates.FINE_SEC))


def inspect(folder: Path, variant: Variant | None = None, recursive: bool = False) -> Inspection:
    """Return the inspection of a data set; nothing is written, and no weights are needed.

    Args:
        variant: the model to be trained; None takes it from the features, or from the shapes of a memmap.
        recursive: take the sounds and videos in subfolders too; their names become part of the ids.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is no data set, or a memmap that is damaged.
    """
    fingerprints = _Fingerprints()
    left_out: list[tuple[str, str]] = []
    steps: list[Callable[[], ClipReport]]
    if is_memmap(folder):
        kind, rows = "memmap", find_variant(folder, variant)
        steps = [partial(_inspect_row, rows, index, fingerprints) for index in range(len(rows.ids))]
    elif folder.is_dir() and not any(folder.glob("*.npz")):
        kind = "sounds"
        sounds = _sounds_in(folder, recursive)
        listed = folder / PROMPTS_FILE
        prompts = read_prompts(listed, list(sounds)) if listed.is_file() else {}
        steps = [partial(_inspect_sound, id_, path, prompts, variant, fingerprints) for id_, path in sounds.items()]
    else:
        scan = scan_folder(folder)
        kind, left_out = "pairs", [(str(path), reason) for path, reason in scan.skipped]
        steps = [partial(_inspect_pair, clip, variant, fingerprints) for clip in scan.clips]
    if recursive and kind != "sounds":
        log.warning("--recursive has no effect: %s is %s, and training never reads its subfolders", folder,
                    "a memmap" if kind == "memmap" else "a folder of features")
    if not steps and not left_out:
        deeper = "" if recursive else "; --recursive looks into its subfolders for sounds and videos too"
        raise UserError(f"{folder}: holds neither features (.npz) nor sounds ({', '.join(AUDIO_SUFFIXES)}), videos or "
                        f"a memmap (meta.json){deeper}")
    clips = []
    with Progress(len(steps), "inspecting", "clips") as progress:
        for fingerprints.count, measure in enumerate(steps, 1):
            clips.append(measure())
            progress.update(fingerprints.count)
    alike, undecided = fingerprints.find()
    return Inspection(str(folder), kind, clips, left_out, alike, not fingerprints.full, undecided)


def _sounds_in(folder: Path, recursive: bool) -> dict[str, Path]:
    """Return {id: sound or video} of a folder; a sound goes before a video of the same name.

    The ids are those that ``extract_features.py`` gives: ``a_b_dog`` for ``a/b/dog.mp4``.
    """
    found: dict[str, Path] = {}
    order = (*AUDIO_SUFFIXES, *VIDEO_SUFFIXES)
    files = sorted(visible_files(folder, recursive), key=lambda path: path.parts)
    several: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in order:
            several.setdefault("_".join(path.relative_to(folder).with_suffix("").parts), []).append(path)
    for id_, paths in sorted(several.items()):
        paths.sort(key=lambda path: order.index(path.suffix.lower()))
        found[id_] = paths[0]
    if found:
        say_not_taken(folder, files, order, recursive)
        say_choice(folder, several.values())
    return found


# -- pairs and sounds --------------------------------------------------------------------------------------------------


def _inspect_sound(
    id_: str, path: Path, prompts: dict[str, str], variant: Variant | None, fingerprints: _Fingerprints
) -> ClipReport:
    note = path.with_suffix(".txt")
    report = ClipReport(id=id_, path=str(path), prompt=prompts.get(same_name(f"{id_}.npz"), ""))
    if not report.prompt and note.is_file() and note.name != PROMPTS_FILE:
        report.prompt = "".join(read_sidecar(note)[-1:])
    _measure_sound(report, path, variant, fingerprints)
    if report.sound is not None:
        report.duration_sec = report.sound.duration_sec
    return report


def _inspect_pair(clip: FolderClip, variant: Variant | None, fingerprints: _Fingerprints) -> ClipReport:
    report = ClipReport(id=clip.id, path=str(clip.audio_path), prompt=clip.prompt, prompt_source=clip.prompt_source,
                        duration_sec=clip.duration_sec)
    variant = variant or VARIANTS.get(clip.extracted_for)
    if clip.prompt_source == "folder":
        report.notes.append("it has no prompt of its own; the name of the folder is used")
    try:
        bundle = load_features(clip.features_path)
        if variant is not None:
            plan_windows(clip, variant, DEFAULT_DURATION_SEC)
    except (ValueError, OSError) as error:
        report.problems.append(str(error).removeprefix(f"{clip.features_path}: "))
    else:
        if bundle.text_features is not None:
            report.text_norm = bundle.text_features[0].norm(dim=1).mean().item()
        if bundle.has_video:
            _measure_features(report, bundle.clip_features[0], bundle.sync_features[0], fingerprints)
    _measure_sound(report, clip.audio_path, variant, fingerprints)
    if report.sound is not None:
        extra = report.sound.duration_sec - clip.duration_sec
        if extra < -MAX_AUDIO_SHORTFALL_SEC:
            report.notes.append(f"its sound lasts {report.sound.duration_sec:.2f} s, but its features cover "
                                f"{clip.duration_sec:.2f} s: it is padded with silence; or does one of them belong to "
                                "another clip?")
        elif extra > LONGER_SEC:
            report.notes.append(f"its sound lasts {report.sound.duration_sec:.2f} s, but its features cover only the "
                                f"first {clip.duration_sec:.2f} s")
    return report


def _measure_sound(report: ClipReport, path: Path, variant: Variant | None, fingerprints: _Fingerprints) -> None:
    try:
        waveform, rate = read_audio(path)  # (channels, samples)
    except (ValueError, OSError) as error:
        report.problems.append(f"its sound cannot be read: {str(error).removeprefix(f'{path}: ')}")
        return
    if not torch.isfinite(waveform).all():
        report.problems.append("its sound has values that are not finite (NaN or infinite)")
        return
    report.sound = sound = measure_waveform(waveform, rate)
    peak = true_peak_db(waveform, rate)
    report.true_peak_db = peak if math.isfinite(peak) else None
    mono = waveform.mean(dim=0)
    if reason := cancellation(mean_power(waveform), mean_power(mono)):
        report.problems.append(reason)
        return
    if mono.abs().max() <= SILENCE_LEVEL:
        report.problems.append("its sound is silent")
        return
    report.notes += _sound_notes(sound, waveform, mono, variant)
    fingerprints.add_sound(report.id, path, waveform, rate)


def _sound_notes(sound: SoundStats, waveform: Tensor, mono: Tensor, variant: Variant | None) -> Iterator[str]:
    """Yield a sentence for every oddity. A steady sound is none: rain and engines are steady (pitfall J1)."""
    if sound.silent_share > MOSTLY_SILENT:
        # Without the share, which is in the table, so that one line holds all such clips.
        yield f"more than half of it is silent (below {SILENCE_DB:g} dB)"
    if sound.clipped_samples:
        yield f"it is clipped: {counted(sound.clipped_samples, 'sample is', 'samples are')} cut off at full scale"
    if sound.loudness_lufs is not None and sound.loudness_lufs < QUIET_LUFS:
        yield f"it is very quiet ({sound.loudness_lufs:.1f} LUFS), so its noise floor is trained too"
    if variant is not None and sound.rate < SAMPLING_RATES[variant.mode]:
        yield f"it was recorded at {sound.rate} Hz, below the {SAMPLING_RATES[variant.mode]} Hz of {variant.name}"
    together, alone = mono.square().mean(), waveform.square().mean(dim=1).max()
    if together < alone * 10 ** (-CANCELLED_DB / 10):
        yield "its channels are out of phase: as mono, which is trained on, it is much quieter"
    if end := _click(mono, sound.rate):
        yield (f"it has a click at its {end}, more than {CLICK_DB:g} dB above everything else in it: training scales "
               "to the peak, so the rest becomes too quiet")
    if abs(offset := mono.double().mean().item()) > OFFSET:
        yield f"it has a constant offset of {offset:+.3f} of full scale"


def _measure_features(
    report: ClipReport, clip_f: Tensor, sync_f: Tensor, fingerprints: _Fingerprints
) -> None:
    """Fill in the measurements of the (tokens, channels) features of the pictures of a clip."""
    norms, sync_norms = clip_f.norm(dim=1), sync_f.norm(dim=1)
    report.clip_norm, report.sync_norm = (norms.min().item(), norms.max().item()), sync_norms.mean().item()
    for name, rows in (("CLIP", norms), ("sync", sync_norms)):
        if zeros := int((rows == 0).sum()):
            report.notes.append(f"rows of zeros in its {name} features: {zeros} of {len(rows)}. They are padding; "
                                "extract it again")
    seen = norms[norms > 0]
    if len(seen) and (seen - 1).abs().max() > NORM_TOLERANCE:
        report.notes.append(f"its CLIP features have norms from {seen.min():.3f} to {seen.max():.3f}, expected 1: "
                            "another program made them; extract it again")
    fingerprints.add_video(report.id, clip_f, sync_f)


def _click(mono: Tensor, rate: int) -> str | None:
    """Return the end at which a sound peaks far above everything else in it, None if there is none."""
    edge = round(EDGE_SEC * rate)
    inside = mono[edge:-edge].abs().max().item() if len(mono) > 4 * edge else math.inf
    for name, part in (("beginning", mono[:edge]), ("end", mono[-edge:])):
        if part.abs().max().item() > inside * 10 ** (CLICK_DB / 20):
            return name
    return None


# -- memmaps -----------------------------------------------------------------------------------------------------------


def find_variant(folder: Path, wanted: Variant | None) -> MemmapDataset:
    """Return a memmap opened as that of ``wanted``, or of the first variant whose shapes it has.

    Raises:
        FileNotFoundError, ValueError: it is that of no variant, or damaged.
    """
    if wanted is not None:
        return MemmapDataset(folder, wanted)
    problems: list[str] = []
    for name in VARIANTS:
        try:
            return MemmapDataset(folder, get_variant(name))
        except ValueError as error:
            problems.append(str(error))
    raise UserError(min(problems, key=len))  # the one with the fewest complaints


def _inspect_row(rows: MemmapDataset, index: int, fingerprints: _Fingerprints) -> ClipReport:
    report = ClipReport(id=rows.ids[index], path=str(rows.folder), prompt=rows.prompts[index], prompt_source="table",
                        duration_sec=rows.sequence.duration_sec)
    row = {key: torch.from_numpy(values[index]) for key, values in rows.rows.items()}  # each (tokens, ·)
    if bad := [key for key, value in row.items() if not torch.isfinite(value).all()]:
        report.problems.append(f"{' and '.join(bad)} have values that are not finite (NaN or infinite)")
        return report
    report.latent_rms = row["mean"].square().mean().sqrt().item()
    report.latent_std = row["std"].mean().item()
    report.text_norm = row["text_features"].norm(dim=1).mean().item()
    if (row["std"] <= 0).any():
        report.problems.append("its std has values of 0 or below, which the VAE never gives; extract or convert it "
                               "again")
    elif (row["mean"] == row["mean"][:1]).all():
        report.problems.append("its latents never change: never written, or digital silence")
    if not row["text_features"].any():
        report.problems.append("its text features are all zero: the row was never written")
    if not report.prompt:
        report.notes.append("it has no caption")
    fingerprints.add_latents(report.id, row["mean"])
    if rows.has_video:
        _measure_features(report, row["clip_features"], row["sync_features"], fingerprints)
    return report
