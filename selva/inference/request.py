"""One sound from request to file: the request, the conditions of the generator, the finished sound.

    SoundRequest --encoders--> SoundConditions --generator, decoders--> Sound --> .flac, .mp4
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from selva.audio.loudness import LoudnessReport
from selva.features import FeatureBundle
from selva.inputs.suffixes import OUTPUT_VIDEO_SUFFIXES
from selva.media import MaskSettings, mux_video, write_audio
from selva.models.variants import Variant
from selva.sequence import SequenceConfig
from selva.utils.errors import UserError
from selva.utils.text import listed

log = logging.getLogger(__name__)

SHORTER_SEC = 0.1  # so much less sound than was asked for needs no word: two pictures or so


@dataclass(frozen=True)
class SoundRequest:
    """Request for one sound: for a video, for features of one, or for words only.

    Attributes:
        video, features: at most one of them; features are a file of ``extract_features.py`` or a bundle.
        prompt: what is to be heard; None is the prompt of the features, or no words.
        negative_prompt: what is not to be heard.
        start_sec: where in the video the sound begins.
        duration_sec: None is 8 s, with ``long`` all of the video, or what the features cover; never more than video
            or features have.
        mask: which part of the pictures is to be heard.
    """

    video: Path | None = None
    features: Path | FeatureBundle | None = None
    prompt: str | None = None
    negative_prompt: str = ""
    start_sec: float = 0.0
    duration_sec: float | None = None
    mask: MaskSettings | None = None

    def __post_init__(self) -> None:
        if self.video is not None and self.features is not None:
            raise UserError("give a video or features, not both")
        if self.video is None and self.features is None and not self.prompt:
            raise UserError("give a video, features or a prompt")
        if self.video is None and (self.start_sec or self.mask is not None):
            raise UserError("a start and a mask belong to a video; features have theirs already")

    @property
    def source(self) -> str:
        """The name of the request in messages."""
        if isinstance(self.features, FeatureBundle):
            return "features"
        return str(self.video or self.features or repr(self.prompt))


@dataclass(frozen=True)
class SoundConditions:
    """Conditions of the generator for one sound; features (1, tokens, channels) float32 on the CPU.

    Attributes:
        sequence: all lengths. prompt: the words in ``text_f``.
        clip_f: kept where it is known, whether or not it will be passed. clip_f, sync_f: None where there is no
            picture, which becomes the empty features. negative: None is the empty text.
    """

    request: SoundRequest
    sequence: SequenceConfig
    prompt: str
    clip_f: Tensor | None
    sync_f: Tensor | None
    text_f: Tensor
    negative: Tensor | None


@dataclass(frozen=True)
class Sound:
    """A finished sound.

    Attributes:
        waveform: (samples,) float32 on the CPU, full scale 1. rate: samples per second.
        level: how loud it was and what was done about it.
        video: the pictures that it belongs to, from ``start_sec``; None if there are none.
    """

    waveform: Tensor
    rate: int
    level: LoudnessReport
    video: Path | None = None
    start_sec: float = 0.0

    @property
    def duration_sec(self) -> float:
        return len(self.waveform) / self.rate

    def save(self, path: str | Path) -> Path:
        """Write the sound (.flac, .wav), or its video with the sound (.mp4, .mov, .mkv, .m4v); return the path.

        Raises:
            ValueError: another suffix, or a video is to be written of a sound that was made for none.
        """
        path = Path(path)
        if path.suffix.lower() not in OUTPUT_VIDEO_SUFFIXES:
            write_audio(path, self.waveform, self.rate)
        elif self.video is None:
            raise UserError(f"{path}: the sound was not made for a video, so there are no pictures; write a .flac")
        else:
            mux_video(self.video, self.waveform, self.rate, path, self.start_sec, self.duration_sec)
        return path


def warn_of_shorter(lengths: Iterable[tuple[str, float | None, float]]) -> None:
    """Log a warning that names what is shorter than the length that was asked for.

    Args:
        lengths: name, seconds that were asked for (None: nobody asked), seconds that video or features have.
    """
    shorter = [f"{name} ({found:.4g} instead of {asked:g} s)" for name, asked, found in lengths
               if asked is not None and found < asked - SHORTER_SEC]
    if shorter:
        log.warning("video or features end before the length that was asked for, and the sound with them: %s",
                    listed(shorter))


def check_widths(conditions: SoundConditions, variant: Variant) -> None:
    """Raise a ValueError if features from a file are not those of the variant's encoders."""
    config = variant.generator
    for what, features, width in (
        ("clip_features", conditions.clip_f, config.clip_dim),
        ("sync_features", conditions.sync_f, config.sync_dim),
        ("text_features", conditions.text_f, config.text_dim),
    ):
        if features is not None and features.shape[2] != width:
            raise UserError(f"{conditions.request.source}: {what} are {features.shape[2]} wide, but {variant.name} "
                             f"takes {width}; extract again with --variant {variant.name}")
