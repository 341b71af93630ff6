"""Files of a sound: the sound, the video, the settings beside them, and the test for whether they are current.

    dog.flac  dog.mp4    the sound, and the video with it
    dog.yaml             the settings, which `infer.py --config dog.yaml` reads back. The last line is written last: a
                         fingerprint of everything that decides the sound, contents of files included
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selva.extraction.reader import CLIP_ERRORS
from selva.features import FeatureBundle
from selva.flow import WHOLE_INTERVAL
from selva.inference.engine import SoundGenerator
from selva.inference.request import Sound, SoundRequest
from selva.inputs.file_names import alike, problem_here, tells_case_apart
from selva.inputs.suffixes import OUTPUT_AUDIO_SUFFIXES, OUTPUT_VIDEO_SUFFIXES
from selva.lora.merge import Adapter
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text, source_hash
from selva.utils.settings import settings_text
from selva.utils.version import __version__
from selva.weights.find import content_mark, find_weights, packaged_identity

SETTINGS_SUFFIX = ".yaml"
FINGERPRINT_LINE = "# fingerprint: "

# Part of every fingerprint; raise it when the same settings give another sound.
INFERENCE_VERSION = 1


@dataclass(frozen=True)
class SoundFiles:
    """Paths of one sound; None for what is not written."""

    audio: Path | None
    video: Path | None

    @property
    def written(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.audio, self.video) if path is not None)

    @property
    def settings(self) -> Path:
        return self.written[0].with_suffix(SETTINGS_SUFFIX)

    @property
    def stem(self) -> str:
        """The name that the files share, which may hold dots of its own."""
        return self.written[0].name.removesuffix(self.written[0].suffix)

    def are_current(self, fingerprint: str) -> bool:
        """Return True where everything is there, and was made from what the fingerprint stands for."""
        return all(path.is_file() for path in self.written) and self._fingerprint() == fingerprint

    def foreign(self) -> list[Path]:
        """Return the sounds and videos that are there without our settings beside them, such as a recorded sound."""
        return [] if self._fingerprint() is not None else [path for path in self.written if path.exists()]

    def settings_are_foreign(self) -> bool:
        """Return True if the place of the settings is taken by a file that :meth:`save` has not written."""
        return self.settings.exists() and self._fingerprint() is None

    def _fingerprint(self) -> str | None:
        """Return the fingerprint in the settings that are there; None if there are none, or they are not ours."""
        if not self.settings.is_file():
            return None
        last = self.settings.read_text(encoding="utf-8", errors="replace").rstrip("\n").rsplit("\n", 1)[-1]
        return last.removeprefix(FINGERPRINT_LINE) if last.startswith(FINGERPRINT_LINE) else None

    def save(self, sound: Sound, settings: Mapping[str, Any], fingerprint: str) -> None:
        """Write the sound, the video and the settings; these first without, and in the end with the fingerprint.

        Raises:
            ValueError: the video cannot be written; says where its sound is.
        """
        text = settings_text(settings) + FINGERPRINT_LINE
        atomic_write_text(self.settings, f"{text}unfinished\n")
        if self.audio is not None:  # first: what took long to make is safe, whatever becomes of the video
            sound.save(self.audio)
        if self.video is not None:
            try:
                sound.save(self.video)
            except CLIP_ERRORS as error:
                kept = self.audio or sound.save(_free_name(self.video))
                raise UserError(f"{error}; its sound is kept in {kept}") from error
        atomic_write_text(self.settings, f"{text}{fingerprint}\n")


def _free_name(video: Path) -> Path:
    """Return the path of a .flac beside a video that could not be written, where there is no file yet."""
    endings = itertools.chain([""], (f"_sound{number or ''}" for number in itertools.count()))
    candidates = (video.with_name(f"{video.stem}{ending}.flac") for ending in endings)
    return next(path for path in candidates if not path.exists())


def sound_files(
    output: Path, name: str, video: bool, audio_only: bool = False, number: int | None = None
) -> SoundFiles:
    """Return the files of the sound ``name`` for ``--output``, a folder or the name of a single file.

    Args:
        video: there are pictures. number: of a variation, appended to the name.
    """
    suffix = output.suffix.lower()
    is_file = suffix in OUTPUT_AUDIO_SUFFIXES + OUTPUT_VIDEO_SUFFIXES and not output.is_dir()
    ending = "" if number is None else f"_{number}"
    if is_file:
        path = output.with_name(f"{output.stem}{ending}{output.suffix}")
        return SoundFiles(path, None) if suffix in OUTPUT_AUDIO_SUFFIXES else SoundFiles(None, path)
    stem = output / f"{name}{ending}"
    # Not with_suffix: a name may hold dots of its own.
    with_video = video and not audio_only
    return SoundFiles(Path(f"{stem}.flac"), Path(f"{stem}.mp4") if with_video else None)


# ---------------------------------------------------------------------------------------------------------------
# fingerprints
# ---------------------------------------------------------------------------------------------------------------


def model_identity(generator: SoundGenerator) -> dict[str, Any]:
    """Return everything about a generator, with its adapters of the moment, that decides the bits of a sound.

    Batch size, device and memory settings are left out: they change the rounding at most.
    """
    acting = [(adapter, strength) for adapter, strength in generator.adapters if strength != 0]
    timed = acting and generator.adapter_times != WHOLE_INTERVAL
    return {
        "versions": [__version__, INFERENCE_VERSION],
        "variant": generator.variant.name,
        "weights": _weight_sizes(generator),
        "precision": str(generator.precision),
        **({"stored": str(generator.stored)} if generator.stored != generator.precision else {}),
        "adapters": [[adapter_hash(adapter), strength] for adapter, strength in acting],
        **({"adapter_times": generator.adapter_times} if timed else {}),
        "uses_clip": generator.uses_clip,
        "sampling": asdict(generator.sampling),
        "long": generator.long,
        "level": [generator.normalize, generator.target],
    }


def request_identity(request: SoundRequest) -> dict[str, Any]:
    """Return everything about a request that decides a sound: the contents of its files, not their names.

    Raises:
        OSError: a file cannot be read.
    """
    mask = request.mask
    return {
        "video": _content_hash(request.video),
        "features": _content_hash(request.features),
        "mask": mask and [_content_hash(mask.path), mask.strength, mask.clip, mask.sync],
        "prompts": [request.prompt, request.negative_prompt],
        "range": [request.start_sec, request.duration_sec],
    }


def sound_fingerprint(model: dict[str, Any], request: dict[str, Any], seed: int) -> str:
    """Return 64 hexadecimal digits for the identities of model and request, and a seed."""
    return hashlib.sha256(json.dumps([model, request, seed], sort_keys=True).encode()).hexdigest()


def adapter_hash(adapter: Adapter) -> str:
    """Return the SHA-256 of the tensors and the scales of an adapter, whatever file they came from."""
    digest = hashlib.sha256()
    for key in sorted(adapter.tensors):
        digest.update(key.encode())
        digest.update(adapter.tensors[key].contiguous().numpy().tobytes())
    digest.update(json.dumps([adapter.scale(name) for name in sorted(adapter.layer_names())]).encode())
    return digest.hexdigest()


def _weight_sizes(generator: SoundGenerator) -> list[list[Any]] | str:
    own = generator.own_generator
    if generator.variant.packaged:
        packaged = packaged_identity(generator.variant.name)
        return packaged if own is None else [[packaged], [own.stat().st_size, content_mark(own)]]
    parts = ("vae", "vocoder") if own is not None else ("generator", "vae", "vocoder")
    found = [path for files in find_weights(generator.variant, generator.selva_dir, parts).values() for path in files]
    return [[path.name, path.stat().st_size, content_mark(path)] for path in ([own] if own else []) + found]


def _content_hash(source: Path | FeatureBundle | None) -> str | None:
    if source is None:
        return None
    assert isinstance(source, Path), "fingerprints are for files"
    return source_hash(source)


def shared_names(files: Iterable[SoundFiles]) -> list[Path]:
    """Return the paths that two sounds would both write, whatever the case of their letters where that is one file."""
    seen: dict[Path, None] = {}  # in their order
    shared = []
    for path in (path for one in files for path in (*one.written, one.settings)):
        if path in seen:
            shared.append(path)
        seen[path] = None
    return shared + [path for _, name in alike(map(str, seen)) if not tells_case_apart((path := Path(name)).parent)]


def name_problem(files: Iterable[SoundFiles]) -> str | None:
    """Return in words which file this system cannot have because of its name; None if it can have all."""
    for path in (path for one in files for path in (*one.written, one.settings)):
        if reason := problem_here(path.name):
            return f"{path}: {reason}"
    return None
