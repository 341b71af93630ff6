"""The part of an extraction that needs no encoder: read clips, in worker processes ahead of the encoders.

For every clip of a work list: hash its content, see whether its features are current, and if not, decode its pictures
and its sound. Results come in the order of the list, whatever the number of workers, and a few at a time, so memory
does not depend on the length of the list. A clip that cannot be read does not stop the others, not even one whose
decoder crashes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

from selva.data.latents import FRONT_END
from selva.extraction.clip_sound import UnusableClip, is_silent, sound_file, sound_seconds, unused_seconds, vae_waveform
from selva.extraction.contact_sheet import check_place, sheet_digest, write_contact_sheet
from selva.extraction.extractor import clip_settings
from selva.extraction.manifest import DONE, FAILED, SKIPPED
from selva.extraction.pairs import PairFolder, StagedSound
from selva.features import NO_PICTURES, FeatureBundle
from selva.inputs.jobs import ClipJob
from selva.media import SELVA_FILL_SEC, MaskSettings, VideoFrames, copy_audio, extract_audio, read_video
from selva.media.container import check_file
from selva.models.variants import get_variant
from selva.sequence import DEFAULT_DURATION_SEC, SequenceConfig, sequence_config
from selva.utils import torchrun
from selva.utils.device import peak_memory_bytes
from selva.utils.errors import UserError
from selva.utils.files import as_utf8, source_hash
from selva.utils.logging import setup_logging
from selva.utils.progress import StageTimes
from selva.weights.find import encoders_identity

log = logging.getLogger(__name__)

Item = TypeVar("Item")

STATE_FOLDER = ".extract"  # in the output folder
READY = "ready"  # beside the words of the manifest: to be encoded

# What can go wrong with one clip, in our code or in the libraries that decode it.
CLIP_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)

_AHEAD = 2  # clips per worker that wait to be encoded; one of 8 s has 58 MB at full size


@dataclass(frozen=True)
class ReadSettings:
    """Settings for reading clips, the same for all of a list.

    Attributes:
        variant: name; its encoders decide the sizes of the pictures.
        precision: of the encoders, as it is stored with the features.
        output_dir: of the feature files; None for rows of a memmap, where every clip is 8 s with sound.
        audio: "extract", "copy" or "none": the sound file beside the features.
        latents: whether sound is wanted for the VAE too.
        overwrite: read clips whose features are current, too.
        mask_strength, mask_clip, mask_sync: see :class:`selva.media.MaskSettings`.
        preview_dir: where a picture of what the encoders see goes.
        weights: identity of the encoders' weights, see :func:`selva.weights.find.weights_identity`.
        sound_only: pictures do not count.
    """

    variant: str
    precision: str
    output_dir: Path | None
    audio: str = "extract"
    latents: bool = False
    overwrite: bool = False
    mask_strength: float = 1.0
    mask_clip: bool = True
    mask_sync: bool = True
    preview_dir: Path | None = None
    weights: str = ""
    sound_only: bool = False

    @property
    def is_memmap(self) -> bool:
        return self.output_dir is None

    def mask_of(self, job: ClipJob) -> MaskSettings | None:
        return job.mask and MaskSettings(job.mask, self.mask_strength, self.mask_clip, self.mask_sync)


@dataclass
class ReadClip:
    """A clip as it was read. Arrays instead of tensors: they travel between processes without shared memory, of which
    containers have little.

    Attributes:
        index: in the work list.
        status: READY to be encoded; DONE if its features are current; SKIPPED or FAILED.
        reason: why it failed or was skipped, else a remark.
        settings: that decide the features. digest: of these settings.
        clip_frames, sync_frames: uint8, see :class:`selva.media.VideoFrames`; empty where pictures do not count.
        waveform: (samples,) float32 for the VAE, at the model's rate.
        duration_sec: of the clip. fps: of the file, 0.0 if it does not say.
        sound: the sound beside the features, which waits to be placed with them.
        unused_sec: what follows in the video, if nobody has chosen this stretch of it.
        peak: largest sample of the decoded sound; what is above 1 was scaled to fit.
        silent: there is a sound beside the features, and nothing in it.
        seconds: per stage of reading. process, peak_memory: of the process that read it.
    """

    index: int
    status: str
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    clip_frames: np.ndarray | None = None
    sync_frames: np.ndarray | None = None
    waveform: np.ndarray | None = None
    duration_sec: float | None = None
    fps: float = 0.0
    sound: StagedSound = field(default_factory=StagedSound)
    unused_sec: float = 0.0
    peak: float = 0.0
    silent: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    process: int = 0
    peak_memory: int = 0

    @property
    def sound_file(self) -> str:
        """Name of the sound beside the features, "" if there is none."""
        return self.sound.file


class ClipReader(Dataset[ReadClip]):
    """Reads clip ``index`` of a list with ``reader[index]``; never raises for what is wrong with a clip.

    Args:
        jobs: the whole work list. settings: how to read it.
        digests: of the rows that a memmap holds already: index -> digest.
        pairs: what is known of the output folder; None for a memmap, or to look.
    """

    def __init__(
        self, jobs: Sequence[ClipJob], settings: ReadSettings, digests: dict[int, str] | None = None,
        pairs: PairFolder | None = None,
    ) -> None:
        self.jobs, self.settings, self.digests = list(jobs), settings, digests or {}
        if pairs is None and settings.output_dir is not None:
            pairs = PairFolder(settings.output_dir, settings.output_dir / STATE_FOLDER)
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> ReadClip:
        times = StageTimes()
        try:
            clip = self._read(index, times)
        except UnusableClip as error:
            clip = ReadClip(index, SKIPPED, str(error))
        except CLIP_ERRORS as error:
            log.debug("%s", self.jobs[index].path, exc_info=True)
            clip = ReadClip(index, FAILED, str(error) or type(error).__name__)
        if clip.status in (READY, DONE):
            clip.unused_sec = unused_seconds(self.jobs[index], self.settings.sound_only)
        clip.seconds, clip.process, clip.peak_memory = times.seconds, os.getpid(), peak_memory_bytes("cpu")
        return clip

    def _read(self, index: int, times: StageTimes) -> ReadClip:
        job, options = self.jobs[index], self.settings
        if options.preview_dir is not None:
            check_place(options.preview_dir / f"{job.id}.png", options.overwrite)
        with times.stage("hash"):
            settings = self._settings(job)
        digest = self._digest(index, settings)
        with times.stage("compare"):
            sound_name, remark = ("", "") if options.is_memmap else sound_file(job, options.audio)
            bundle = None if options.is_memmap else self.pairs.features(job.id)
            own_sound: list[str] = []
            current = self._current(index, settings, digest, sound_name, bundle, own_sound)
            if current is None and bundle is not None and not options.overwrite:
                self.pairs.check_features(job, bundle, settings["source_sha256"])
        if current is not None:
            self._preview(job, times)
            kept = (bundle.origin or {}).get("sound", "") if bundle is not None else ""
            remark, sound = "".join(own_sound) or remark, StagedSound(file=sound_name or kept)
            silent = options.output_dir is not None and bool(sound.file) and is_silent(options.output_dir / sound.file)
            return ReadClip(index, DONE, remark, settings, digest, duration_sec=current, sound=sound, silent=silent)
        with times.stage("decode"):
            frames = self._frames(job)
        peaks: list[float] = []
        with times.stage("sound"):
            sound = (StagedSound() if options.is_memmap else
                     self._stage(job, frames, sound_name, settings, bundle, peaks))
            waveform, why_not = self._waveform(job, frames.duration_sec)
            silent = bool(sound_name) and is_silent(self.pairs.staging_path(sound_name))
        self._preview(job, times, frames)
        return ReadClip(
            index, READY, "; ".join(filter(None, (remark, why_not))), settings, digest, frames.clip_frames.numpy(),
            frames.sync_frames.numpy(), waveform, frames.duration_sec, frames.source_fps, sound,
            peak=max(peaks, default=0.0), silent=silent,
        )

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _digest(self, index: int, settings: dict[str, Any]) -> str:
        """Return the digest of a row: that of an earlier version, which did not note the weights, while it is there."""
        earlier = digest_of(settings)
        if not self.settings.weights or self.digests.get(index) == earlier:
            return earlier
        return digest_of({**settings, "weights": self.settings.weights})

    @property
    def pairs(self) -> PairFolder:
        """Features and sounds of the output folder, which a memmap does not have."""
        assert self._pairs is not None
        return self._pairs

    def _settings(self, job: ClipJob) -> dict[str, Any]:
        options, variant = self.settings, get_variant(self.settings.variant)
        mask = options.mask_of(job)
        described = None
        if mask is not None:
            described = {"sha256": _file_hash(mask.path), "strength": mask.strength, "clip": mask.clip,
                         "sync": mask.sync}
        settings = clip_settings(
            job.path, _file_hash(job.path), job.prompt, job.start_sec, job.duration_sec, encoders_identity(variant),
            options.precision, described,
        )
        if job.other_prompts and not options.is_memmap:  # a row has one
            settings["other_prompts"] = list(job.other_prompts)
        if job.sound is not None:
            settings["sound_sha256"] = _file_hash(job.sound)
        if options.sound_only:
            settings |= NO_PICTURES
        if options.latents:
            settings["latents"] = {"mode": variant.mode, "front_end": FRONT_END, "normalize": "peak"}
        return settings

    def _current(
        self, index: int, settings: dict[str, Any], digest: str, sound_name: str, bundle: FeatureBundle | None,
        remarks: list[str],
    ) -> float | None:
        """Return the seconds of a clip whose features need not be made again, else None; add remarks on its sound."""
        if self.settings.overwrite:
            return None
        if self.settings.is_memmap:
            return DEFAULT_DURATION_SEC if self.digests.get(index) == digest else None
        if bundle is None or bundle.settings != settings:
            return None
        if (bundle.origin or {}).get("weights", self.settings.weights) != self.settings.weights:
            return None  # earlier versions did not note them
        is_current, remark = self.pairs.sound_is_current(self.jobs[index], sound_name, bundle)
        remarks += [remark] if remark else []
        return bundle.duration if is_current else None

    # -- pictures and sound --------------------------------------------------------------------------------------------

    def _frames(self, job: ClipJob) -> VideoFrames:
        """Return the pictures of a clip; none, but its length, where they do not count."""
        variant = get_variant(self.settings.variant)
        if self.settings.sound_only:
            none, seconds = torch.empty(0, dtype=torch.uint8), sound_seconds(job)
            return VideoFrames(none, none, seconds, job.duration_sec, job.start_sec, 0.0, (0, 0), 0)
        frames = read_video(
            job.path, job.duration_sec, job.start_sec, clip_size=variant.clip_image_size,
            sync_size=variant.sync_image_size, sync_crop=variant.sync_crop, fill_sec=SELVA_FILL_SEC,
            mask=self.settings.mask_of(job),
        )
        if self.settings.is_memmap and frames.duration_sec != DEFAULT_DURATION_SEC:
            raise UnusableClip(f"{job.path}: has {frames.duration_sec:.2f} s of pictures from {job.start_sec:g} s, but "
                               f"every row of a memmap is {DEFAULT_DURATION_SEC:g} s; train on it as .npz")
        return frames

    def _lengths(self, duration_sec: float) -> tuple[SequenceConfig, float]:
        """Return the lengths of a clip, and the seconds of its sound.

        The latent frames reach up to one frame beyond the clip; sound that is there is taken along for them.
        """
        lengths = sequence_config(get_variant(self.settings.variant).mode, duration_sec)
        return lengths, lengths.num_audio_frames / lengths.sampling_rate

    def _stage(
        self, job: ClipJob, frames: VideoFrames, sound_name: str, settings: dict[str, Any],
        bundle: FeatureBundle | None, peaks: list[float],
    ) -> StagedSound:
        """Write the sound to where it waits for its features; add its peak to ``peaks`` if it was decoded."""
        if not sound_name:
            return self.pairs.without_sound(job, settings, bundle)
        target = self.pairs.staging_path(sound_name)
        if self.settings.audio == "copy":
            copy_audio(job.sound or job.path, target, job.start_sec)
        else:
            extract_audio(job.sound or job.path, target, job.start_sec, self._lengths(frames.duration_sec)[1], peaks)
        return self.pairs.stage(job, sound_name, bundle, self.settings.overwrite)

    def _waveform(self, job: ClipJob, duration_sec: float) -> tuple[np.ndarray | None, str]:
        """Return the waveform for the VAE and a remark on it, or the reason why there is none."""
        options = self.settings
        lengths, seconds = self._lengths(duration_sec)
        if not options.latents:
            return None, ""
        try:
            return vae_waveform(job, seconds, lengths)
        except UnusableClip as error:
            if options.is_memmap:
                raise
            return None, f"{error}; its features are written without latents"

    def _preview(self, job: ClipJob, times: StageTimes, frames: VideoFrames | None = None) -> None:
        """Write a picture of what the encoders see; ``frames`` is None for a clip whose features are current."""
        if self.settings.preview_dir is None:
            return
        path = self.settings.preview_dir / f"{job.id}.png"
        digest = digest_of(self._settings(job))
        if frames is None and sheet_digest(path) == digest:
            return
        with times.stage("preview"):
            write_contact_sheet(path, frames or self._frames(job), f"{job.id}: {job.prompt}", digest=digest)


def digest_of(settings: dict[str, Any]) -> str:
    """Return a SHA-256 over settings, 64 hexadecimal digits."""
    return hashlib.sha256(as_utf8(json.dumps(settings, sort_keys=True, ensure_ascii=False))).hexdigest()


@functools.lru_cache(maxsize=256)
def _hash_of(path: Path, *_status: int) -> str:
    return source_hash(path)


def _file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; the windows of one video read it once."""
    check_file(path)  # with words that belong into a manifest
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


