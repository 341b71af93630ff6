"""Summary of a data folder and the warnings about it, to be read before training for hours."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selva.audio.loudness import integrated_loudness
from selva.audio.silence import MOSTLY_SILENT, silent_share
from selva.data.folder_dataset import FolderDataset
from selva.data.memmap.reader import MemmapDataset
from selva.data.plan import PlannedClip
from selva.media import read_audio
from selva.sequence import SAMPLING_RATES
from selva.utils.progress import Progress
from selva.utils.text import clock, counted, listed

FULL_SCALE = 0.999
CLIPPED_RUN = 3  # a single sample at full scale is a normalised peak, several in a row are a cut-off wave

QUIET_LUFS = -50.0
NAMED = 5  # clips that a warning names


@dataclass(frozen=True)
class SoundStats:
    """Measurements of one sound file, all channels.

    Attributes:
        loudness_lufs: integrated loudness, ITU-R BS.1770-4; None for silence and below 0.4 s.
        peak_db: largest sample, relative to full scale; None for digital silence.
        silent_share: of the 50 ms blocks, those below -60 dB RMS. clipped_samples: in runs of 3 or more at full scale.
    """

    duration_sec: float
    rate: int
    channels: int
    loudness_lufs: float | None
    peak_db: float | None
    silent_share: float
    clipped_samples: int


@dataclass(frozen=True)
class ClipSummary:
    """One clip: its sound, its prompt and where that came from, and the stretches of it that are trained on."""

    id: str
    sound: SoundStats
    prompt: str
    prompt_source: str
    features_sec: float
    num_windows: int
    window_sec: float
    has_video: bool = True


@dataclass(frozen=True)
class DataSummary:
    """A data folder before training.

    Attributes:
        same_sound, same_features: groups of ids that share the sound file, or the features of the video.
        left_out: (file, reason) of everything that cannot be used, missing partners among it.
        sampling_rate: of the model, Hz.
    """

    clips: tuple[ClipSummary, ...]
    same_sound: tuple[tuple[str, ...], ...]
    same_features: tuple[tuple[str, ...], ...]
    left_out: tuple[tuple[str, str], ...]
    sampling_rate: int

    def lines(self) -> list[str]:
        """Return a table of the extremes and the totals, one line each; :meth:`warnings` come apart."""
        if not self.clips:
            return [f"no usable clips, {counted(len(self.left_out), 'file')} left out"]
        sounds = [clip.sound for clip in self.clips]
        rows = [
            ("clip, s", [clip.features_sec for clip in self.clips]),
            ("loudness, LUFS", [s.loudness_lufs for s in sounds if s.loudness_lufs is not None]),
            ("peak, dB", [s.peak_db for s in sounds if s.peak_db is not None]),
            ("silence, %", [100 * s.silent_share for s in sounds]),
        ]
        table = [f"{'':16}{'lowest':>9}{'median':>9}{'highest':>9}"]
        table += [
            f"{name:16}{min(values):9.1f}{statistics.median(values):9.1f}{max(values):9.1f}"
            for name, values in rows if values
        ]
        total = clock(sum(clip.features_sec for clip in self.clips))
        prompts = Counter((clip.prompt, clip.prompt_source) for clip in self.clips)
        shown = [f"{prompt!r} x {count} (from {source})" for (prompt, source), count in prompts.most_common()]
        lengths = sorted({clip.window_sec for clip in self.clips})
        trained = f"{lengths[0]:g} s" if len(lengths) == 1 else f"{lengths[0]:g} to {lengths[-1]:g} s"
        return [
            *table,
            f"{counted(len(self.clips), 'clip')}, {total} in all, trained at {trained}, "
            f"{counted(len(self.left_out), 'file')} left out" + self._without_video(),
            f"prompts: {listed(shown, NAMED)}",
        ]

    def _without_video(self) -> str:
        count = sum(not clip.has_video for clip in self.clips)
        return f"; {count} of them sound without pictures" if count else ""

    def warnings(self) -> list[str]:
        """Return one line per kind of trouble, with the clips it concerns."""
        found = [
            ("mostly silence", [c.id for c in self.clips if c.sound.silent_share > MOSTLY_SILENT]),
            ("clipped sound", [c.id for c in self.clips if c.sound.clipped_samples]),
            (f"quieter than {QUIET_LUFS:g} LUFS, so its noise floor is trained too",
             [c.id for c in self.clips if (c.sound.loudness_lufs or 0.0) < QUIET_LUFS]),
            (f"recorded below the {self.sampling_rate} Hz of the model, so without its highest frequencies",
             [c.id for c in self.clips if c.sound.rate < self.sampling_rate]),
            ("no prompt of its own, the name of the folder is used",
             [c.id for c in self.clips if c.prompt_source == "folder"]),
            (f"longer than {max((c.window_sec for c in self.clips), default=0):g} s, trained on in windows",
             [c.id for c in self.clips if c.num_windows > 1]),
        ]
        lines = [f"{counted(len(ids), 'clip')}: {what}: {listed(ids, NAMED)}" for what, ids in found if ids]
        lines += [f"the same sound in {listed(group, NAMED)}: one of them has the wrong sound, or they count twice"
                  for group in self.same_sound]
        lines += [f"the same video in {listed(group, NAMED)}: validation on one of them says nothing about new videos"
                  for group in self.same_features]
        return lines

    def to_json(self) -> str:
        """Return the summary as a JSON object, every clip included."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


