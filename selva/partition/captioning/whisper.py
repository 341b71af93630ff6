"""Whisper of a local folder: what is said in a recording, with the times at which it is said.

    sound (samples,) at 16 kHz --Whisper--> Transcript: language, SpokenSegment(start_sec, end_sec, text) ...

The network, its search and its rules for long recordings are those of transformers (Radford et al., arXiv:2212.04356,
section 3.8).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selva.media.audio import SILENCE_LEVEL
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.errors import UserError
from selva.utils.text import listed
from selva.weights.transformers_folder import load_from_folder

log = logging.getLogger(__name__)

EXAMPLE = "openai/whisper-small"
WHISPER_RATE = 16000
JOIN_GAP_SEC = 1.0  # a short segment joins one that is nearer than this
# Whisper's own: it tries again with more chance where it repeats itself or is unsure, and hears no speech in the rest.
SEARCH = {"temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "compression_ratio_threshold": 2.4, "logprob_threshold": -1.0,
          "no_speech_threshold": 0.6}


@dataclass(frozen=True)
class SpokenSegment:
    """Words, and the seconds from the beginning of the recording between which they are said."""

    start_sec: float
    end_sec: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """Everything that is said in a recording, and the code of the language, "" where nothing is said."""

    language: str
    segments: tuple[SpokenSegment, ...]


class Whisper:
    """Whisper of a local folder.

    Args:
        language: code of the language; None hears it.

    Raises:
        UserError: the folder holds no Whisper model that transformers can read, or the model knows no such language.
    """

    def __init__(self, folder: Path, device: torch.device, language: str | None = None) -> None:
        self.device = device
        self.model, self.processor = load_from_folder(
            folder, "WhisperForConditionalGeneration", "WhisperProcessor", EXAMPLE)
        self.model.to(device)
        settings = self.model.generation_config
        if getattr(settings, "no_timestamps_token_id", None) is None:
            raise UserError(f"{folder}: its generation_config.json names no tokens for times; take the one of the "
                            f"model that it was trained from, such as {EXAMPLE}")
        self.languages = [token.strip("<|>") for token in getattr(settings, "lang_to_id", None) or ()]
        self.is_multilingual = bool(getattr(settings, "is_multilingual", False))
        known = self.languages if self.is_multilingual else ["en"]
        if language is not None and language not in known:
            raise UserError(f"--language {language}: {folder} knows {listed(sorted(known), 100)}")
        self.language = language

    @torch.inference_mode()
    def transcribe(self, sound: Tensor, seed: int = 42) -> Transcript:
        """Return the words in (samples,) at 16 kHz; none in digital silence."""
        seconds = len(sound) / WHISPER_RATE
        if not len(sound) or sound.abs().max().item() <= SILENCE_LEVEL:
            return Transcript("", ())
        extractor = self.processor.feature_extractor
        is_long = len(sound) > extractor.n_samples
        features = extractor(
            sound.numpy(), sampling_rate=WHISPER_RATE, return_tensors="pt", return_attention_mask=True,
            truncation=not is_long, padding="longest" if is_long else "max_length",
        ).to(self.device)  # input_features (1, mels, frames of 10 ms)
        language = self.language or self._hear_language(features["input_features"])
        chosen = {"language": language, "task": "transcribe"} if self.is_multilingual else {}
        torch.manual_seed(seed)
        with _quiet():
            found = self.model.generate(
                **features, return_timestamps=True, return_segments=True, **SEARCH, **chosen)
        segments = []
        for part in found["segments"][0]:
            text = self.processor.tokenizer.decode(part["tokens"], skip_special_tokens=True)
            start, end = (min(max(float(part[key]), 0.0), seconds) for key in ("start", "end"))
            segments.append(SpokenSegment(round(start, 3), round(end, 3), " ".join(text.split())))
        return Transcript(language, tuple(s for s in segments if s.text and s.start_sec < s.end_sec))

    def _hear_language(self, features: Tensor) -> str:
        """Return the code of the language of the first 30 s."""
        if not self.is_multilingual:
            return "en"
        frames = self.processor.feature_extractor.nb_max_frames
        token = self.model.detect_language(features[:, :, :frames])[0].item()
        settings = self.model.generation_config
        return next(name.strip("<|>") for name, number in settings.lang_to_id.items() if number == token)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling users how programmers are to call it."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def merge_short(
    segments: Iterable[SpokenSegment], below_sec: float, longest_sec: float = DEFAULT_DURATION_SEC
) -> list[SpokenSegment]:
    """Return segments, of which those shorter than ``below_sec`` have joined the one beside them where that is near.

    Args:
        longest_sec: a joined segment has at most this length.
    """
    merged: list[SpokenSegment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if (
            last is not None
            and min(last.end_sec - last.start_sec, segment.end_sec - segment.start_sec) < below_sec
            and segment.start_sec - last.end_sec < JOIN_GAP_SEC
            and segment.end_sec - last.start_sec <= longest_sec
        ):
            end_sec = max(last.end_sec, segment.end_sec)
            merged[-1] = SpokenSegment(last.start_sec, end_sec, f"{last.text} {segment.text}")
        else:
            merged.append(segment)
    return merged