# ---------------------------------------------------------------------------------------------------------------
# in worker processes
# ---------------------------------------------------------------------------------------------------------------


def default_workers(num_clips: int) -> int:
    """Return the number of processes that read clips ahead: the cores, shared by the processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // torchrun.local_world_size()
    if share < 2 or num_clips < 3:  # starting one takes longer than reading a clip
        return 0
    return min(8, share - 1, num_clips)


def read_clips(reader: ClipReader, indices: Sequence[int], num_workers: int, debug: bool = False) -> Iterator[ReadClip]:
    """Yield the clips of ``indices`` in this order, read by ``num_workers`` processes; 0 reads them in this one."""
    if num_workers == 0:
        yield from map(reader.__getitem__, indices)
        return
    position = 0
    while position < len(indices):
        try:
            for clip in _loader(reader, indices[position:], num_workers, debug):
                position += 1
                yield clip
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            _check_start()
            log.warning("a process that reads videos has died; the next clips are read one by one to find the cause")
            suspects = indices[position : position + num_workers * (_AHEAD + 1)]
            for index in suspects:
                position += 1
                yield _read_alone(reader, index, debug)


def _read_alone(reader: ClipReader, index: int, debug: bool) -> ReadClip:
    """Return a clip that is read by a process of its own, which may crash."""
    try:
        (clip,) = _loader(reader, [index], 1, debug)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = f"{reader.jobs[index].path}: the process that read it died; the file is damaged, or memory ran out"
        return ReadClip(index, FAILED, reason)
    return clip


def _check_start() -> None:
    """Raise if processes end before they read anything: each imports the main script first, which may do its work."""
    idle = _context().Process(target=_unchanged, args=(None,))
    idle.start()
    idle.join()
    if idle.exitcode:
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        raise UserError(f"{script}: a process that was to read videos has ended before it read one (exit code "
                        f"{idle.exitcode}); it imports this script first, so what the script does has to stand under "
                        "if __name__ == \"__main__\": in it, or take workers=0")


def _context() -> Any:
    # Forking a process that uses a GPU or threads is not safe; a server that has only imported this module can.
    methods = torch.multiprocessing.get_all_start_methods()
    context = torch.multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["selva.extraction.reader", "av", "soundfile", "torchvision.transforms.v2"])
    return context


def _loader(reader: ClipReader, indices: Sequence[int], num_workers: int, debug: bool) -> Iterator[ReadClip]:
    return iter(DataLoader(
        reader, sampler=indices, batch_size=None, num_workers=min(num_workers, len(indices)), prefetch_factor=_AHEAD,
        multiprocessing_context=_context(), collate_fn=_unchanged,
        worker_init_fn=functools.partial(_set_up_worker, debug),
    ))


def _unchanged(item: Item) -> Item:
    return item


def _set_up_worker(debug: bool, _worker: int) -> None:
    setup_logging(debug)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the main process is gone, however it ended.

    A worker that hands over a clip may wait for ever for somebody to take it, and the fork server for the worker:
    DataLoader's own watchdog takes that server for the main process.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