MEASURED_ROWS = 500  # of a memmap, spread evenly; all of a large one would take minutes to read


def memmap_lines(clips: MemmapDataset) -> list[str]:
    """Return lines about a memmap as :meth:`DataSummary.lines` has them about a folder: extremes, totals, prompts.

    A memmap holds latents instead of sound, so their size stands for its level, and their deviation for how sure the
    VAE is of them.
    """
    count = min(len(clips), MEASURED_ROWS)
    rows = [index * len(clips) // count for index in range(count)]
    means, stds = clips.rows["mean"], clips.rows["std"]
    measured = [("latents, RMS", [float(np.sqrt(np.square(means[i], dtype=np.float64).mean())) for i in rows]),
                ("deviation", [float(stds[i].mean(dtype=np.float64)) for i in rows])]
    prompts = Counter(clips.prompts)
    shown = [f"{prompt!r} x {number}" for prompt, number in prompts.most_common()]
    some = f" (of {counted(count, 'row')}, spread evenly)" if count < len(clips) else ""
    return [
        f"{'':16}{'lowest':>9}{'median':>9}{'highest':>9}{some}",
        *(f"{name:16}{min(values):9.3f}{statistics.median(values):9.3f}{max(values):9.3f}"
          for name, values in measured),
        f"{counted(len(clips), 'row')} of {clips.sequence.duration_sec:g} s, "
        f"{clock(len(clips) * clips.sequence.duration_sec)} in all, {'with' if clips.has_video else 'without'} video",
        f"prompts: {listed(shown, NAMED)}",
    ]


def summarise(folder: FolderDataset, problems: Iterable[tuple[Path, str]] = ()) -> DataSummary:
    """Return the summary of a prepared folder; files are measured one by one, once, and remembered in its cache.

    Args:
        problems: files that :func:`selva.data.folder_dataset.load_clip_dataset` could not use.
    """
    clips = []
    with Progress(len(folder.clips), "measuring sound", "clips") as progress:
        for number, clip in enumerate(folder.clips, 1):
            clips.append(_summarise_clip(folder, clip))
            progress.update(number)
    folder.cache.flush()
    return DataSummary(
        clips=tuple(clips),
        same_sound=_groups((clip.audio_hash, clip.files.id) for clip in folder.clips),
        same_features=_groups((files.features_hash, files.id) for files in (clip.files for clip in folder.clips)
                              if files.has_video),
        left_out=tuple((str(path), reason) for path, reason in problems),
        sampling_rate=SAMPLING_RATES[folder.variant.mode],
    )


def _summarise_clip(folder: FolderDataset, clip: PlannedClip) -> ClipSummary:
    path = clip.files.audio_path
    stats = folder.cache.note(path, "sound_1", lambda: asdict(measure_sound(path)))
    known = isinstance(stats, dict) and stats.keys() == {field.name for field in fields(SoundStats)}
    return ClipSummary(
        id=clip.files.id, sound=SoundStats(**stats) if known else measure_sound(path), prompt=clip.files.prompt,
        prompt_source=clip.files.prompt_source, features_sec=clip.files.duration_sec, num_windows=len(clip.starts),
        window_sec=clip.sequence.duration_sec, has_video=clip.files.has_video,
    )


def measure_sound(path: Path) -> SoundStats:
    """Return the measurements of one sound file.

    Raises:
        FileNotFoundError, ValueError: it cannot be read.
    """
    return measure_waveform(*read_audio(path))


def measure_waveform(waveform: Tensor, rate: int) -> SoundStats:
    """Return the measurements of (channels, samples)."""
    peak = waveform.abs().max().item()
    return SoundStats(
        duration_sec=waveform.shape[1] / rate, rate=rate, channels=len(waveform),
        loudness_lufs=integrated_loudness(waveform, rate),
        peak_db=20 * math.log10(peak) if peak > 0 else None,
        silent_share=silent_share(waveform, rate),
        clipped_samples=_clipped_samples(waveform),
    )


def _clipped_samples(waveform: Tensor) -> int:
    full = waveform.abs() >= FULL_SCALE
    runs = full.unfold(1, CLIPPED_RUN, 1).all(dim=2) if waveform.shape[1] >= CLIPPED_RUN else full[:, :0]
    clipped = torch.zeros_like(full)
    for offset in range(CLIPPED_RUN):
        clipped[:, offset : offset + runs.shape[1]] |= runs
    return int(clipped.sum())


def _groups(keyed: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Return the ids that share a key with others, in groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, clip_id in keyed:
        groups[key].append(clip_id)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
