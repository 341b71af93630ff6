"""Sets of sound without pictures: windows of recordings, with captions -> rows of a memmap.

    clips.tsv, captions.tsv, recordings/ --plan_audio_set--> jobs --AudioSetExtractor--> mean, std, text_features

As MMAudio prepares such data: the level of a whole recording is normalised before it is cut, every window is resampled
on its own and cut to the length of the model. A recording is read once for all of its windows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from selva.audio.config import Normalize
from selva.data.latents import FRONT_END, SoundEncoder
from selva.data.memmap.labels import is_missing_there
from selva.data.memmap.writer import MemmapWriter
from selva.extraction.extractor import FeatureExtractor
from selva.extraction.manifest import DONE, FAILED, SKIPPED, ManifestWriter
from selva.extraction.pipeline import Summary
from selva.inputs.file_names import same_name
from selva.media import audio_blocks, prepare_audio, probe
from selva.media.audio import PEAK_LEVEL, SILENCE_LEVEL, cancellation, mean_power
from selva.models.prompt_length import warn_of_cut_prompts
from selva.models.variants import Variant
from selva.partition.cut import collect_recordings
from selva.partition.windows import WINDOW_SEC, Window, clip_captions, read_captions, read_clips
from selva.sequence import DEFAULT_DURATION_SEC, SequenceConfig, sequence_config
from selva.utils.device import peak_memory_bytes
from selva.utils.errors import UserError
from selva.utils.files import source_hash
from selva.utils.progress import Progress
from selva.utils.text import counted, listed
from selva.weights.find import encoders_identity, weights_identity

log = logging.getLogger(__name__)

# Part of the settings that decide whether existing rows are current; raise it when the rows change.
AUDIO_SET_VERSION = 1
READ_AHEAD = 2  # recordings per thread
ROUNDING_SEC = 0.01
NAMED = 20  # clips left out, in the log; the manifest has all

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SoundJob:
    """One row to be made: a window of a recording, and its caption.

    Attributes:
        path: the recording; None if there is none of that name.
        problem: reason why the row cannot be made; "" as far as is known before the recording is read.
    """

    window: Window
    path: Path | None
    caption: str
    problem: str = ""


def plan_audio_set(clips: Path, captions: Path, data_dir: Path, recursive: bool = False) -> list[SoundJob]:
    """Return a job for every clip of a table, in its order.

    Args:
        clips: ``clips.tsv`` of ``partition_clips.py``.
        captions: a table of captions, whose ids are names of recordings or ids of clips.
        data_dir: the recordings; of two with one name, FLAC goes before WAV and WAV before the others.
        recursive: take its subfolders too, as ``partition_clips.py --recursive`` does.

    Raises:
        FileNotFoundError: a table or the folder does not exist.
        ValueError: a table is none, an id comes twice, or not a single clip has both a recording and a caption.
    """
    windows, texts = read_clips(clips), read_captions(captions)
    paths = {same_name(name): path for name, path in collect_recordings(data_dir, recursive)[0].items()}
    if twice := [clip_id for clip_id, count in Counter(window.id for window in windows).items() if count > 1]:
        raise UserError(f"{clips}: {listed(twice)} come more than once, every clip needs an id of its own")
    try:
        found = clip_captions(windows, texts, paths)
    except ValueError as error:
        raise UserError(f"{captions}: {error}") from error
    jobs = []
    for window in windows:
        path, caption, problem = paths.get(same_name(window.name)), found.get(window.id, ""), ""
        if path is None:
            problem = f"{data_dir}: no recording called {window.name} (.flac, .wav or another kind) in this folder"
        elif is_missing_there(caption):
            found_there = f" but {caption!r}, which MMAudio takes for none" if caption else ""
            problem = f"{captions}: has no caption for {window.name}{found_there}"
        jobs.append(SoundJob(window, path, caption, problem))
    known = {same_name(name) for window in windows for name in (window.id, window.name)}
    # A table of captions serves the training and the held-out clips; those of the other part are no mistake.
    others = {name for name in set(texts) - known if name in paths or name.rpartition("_")[0] in paths}
    if others:
        log.info("%s: %s not needed: for recordings in %s that are not in %s",
                 captions, counted(len(others), "caption"), data_dir,
                 clips.name)
    if unused := sorted(set(texts) - known - others):
        log.warning("%s: no clip for %s", captions, listed(unused))
    if all(job.problem for job in jobs):
        raise UserError(jobs[0].problem if jobs else f"{clips}: there are no clips in it")
    return jobs


# -- sound -------------------------------------------------------------------------------------------------------------


def read_windows(
    path: Path, windows: Sequence[Window], sequence: SequenceConfig, normalize: Normalize = "peak"
) -> list[Tensor | str]:
    """Return for each window of a recording its (samples,) float32 for the model, or the reason why it cannot be used.

    Memory holds the windows, never the recording.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, silent or not finite.
    """
    pieces: list[list[Tensor]] = [[] for _ in windows]
    position, peak, rate = 0, 0.0, 0
    energy = mono_energy = 0.0
    for block, block_rate in audio_blocks(path):
        mono, rate = block.mean(dim=0), block_rate
        energy, mono_energy = energy + mean_power(block) * len(mono), mono_energy + mean_power(mono) * len(mono)
        if not torch.isfinite(mono).all():
            raise UserError(f"{path}: the sound has values that are not finite (NaN or infinite)")
        peak = max(peak, mono.abs().max().item())
        for window, kept in zip(windows, pieces, strict=True):
            part = mono[max(0, window.start_sample - position) : max(0, window.end_sample - position)]
            if len(part):  # many empty ones in between would keep freed blocks from being used again
                kept.append(part.clone())
        position += len(mono)
    if reason := cancellation(energy / max(1, position), mono_energy / max(1, position)):
        raise UserError(f"{path}: {reason}")
    if peak <= SILENCE_LEVEL:
        raise UserError(f"{path}: the sound is silent (peak {peak:.1e}, expected more than {SILENCE_LEVEL:.0e})")
    results: list[Tensor | str] = []
    for window, kept in zip(windows, pieces, strict=True):
        if window.end_sample > position:
            results.append(f"{path}: has {counted(position, 'sample')}, but the clip ends at {window.end_sample}; run "
                           "partition_clips.py again")
            continue
        sound = torch.cat(kept)
        where = f"{path}, {window.id} ({window.start_sample / rate:.2f} to {window.end_sample / rate:.2f} s)"
        if len(sound) < sequence.duration_sec * rate:
            results.append(f"{where}: is {len(sound) / rate:.2f} s long, and a row takes {sequence.duration_sec:g} s")
            continue
        if normalize == "peak":
            sound = sound / peak * PEAK_LEVEL
        try:
            results.append(prepare_audio(sound, rate, sequence.sampling_rate, sequence.num_audio_frames, "none"))
        except ValueError as error:
            results.append(f"{where}: {error}")
    return results


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundResult:
    """Result of one row.

    Attributes:
        index: of the job. made: False if the row was current already, or could not be made.
        problem: reason why it could not be made; "" if it is there.
        left_out: it could be read, and cannot be a row of such a set.
        unused: words about the rest of the clip, behind what a row takes; "" if there is none.
    """

    index: int
    made: bool
    problem: str = ""
    left_out: bool = False
    unused: str = ""


@dataclass
class _Recording:
    """A recording that has been read: digests of its rows, and the sound of those that are not current."""

    indices: list[int]
    digests: list[str]
    sounds: list[Tensor | str | None]  # None: current
    problem: str = ""  # of the whole recording
    rate: int = 0


class AudioSetExtractor:
    """Makes the rows of an audio set; the VAE and the text encoder are loaded when the first one is to be made.

    Args:
        extractor: brings the variant, where its weights are, and the device. The mel front end and the VAE run in
            float32 in any case.
        normalize: "none" keeps the level of the recordings.
        num_workers: threads that read and resample ahead.
    """

    def __init__(self, extractor: FeatureExtractor, normalize: Normalize = "peak", num_workers: int = 2) -> None:
        self.extractor, self.num_workers = extractor, num_workers
        self.normalize: Normalize = normalize
        self.variant: Variant = extractor.variant
        self.sequence = sequence_config(self.variant.mode)
        self.sound = SoundEncoder(extractor.variant, extractor.selva_dir, extractor.device)
        self._known: dict[int, str] = {}  # digests of the rows that are there

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the content of all rows alike."""
        return {
            "audio_set_version": AUDIO_SET_VERSION, "front_end": FRONT_END, "mode": self.variant.mode,
            "encoders": encoders_identity(self.variant), "normalize": self.normalize,
            "precision": str(self.extractor.precision).removeprefix("torch."),
        }

    def open_writer(self, folder: Path, jobs: Sequence[SoundJob]) -> MemmapWriter:
        """Return the writer of a set, see there; ``jobs`` are those of all processes."""
        # A row with a problem is never published; what stands for its caption meanwhile does not matter.
        rows = [(job.window.id, "no caption" if is_missing_there(job.caption) else job.caption) for job in jobs]
        windows = [[job.window.start_sample, job.window.end_sample] for job in jobs]
        recipe = hashlib.sha256(json.dumps([windows, self.weights]).encode()).hexdigest()
        return MemmapWriter(folder, self.variant, rows, video=False, settings=self.settings(), recipe=recipe)

    def run(
        self, jobs: Sequence[SoundJob], writer: MemmapWriter, share: Iterable[int] | None = None
    ) -> Iterator[SoundResult]:
        """Make the rows that are not current, and yield the result of each, recording by recording.

        Args:
            share: indices of the rows that this process is to make; None for all.
        """
        self._known = writer.digests()
        groups: dict[Path, list[int]] = {}
        share = range(len(jobs)) if share is None else list(share)
        captions = [(jobs[index].window.id, jobs[index].caption) for index in share]
        warn_of_cut_prompts(captions, self.variant.clip)
        for index in share:
            job = jobs[index]
            if job.problem:
                writer.skip(index)
                yield SoundResult(index, made=False, problem=job.problem)
            else:
                assert job.path is not None  # else it has a problem
                groups.setdefault(job.path, []).append(index)

        def read(group: tuple[Path, list[int]]) -> _Recording:
            path, indices = group
            return self._read(path, [jobs[index] for index in indices], indices, writer)

        for recording in ahead(read, list(groups.items()), self.num_workers):
            for number, index in enumerate(recording.indices):
                yield self._finish(jobs[index], index, recording, number, writer)
                if recording.sounds:
                    recording.sounds[number] = None  # lets go of it

    @functools.cached_property
    def weights(self) -> str:
        """Identity of the weights, see :func:`selva.weights.find.weights_identity`."""
        return weights_identity(self.variant, self.extractor.selva_dir, ("clip_text", "vae"))

    def _digest(self, content: str, job: SoundJob, index: int) -> str:
        """Return the digest of a row: that of an earlier version, which did not note the weights, while it is there."""
        earlier = _digest(content, job)
        if not self.weights or self._known.get(index) == earlier:
            return earlier
        return hashlib.sha256(f"{earlier} {self.weights}".encode()).hexdigest()

    def _read(self, path: Path, jobs: Sequence[SoundJob], indices: list[int], writer: MemmapWriter) -> _Recording:
        """Return the sound of the windows of one recording whose rows are not current."""
        try:
            content = source_hash(path)
            digests = [self._digest(content, job, index) for job, index in zip(jobs, indices, strict=True)]
            current = [writer.is_current(index, digest) for index, digest in zip(indices, digests, strict=True)]
            windows = [job.window for job, done in zip(jobs, current, strict=True) if not done]
            found = iter(read_windows(path, windows, self.sequence, self.normalize) if windows else ())
            rate = probe(path).audio_rate or 0
            return _Recording(indices, digests, [None if done else next(found) for done in current], rate=rate)
        except (ValueError, OSError) as error:
            return _Recording(indices, [], [], str(error))

    @torch.no_grad()
    def _finish(
        self, job: SoundJob, index: int, recording: _Recording, number: int, writer: MemmapWriter
    ) -> SoundResult:
        sound, unused = recording.problem or recording.sounds[number], self._unused(job.window, recording.rate)
        if sound is None:
            return SoundResult(index, made=False, unused=unused)
        if isinstance(sound, str):
            writer.skip(index)
            return SoundResult(index, made=False, problem=sound, left_out=not recording.problem)
        try:
            mean, std = self.sound.encode(sound)
            text = self.extractor.text_features(job.caption)
            rows = {"mean": mean[0], "std": std[0], "text_features": text[0]}
            writer.write(index, rows, recording.digests[number])
        except ValueError as error:
            writer.skip(index)
            return SoundResult(index, made=False, problem=f"{job.path}: {error}")
        return SoundResult(index, made=True, unused=unused)

    def _unused(self, window: Window, rate: int) -> str:
        """Return words about a clip that goes on behind what a row takes, by more than resampling needs."""
        seconds = (window.end_sample - window.start_sample) / rate if rate else 0.0
        if seconds <= WINDOW_SEC + ROUNDING_SEC:
            return ""
        return f"{seconds - self.sequence.duration_sec:.1f} s of {seconds:.1f} s unused"


