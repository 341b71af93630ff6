"""Many sounds in one run: clips, each with several seeds, each under several settings of the adapters.

    clips --rounds of up to 16--> encode what is not there yet -> sample setting by setting -> decode -> write

Every network is loaded once per round at most (with ``offload="none"`` once in all), a clip that cannot be used does
not stop the others, and what an interrupted run has finished is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from selva.audio.loudness import TRUE_PEAK_LIMIT_DB
from selva.extraction.manifest import DONE, FAILED, INCOMPLETE_FILE, MANIFEST_FILE, PENDING
from selva.inference.adapter_switch import AdapterPairs
from selva.inference.engine import SoundGenerator
from selva.inference.outputs import SoundFiles, fingerprint, model_recipe, request_recipe
from selva.inference.request import Conditions, Sound, SoundRequest
from selva.media import audio_length, video_length
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.files import atomic_write_text
from selva.utils.metrics_log import Progress

log = logging.getLogger(__name__)

# The pictures of one round are in memory at once: at full size about 8 MB per second, so 1 GB.
ROUND_CLIPS, ROUND_SEC = 16, 128.0
PART_SEC = 0.1  # a video longer than the sound by more is used in part


@dataclass(frozen=True)
class Setting:
    """The adapters that sounds are made with, and their files; ``label`` names them in a comparison."""

    label: str
    adapters: AdapterPairs
    specs: Sequence[tuple[Path, float]] = ()


def common_clip_features(choice: str, settings: Sequence[Setting]) -> str:
    """Return ``--clip_features`` for settings that are compared: one for all, so that only the adapters differ.

    "auto" is what the adapters were trained with, for the base model too. If they disagree, it stays: each setting then
    follows its own, and what is heard is the difference of both.
    """
    adapters = [adapter for setting in settings for adapter, _ in setting.adapters]
    if choice != "auto" or len(settings) == 1 or not adapters:
        return choice
    trained = {adapter.meta.get("clip_features", "use") for adapter in adapters}
    if len(trained) == 1:
        return trained.pop()
    log.warning("the adapters were trained with different --clip_features; each is heard with its own")
    return choice


@dataclass(frozen=True)
class Take:
    """One sound to be made.

    Attributes:
        setting: index of its setting. seed: of its noise.
        files: where it goes. settings: what is written beside it.
    """

    setting: int
    seed: int
    files: SoundFiles
    settings: argparse.Namespace


@dataclass
class Clip:
    """A request, the takes of it, and what became of them.

    Attributes:
        problem: why it failed; "" if it has not.
        kept: takes that were there already.
        made: takes that are there now, kept ones included.
    """

    name: str
    request: SoundRequest
    takes: Sequence[Take]
    problem: str = ""
    kept: int = 0
    made: list[Take] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        return [path for take in self.takes if take in self.made for path in take.files.written]


class SoundBatch:
    """Makes the takes of all clips.

    Args:
        generator: makes the sounds. settings: of the adapters, one for each value of ``Take.setting``.
        overwrite: make again what is there already.
        on_clip: called with every clip when it is done or has failed, in order.
    """

    def __init__(
        self, generator: SoundGenerator, settings: Sequence[Setting], *, overwrite: bool = False,
        on_clip: Callable[[Clip], None] | None = None,
    ) -> None:
        self.generator, self.settings, self.overwrite, self.on_clip = generator, settings, overwrite, on_clip
        generator.expect_adapters([a for setting in settings for a, _ in setting.adapters] if len(settings) > 1 else [])
        self.recipes = []
        self.needs_clip = False
        for setting in settings:
            generator.set_adapters(setting.adapters)
            self.recipes.append(model_recipe(generator))
            self.needs_clip |= generator.uses_clip

    def run(self, clips: Sequence[Clip]) -> None:
        """Make and write everything; what happened stands in the clips afterwards."""
        for first, part in rounds(clips):
            if len(part) < len(clips):
                log.info("clips %d to %d of %d", first + 1, first + len(part), len(clips))
            self._round(part)
            for clip in part:
                if clip.problem:
                    log.error("%s: %s", clip.name, clip.problem)
                if self.on_clip is not None:
                    self.on_clip(clip)

    def _round(self, clips: Sequence[Clip]) -> None:
        prints = {id(take): mark for clip in clips for take, mark in self._missing(clip)}
        todo = [clip for clip in clips if any(id(take) in prints for take in clip.takes)]
        if not todo:
            return

        def failed(index: int, error: Exception) -> None:
            todo[index].problem = str(error)

        encoded = self.generator.encode([clip.request for clip in todo], clip=self.needs_clip, on_error=failed)
        sounds: list[tuple[Clip, Take, Conditions]] = []
        for clip, conditions in zip(todo, encoded, strict=True):
            if conditions is not None:
                sounds += [(clip, take, conditions) for take in clip.takes if id(take) in prints]
        latents = self._sample(sounds)
        for clip, take, conditions in sounds:
            # One by one: sounds are written as they are made, and not all held in memory.
            try:
                (sound,) = self.generator.decode([conditions], [latents[id(take)]])
                self._write(clip, take, sound, prints[id(take)])
            except (ValueError, OSError) as error:
                clip.problem = str(error)

    def _missing(self, clip: Clip) -> Iterator[tuple[Take, str]]:
        """Yield the takes of a clip that are still to be made, with their fingerprints."""
        try:
            request = request_recipe(clip.request)
        except OSError as error:
            clip.problem = f"{error.filename}: {error.strerror}"
            return
        for take in clip.takes:
            mark = fingerprint(self.recipes[take.setting], request, take.seed)
            if not self.overwrite and take.files.are_current(mark):
                clip.kept += 1
                clip.made.append(take)
            else:
                yield take, mark

    def _sample(self, sounds: Sequence[tuple[Clip, Take, Conditions]]) -> dict[int, Tensor]:
        """Return the latents of every take by its id, made setting by setting."""
        generator, latents, done = self.generator, {}, 0
        groups = [[s for s in sounds if s[1].setting == index] for index in range(len(self.settings))]
        batches = [len(generator.batches([conditions for *_, conditions in group])) for group in groups]
        steps = generator.sampling.num_steps
        with Progress(sum(batches) * steps, "sampling", "steps") as progress:
            for setting, group, count in zip(self.settings, groups, batches, strict=True):
                if not group:
                    continue
                generator.set_adapters(setting.adapters)
                rows = generator.sample(
                    [conditions for *_, conditions in group], [take.seed for _, take, _ in group],
                    lambda step, done=done, label=setting.label: progress.update(done + step, label),
                )
                latents.update((id(take), row) for (_, take, _), row in zip(group, rows, strict=True))
                done += count * steps
        return latents

    def _write(self, clip: Clip, take: Take, sound: Sound, mark: str) -> None:
        with self.generator.times.stage("writing"):
            take.files.save(_with_pictures_of_another_take(sound, clip), take.settings, mark)
        clip.made.append(take)
        name, level = take.files.written[0], sound.level
        if self.generator.normalize == "none" and level.true_peak > TRUE_PEAK_LIMIT_DB:
            log.warning("%s: %s, which a player may clip; --normalize peak keeps it below %g", name, level,
                        TRUE_PEAK_LIMIT_DB)
        else:
            log.info("%s: %s", name, level)


def rounds(clips: Sequence[Clip]) -> Iterator[tuple[int, Sequence[Clip]]]:
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


def _with_pictures_of_another_take(sound: Sound, clip: Clip) -> Sound:
    """Return the sound with the pictures of a video that was written already, where only a part of them is used.

    A part has to be encoded again, which takes longer than everything else; once per clip is enough.
    """
    written = next((take.files.video for take in clip.made if take.files.video is not None), None)
    if sound.video is None or written is None:
        return sound
    is_part = sound.start_sec > 0 or video_length(sound.video) - sound.duration_sec > PART_SEC
    return replace(sound, video=written, start_sec=0.0) if is_part else sound


def _duration(clip: Clip) -> float | None:
    if not clip.made:
        return None
    samples, rate = audio_length(clip.made[0].files.written[0])
    return samples / rate


def write_manifest(folder: Path, clips: Sequence[Clip], finished: bool) -> Path:
    """Write what became of every clip, one JSON object per line, in the order of the clips; return the path."""
    lines = []
    for clip in clips:
        complete = len(clip.made) == len(clip.takes)
        row = {
            "id": clip.name,
            "source": clip.request.source,
            "start_sec": clip.request.start_sec,
            "status": FAILED if clip.problem else DONE if complete else PENDING,
            "reason": clip.problem,
            "files": [str(path.relative_to(folder)) for path in clip.paths],
            "duration_sec": _duration(clip),
            "seeds": sorted({take.seed for take in clip.takes}),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = folder / (MANIFEST_FILE if finished else INCOMPLETE_FILE)
    atomic_write_text(path, "".join(lines))
    (folder / (INCOMPLETE_FILE if finished else MANIFEST_FILE)).unlink(missing_ok=True)
    return path
