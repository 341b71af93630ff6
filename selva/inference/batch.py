"""Batch of sounds: many clips, each with several seeds, each with several setups of the adapters.

    clips --rounds of up to 16--> encode what is not there yet -> sample setup by setup -> decode -> write

Every network is loaded once per round at most (with ``offload="none"`` once in all), a clip that cannot be used does
not stop the others, and what an interrupted run has finished is kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from selva.audio.loudness import TRUE_PEAK_LIMIT_DB
from selva.extraction.manifest import DONE, FAILED, INCOMPLETE_FILE, MANIFEST_FILE, PENDING
from selva.extraction.reader import CLIP_ERRORS
from selva.flow import WHOLE_INTERVAL
from selva.inference.adapter_switch import AdapterPairs
from selva.inference.engine import COMPUTE_ERRORS, SoundGenerator
from selva.inference.outputs import SoundFiles, model_identity, request_identity, sound_fingerprint
from selva.inference.request import Sound, SoundConditions, SoundRequest
from selva.media import audio_length, video_length
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.files import as_utf8, atomic_write_text
from selva.utils.progress import Progress
from selva.utils.text import counted

log = logging.getLogger(__name__)

# The pictures of one round are in memory at once: at full size about 8 MB per second, so 1 GB.
ROUND_CLIPS, ROUND_SEC = 16, 128.0
PART_SEC = 0.1  # a video longer than the sound by more is used in part


@dataclass(frozen=True)
class AdapterSetup:
    """The adapters that sounds are made with, and their files; ``label`` names them in a comparison.

    Attributes:
        adapters: with the layers only in which they are to act, which ``layers`` asked for.
        times: they act from the first to the second; 0 is noise, 1 is sound.
    """

    label: str
    adapters: AdapterPairs
    specs: Sequence[tuple[Path, float]] = ()
    times: tuple[float, float] = WHOLE_INTERVAL
    layers: tuple[str, ...] = ()


def common_clip_features(choice: str, setups: Sequence[AdapterSetup]) -> str:
    """Return ``--clip_features`` for setups that are compared: one for all, so that only the adapters differ.

    "auto" is what the adapters were trained with, for the base model too. If they disagree, it stays: each setup then
    follows its own, and what is heard is the difference of both.
    """
    adapters = [adapter for setup in setups for adapter, _ in setup.adapters]
    if choice != "auto" or len(setups) == 1 or not adapters:
        return choice
    trained = {adapter.clip_features for adapter in adapters}
    if len(trained) == 1:
        return trained.pop()
    log.warning("the adapters were trained with different --clip_features; each is used with its own")
    return choice


@dataclass(frozen=True)
class Variation:
    """One sound to be made.

    Attributes:
        setup: index of its :class:`AdapterSetup`. seed: of its noise.
        files: where it goes. settings: by the names of the flags, written beside it.
    """

    setup: int
    seed: int
    files: SoundFiles
    settings: Mapping[str, Any]


@dataclass
class BatchClip:
    """A request, the variations of it, and their progress.

    Attributes:
        problem: why it failed; "" if it has not.
        kept: variations that were there already.
        made: variations that are there now, kept ones included.
        duration_sec: of the sounds that were made; None if none was.
    """

    name: str
    request: SoundRequest
    variations: Sequence[Variation]
    problem: str = ""
    kept: int = 0
    made: list[Variation] = field(default_factory=list)
    duration_sec: float | None = None

    @property
    def paths(self) -> list[Path]:
        return [path for variation in self.variations if variation in self.made for path in variation.files.written]


class SoundBatch:
    """Makes the variations of all clips.

    Args:
        generator: makes the sounds. setups: of the adapters, one for each value of ``Variation.setup``.
        overwrite: make again what is there already.
        on_clip: called with every clip when it is done or has failed, in order.
    """

    def __init__(
        self, generator: SoundGenerator, setups: Sequence[AdapterSetup], *, overwrite: bool = False,
        on_clip: Callable[[BatchClip], None] | None = None,
    ) -> None:
        self.generator, self.setups, self.overwrite, self.on_clip = generator, setups, overwrite, on_clip
        generator.expect_adapters([a for setup in setups for a, _ in setup.adapters] if len(setups) > 1 else [])
        self.models = []  # identity of the model in every setup
        self.needs_clip = False
        for setup in setups:
            generator.set_adapters(setup.adapters, setup.times)
            self.models.append(model_identity(generator))
            self.needs_clip |= generator.uses_clip

    def run(self, clips: Sequence[BatchClip]) -> None:
        """Make and write everything; the clips then hold the outcome."""
        for first, part in rounds(clips):
            if len(part) < len(clips):
                log.info("clips %d to %d of %d", first + 1, first + len(part), len(clips))
            self._round(part)
            for clip in part:
                if clip.problem:
                    log.error("%s: %s", clip.name, clip.problem)
                if self.on_clip is not None:
                    self.on_clip(clip)

    def _round(self, clips: Sequence[BatchClip]) -> None:
        missing = {id(variation): fingerprint for clip in clips for variation, fingerprint in self._missing(clip)}
        todo = [clip for clip in clips if any(id(variation) in missing for variation in clip.variations)]
        if not todo:
            return

        def failed(index: int, error: Exception) -> None:
            todo[index].problem = _reason(error)

        requests = [clip.request for clip in todo]
        encoded = self.generator.encode(requests, use_clip_features=self.needs_clip, on_error=failed)
        sounds: list[tuple[BatchClip, Variation, SoundConditions]] = []
        for clip, conditions in zip(todo, encoded, strict=True):
            if conditions is not None:
                sounds += [(clip, variation, conditions) for variation in clip.variations if id(variation) in missing]
        latents = self._sample(sounds)
        for clip, variation, conditions in sounds:
            if id(variation) not in latents:  # failed, and said so
                continue
            # One by one: sounds are written as they are made, and not all held in memory.
            try:
                (sound,) = self.generator.decode([conditions], [latents[id(variation)]])
                self._write(clip, variation, sound, missing[id(variation)])
            except CLIP_ERRORS as error:
                log.debug("%s", clip.name, exc_info=True)
                clip.problem = _reason(error)

    def _missing(self, clip: BatchClip) -> Iterator[tuple[Variation, str]]:
        """Yield the variations of a clip that are still to be made, with their fingerprints."""
        try:
            request = request_identity(clip.request)
        except OSError as error:
            clip.problem = f"{error.filename}: {error.strerror}"
            return
        for variation in clip.variations:
            fingerprint = sound_fingerprint(self.models[variation.setup], request, variation.seed)
            if not self.overwrite and variation.files.are_current(fingerprint):
                clip.kept += 1
                clip.made.append(variation)
            else:
                yield variation, fingerprint

    def _sample(self, sounds: Sequence[tuple[BatchClip, Variation, SoundConditions]]) -> dict[int, Tensor]:
        """Return the latents of every variation by its id, made setup by setup."""
        generator, latents, done = self.generator, {}, 0
        groups = [[s for s in sounds if s[1].setup == index] for index in range(len(self.setups))]
        batches = [len(generator.batches([conditions for *_, conditions in group])) for group in groups]
        steps = generator.sampling.num_steps
        with Progress(sum(batches) * steps, "sampling", "steps") as progress:
            for setup, group, count in zip(self.setups, groups, batches, strict=True):
                if not group:
                    continue
                generator.set_adapters(setup.adapters, setup.times)
                latents.update(self._sample_group(
                    group, lambda step, done=done, label=setup.label: progress.update(done + step, label)
                ))
                done += count * steps
        return latents

    def _sample_group(
        self, group: Sequence[tuple[BatchClip, Variation, SoundConditions]], on_step: Callable[[int], None] | None
    ) -> dict[int, Tensor]:
        """Return the latents of variations of one setup; if that fails for them together, each is tried alone."""
        try:
            rows = self.generator.sample([conditions for *_, conditions in group],
                                         [variation.seed for _, variation, _ in group], on_step)
            return {id(variation): row for (_, variation, _), row in zip(group, rows, strict=True)}
        except COMPUTE_ERRORS as error:
            log.debug("sampling", exc_info=True)
            reason = _reason(error)
        if len(group) == 1:
            group[0][0].problem = reason
            return {}
        log.warning("%s cannot be generated together (%s); one by one now", counted(len(group), "sound"), reason)
        latents: dict[int, Tensor] = {}
        for one in group:
            latents.update(self._sample_group([one], None))
        return latents

    def _write(self, clip: BatchClip, variation: Variation, sound: Sound, fingerprint: str) -> None:
        with self.generator.times.stage("writing"):
            variation.files.save(_with_pictures_of_another_variation(sound, clip), variation.settings, fingerprint)
        clip.made.append(variation)
        clip.duration_sec = sound.duration_sec
        name, level = variation.files.written[0], sound.level
        if self.generator.normalize == "none" and level.true_peak > TRUE_PEAK_LIMIT_DB:
            log.warning("%s: %s, which a player may clip; --normalize peak keeps it below %g", name, level,
                        TRUE_PEAK_LIMIT_DB)
        else:
            log.info("%s: %s", name, level)


def _reason(error: Exception) -> str:
    """Return the reason of a failure in words; some errors of libraries say nothing."""
    return str(error) or type(error).__name__


def rounds(clips: Sequence[BatchClip]) -> Iterator[tuple[int, Sequence[BatchClip]]]:
    """Yield (index of the first, clips) of parts whose pictures fit into memory together; one clip at least."""
    first, seconds = 0, 0.0
    for index, clip in enumerate(clips):
        own = _picture_seconds(clip.request)
        if index > first and (index - first == ROUND_CLIPS or seconds + own > ROUND_SEC):
            yield first, clips[first:index]
            first, seconds = index, 0.0
        seconds += own
    if clips:
        yield first, clips[first:]


def _picture_seconds(request: SoundRequest) -> float:
    if request.video is None:
        return 0.0
    wanted = DEFAULT_DURATION_SEC if request.duration_sec is None else request.duration_sec
    if wanted <= DEFAULT_DURATION_SEC:
        return wanted
    try:
        return min(wanted, video_length(request.video))
    except (ValueError, OSError):
        return 0.0  # it will fail by name


def _with_pictures_of_another_variation(sound: Sound, clip: BatchClip) -> Sound:
    """Return the sound with the pictures of a video that was written already, where only a part of them is used.

    A part has to be encoded again, which takes longer than everything else; once per clip is enough.
    """
    written = next((variation.files.video for variation in clip.made if variation.files.video is not None), None)
    if sound.video is None or written is None:
        return sound
    is_part = sound.start_sec > 0 or video_length(sound.video) - sound.duration_sec > PART_SEC
    return replace(sound, video=written, start_sec=0.0) if is_part else sound


class BatchManifest:
    """Results of every clip, one JSON object per line, in the order of the clips.

    While the batch runs, a line is appended for each clip to ``manifest.incomplete.jsonl``; clips that are not in it
    are still to be done. In the end ``manifest.jsonl`` takes its place.

    Args:
        folder: of both; the files of the clips lie in it. num_clips: after which the manifest is complete.
    """

    def __init__(self, folder: Path, num_clips: int) -> None:
        self.folder, self.num_clips = folder, num_clips
        self._lines: list[str] = []

    def add(self, clip: BatchClip) -> None:
        """Record a clip that is done, or has failed."""
        complete = len(clip.made) == len(clip.variations)
        row = {
            "id": clip.name,
            "source": clip.request.source,
            "start_sec": clip.request.start_sec,
            "status": FAILED if clip.problem else DONE if complete else PENDING,
            "reason": clip.problem,
            "files": [path.relative_to(self.folder).as_posix() for path in clip.paths],
            "duration_sec": _duration(clip),
            "seeds": sorted({variation.seed for variation in clip.variations}),
        }
        incomplete, manifest = self.folder / INCOMPLETE_FILE, self.folder / MANIFEST_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(incomplete, "ab" if self._lines else "wb") as file:
            self._lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            file.write(as_utf8(self._lines[-1]))
        if len(self._lines) == 1:
            manifest.unlink(missing_ok=True)  # what it says is no longer certain
        if len(self._lines) == self.num_clips:
            atomic_write_text(manifest, "".join(self._lines))
            incomplete.unlink(missing_ok=True)


def _duration(clip: BatchClip) -> float | None:
    if clip.duration_sec is None and clip.made:  # it was there already
        samples, rate = audio_length(clip.made[0].files.written[0])
        return samples / rate
    return clip.duration_sec