def _digest(content: str, job: SoundJob) -> str:
    """Return a digest of everything that decides a row, but for the settings of the set."""
    decides = [content, job.window.start_sample, job.window.end_sample, job.caption]
    return hashlib.sha256(json.dumps(decides, ensure_ascii=False).encode()).hexdigest()


def ahead(function: Callable[[Item], Result], items: Sequence[Item], num_workers: int) -> Iterator[Result]:
    """Yield the results of a function in the order of the items; threads work a few items ahead.

    Args:
        num_workers: threads; 0 does everything when it is asked for.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > READ_AHEAD * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # where the caller has stopped early


def run_sounds(
    results: Iterable[SoundResult],
    num_clips: int,
    jobs: Sequence[SoundJob],
    manifest: ManifestWriter,
    folder_name: str,
    strict: bool = False,
) -> Summary:
    """Record the rows of a set of sound in the manifest while they are made; return a summary.

    Args:
        results: see :meth:`selva.extraction.audio_set.AudioSetExtractor.run`. num_clips: their number.
        folder_name: of the memmap.
        strict: stop at the first clip that failed; the rest stays pending.
    """
    summary, started, told, left_out = Summary(), time.monotonic(), set(), 0
    with Progress(num_clips, "encoding sound", "clips") as progress:
        for number, result in enumerate(results, 1):
            status = SKIPPED if result.left_out else FAILED if result.problem else DONE
            manifest.record(result.index, status, result.problem or result.unused,
                            [folder_name] if status == DONE else (),
                            DEFAULT_DURATION_SEC if status == DONE else None)
            summary.count(status, result.made)
            if result.unused and not result.problem:
                summary.unused.append(f"{jobs[result.index].window.id} ({result.unused})")
            if result.left_out:
                left_out += 1
                if left_out <= NAMED:
                    log.warning("left out: %s", result.problem)
            elif result.problem and result.problem not in told:  # the clips of one recording share theirs
                told.add(result.problem)
                log.error("%s", result.problem)
            progress.update(number, jobs[result.index].window.id)
            if strict and summary.failed:
                break
    if left_out > NAMED:
        log.warning("left out: %d more, the manifest has all", left_out - NAMED)
    summary.elapsed_sec, summary.memory = time.monotonic() - started, peak_memory_bytes("cpu")
    return summary
