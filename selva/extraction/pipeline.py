"""The run of an extraction: clips that were read ahead -> encoders -> output, with a line of the manifest for each.

    workers: hash, compare, decode  -->  text, video encoder, CLIP (passes across clips), VAE  -->  write, manifest
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from selva.data.latents import SoundEncoder
from selva.extraction.extractor import FeatureExtractor, FramePasses
from selva.extraction.manifest import DONE, FAILED, SKIPPED, ManifestWriter
from selva.extraction.outputs import EncodedClip, FeatureFiles, MemmapRows
from selva.extraction.reader import READY, ReadClip
from selva.inputs.jobs import ClipJob
from selva.utils.device import peak_memory_bytes
from selva.utils.progress import Progress, StageTimes
from selva.utils.text import counted

log = logging.getLogger(__name__)

MAX_WAITING = 64  # clips on their way through the encoders


class ClipEncoder:
    """Brings clips through the encoders, in their order.

    Args:
        extractor: the encoders. jobs: the whole work list. own: indices of the clips that will come.
        times: collects the seconds of each stage.
    """

    def __init__(
        self, extractor: FeatureExtractor, jobs: Sequence[ClipJob], own: Iterable[int], times: StageTimes
    ) -> None:
        self.extractor, self.jobs, self.times = extractor, jobs, times
        self.sound = SoundEncoder(extractor.variant, extractor.selva_dir, extractor.device)
        self._unread_prompts = {jobs[index].prompt for index in own}

    def encode(self, clips: Iterable[ReadClip]) -> Iterator[tuple[ReadClip, EncodedClip | None]]:
        """Yield the clips in their order, those that were READY with their features.

        A clip that an encoder refuses comes back FAILED. A clip waits until the last of its frames was in a pass, which
        may take frames of the clips after it.
        """
        passes = self.extractor.clip_passes()
        waiting: dict[int, _Waiting] = {}  # in order
        for clip in clips:
            waiting[clip.index] = _Waiting(clip)
            if clip.status == READY:
                self._start(waiting[clip.index], passes, waiting)
            if len(waiting) > MAX_WAITING:  # all current or failed, behind one that waits for more frames
                self._flush(passes, waiting)
            yield from _take_complete(waiting)
        self._flush(passes, waiting)
        yield from _take_complete(waiting)

    @torch.no_grad()
    def _start(self, entry: _Waiting, passes: FramePasses[int], waiting: dict[int, _Waiting]) -> None:
        """Encode everything of a clip but those of its CLIP frames that do not fill a pass yet."""
        clip, prompt = entry.clip, self.jobs[entry.clip.index].prompt
        frames, sync_frames, waveform = clip.clip_frames, clip.sync_frames, clip.waveform
        assert frames is not None and sync_frames is not None  # as the clip is READY
        clip.clip_frames = clip.sync_frames = clip.waveform = None  # not needed twice
        has_video = len(frames) > 0
        try:
            with self.times.stage("text"):
                self.extractor.prepare_texts(self._unread_prompts, sync=has_video)
                self._unread_prompts = set()
                entry.text_features = self.extractor.text_features(prompt)
                if has_video:
                    self.extractor.sync_text(prompt)
            if has_video:
                with self.times.stage("video encoder"):
                    entry.sync_features = self.extractor.sync_features(torch.from_numpy(sync_frames), prompt)
            else:
                assert clip.duration_sec is not None  # READY, so its length is known
                clip_features, entry.sync_features = self.extractor.empty_features(clip.duration_sec)
                entry.clip_features = clip_features[0]
            if waveform is not None:
                with self.times.stage("VAE"):
                    entry.latents = self.sound.encode(torch.from_numpy(waveform))
        except ValueError as error:
            clip.status, clip.reason = FAILED, f"{self.jobs[clip.index].path}: {error}"
            return
        if not has_video:
            return
        with self.times.stage("CLIP"):
            for index, features in passes.add(clip.index, torch.from_numpy(frames)):
                waiting[index].clip_features = features

    def _flush(self, passes: FramePasses[int], waiting: dict[int, _Waiting]) -> None:
        with self.times.stage("CLIP"):
            for index, features in passes.flush():
                waiting[index].clip_features = features


@dataclass
class _Waiting:
    """A clip on its way through the encoders; the tensors as in :class:`selva.extraction.outputs.EncodedClip`."""

    clip: ReadClip
    text_features: Tensor | None = None
    sync_features: Tensor | None = None
    clip_features: Tensor | None = None
    latents: tuple[Tensor, Tensor] | None = None


def _take_complete(waiting: dict[int, _Waiting]) -> Iterator[tuple[ReadClip, EncodedClip | None]]:
    """Yield and remove the complete clips at the front."""
    while waiting:
        first = next(iter(waiting.values()))
        if first.clip.status != READY:
            encoded = None
        elif first.clip_features is None:
            return
        else:
            assert first.sync_features is not None and first.text_features is not None  # made before the last pass
            encoded = EncodedClip(first.clip_features, first.sync_features, first.text_features, first.latents)
        del waiting[first.clip.index]
        yield first.clip, encoded


@dataclass
class Summary:
    """Results of a run over its share of the list, with the time and memory it needed.

    Attributes:
        extracted, current, skipped, failed: numbers of clips.
        seconds: of this process, per stage. reading: of all workers together, per stage.
        memory: peak of this process. worker_memory: peak per worker process; all in bytes.
        elapsed_sec: from the first clip to the end of the last.
        unused: clips whose videos go on, and for how long. silent: clips whose sound is silent.
        scaled: (peak, clip) of sounds that were decoded to more than full scale.
    """

    extracted: int = 0
    current: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reading: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    worker_memory: dict[int, int] = field(default_factory=dict)
    elapsed_sec: float = 0.0
    unused: list[str] = field(default_factory=list)
    scaled: list[tuple[float, str]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def count(self, status: str, encoded: bool) -> None:
        if status == FAILED:
            self.failed += 1
        elif status == SKIPPED:
            self.skipped += 1
        elif encoded:
            self.extracted += 1
        else:
            self.current += 1

    def table(self) -> str:
        """Return lines about the time of every stage and the memory."""
        number = self.extracted + self.current + self.skipped + self.failed
        lines = [f"{'stage':22}{'seconds':>9}{'share':>7}{'ms per clip':>13}"] if self.seconds else []
        for name, seconds in self.seconds.items():
            share, each = seconds / max(self.elapsed_sec, 1e-9), 1000 * seconds / max(number, 1)
            lines.append(f"{name:22}{seconds:9.1f}{share:7.0%}{each:13.1f}")
        if self.reading:
            stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.reading.items())
            where = f"in {counted(len(self.worker_memory), 'worker')}" if self.worker_memory else "in this process"
            lines.append(f"reading, {where}: {stages}")
        workers = max(self.worker_memory.values(), default=0)
        memory = f"peak memory {self.memory / 2**30:.2f} GiB"
        lines.append(memory + (f", of a worker {workers / 2**30:.2f} GiB" if workers else ""))
        return "\n".join(lines)


def run(
    clips: Iterable[ReadClip],
    num_clips: int,
    encoder: ClipEncoder,
    output: FeatureFiles | MemmapRows,
    manifest: ManifestWriter,
    *,
    strict: bool = False,
    announce: Callable[[Path], None] = lambda path: None,
) -> Summary:
    """Encode and write clips and record every one in the manifest; return a summary.

    Args:
        clips: as they were read, in order. num_clips: their number.
        strict: stop at the first clip that failed; the rest stays pending.
        announce: called with the path of every file of features that was written.
    """
    summary, times, started = Summary(seconds=encoder.times.seconds), encoder.times, time.monotonic()
    with Progress(num_clips, "extracting", "clips") as progress:
        for number, (clip, encoded) in enumerate(encoder.encode(_timed(clips, times, summary)), 1):
            job = encoder.jobs[clip.index]
            with times.stage("write"):
                status, reason = _write_result(clip, encoded, job, output)
                unused = unused_words(clip.unused_sec, job) if status == DONE else ""
                silent = clip.silent and status == DONE
                said = "; ".join(filter(None, (reason, unused, "its sound is silent" if silent else "")))
                manifest.record(clip.index, status, said, output.files_of(job, clip) if status == DONE else (),
                                clip.duration_sec if status == DONE else None)
            summary.count(status, encoded is not None)
            if silent:
                summary.silent.append(job.id)
            if unused:
                summary.unused.append(f"{job.id} ({unused})")
            if status == DONE and clip.peak > 1:
                summary.scaled.append((clip.peak, job.id))
            if status == FAILED:
                log.error("%s", reason)
            elif status == SKIPPED:
                log.warning("left out: %s", reason)
            elif reason:
                log.warning("%s", reason)
            path = output.path_of(job) if status == DONE and encoded is not None else None
            if path is not None:
                announce(path)
            progress.update(number, job.id)
            if strict and summary.failed:
                break
    summary.elapsed_sec, summary.memory = time.monotonic() - started, peak_memory_bytes(encoder.extractor.device)
    return summary


def unused_words(seconds: float, job: ClipJob) -> str:
    """Return words about the rest of a video that is not used; "" if there is none."""
    return f"{seconds:.1f} s of {job.start_sec + job.duration_sec + seconds:.1f} s unused" if seconds else ""


def _write_result(
    clip: ReadClip, encoded: EncodedClip | None, job: ClipJob, output: FeatureFiles | MemmapRows
) -> tuple[str, str]:
    """Write the features of a clip, if any; return its status for the manifest, and the reason."""
    status, reason = clip.status, clip.reason
    if encoded is not None:
        try:
            output.write(job, clip, encoded)
            status = DONE
        except (ValueError, OSError) as error:  # values that are not finite, a full disk
            status, reason = FAILED, f"{job.path}: {error}"
    elif status == DONE and not output.confirm(clip.index, clip.digest):
        status, reason = FAILED, f"{job.path}: another process has changed its features meanwhile; run again"
    if status != DONE:
        output.leave_out(clip)
    return status, reason


def _timed(clips: Iterable[ReadClip], times: StageTimes, summary: Summary) -> Iterator[ReadClip]:
    """Yield the clips; count the time that is spent waiting for them, and the seconds that their readers needed."""
    iterator = iter(clips)
    while True:
        with times.stage("waiting for clips"):
            clip = next(iterator, None)
        if clip is None:
            return
        for name, seconds in clip.seconds.items():
            summary.reading[name] = summary.reading.get(name, 0.0) + seconds
        if clip.process not in (0, os.getpid()):
            known = summary.worker_memory.get(clip.process, 0)
            summary.worker_memory[clip.process] = max(known, clip.peak_memory)
        yield clip
