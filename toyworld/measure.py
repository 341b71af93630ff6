"""Measuring a model in the world: scenes with a prompt each -> generated sounds -> numbers.

    cases --ToyGenerator.encode--> features --ToyGenerator.sounds--> waveforms --scores--> timing F1, class accuracy

What is measured is what a user gets: the encoders, the generator, the VAE and the vocoder as they are shipped, the
settings of ``infer.py``. Pictures are handed over as rendered, without a video file between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selva.extraction.extractor import FeatureExtractor
from selva.flow import SamplingConfig
from selva.models.generator import Generator
from selva.models.variants import get_variant
from selva.models.zoo import build_mel
from selva.sampling import decode_latents, sample_latents
from selva.sequence import sequence_config
from selva.utils.errors import UserError
from selva.weights.load import load_vae, load_vocoder
from toyworld.classes import CLASSES
from toyworld.judging import RATE, Classifier, timing
from toyworld.scene import Scene, make_scene

MEASURE_SEED = 8_000_000  # scenes of measurements; no training uses seeds from here on
_BATCH = 4  # sounds sampled at once; more is slower on a CPU

Report = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    """One thing to make a sound for: an object of a scene, and the words for it."""

    scene: Scene
    index: int
    prompt: str

    @property
    def name(self) -> str:
        """Class that should be heard."""
        return self.scene.objects[self.index].name

    def events(self) -> list[float]:
        """Return the true times of its object."""
        return self.scene.events(self.index).tolist()

    def other_events(self) -> list[float]:
        """Return the true times of the other object of a scene with two."""
        return self.scene.events(1 - self.index).tolist()


@dataclass(frozen=True)
class EncodedCases:
    """The features of a case, (1, tokens, channels) each on the CPU."""

    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor


def single_cases(names: Sequence[str], count: int, first_seed: int, duration_sec: float = 8.0) -> list[Case]:
    """Return ``count`` scenes of every class alone, in turn, each with one of its wordings."""
    cases = []
    for number in range(count):
        for offset, name in enumerate(names):
            seed = first_seed + number * len(names) + offset
            scene = make_scene(seed, [name], duration_sec=duration_sec)
            cases.append(Case(scene, 0, scene.prompt(np.random.default_rng([seed, 7]))))
    return cases


def pair_cases(count: int, first_seed: int, duration_sec: float = 8.0) -> list[Case]:
    """Return two cases for each of ``count`` scenes with two objects of trained classes: one naming either object."""
    cases = []
    for seed in range(first_seed, first_seed + count):
        scene = make_scene(seed, list(CLASSES), 2, duration_sec)
        rng = np.random.default_rng([seed, 7])
        cases += [Case(scene, index, scene.prompt(rng, index)) for index in (0, 1)]
    return cases


class ToyGenerator:
    """The networks of a variant around its generator.

    Args:
        variant: its name. clip_features: True to give the generator CLIP features of the pictures.
    """

    def __init__(
        self, variant: str, device: torch.device, sampling: SamplingConfig | None = None, clip_features: bool = False
    ) -> None:
        self.variant, self.device, self.clip_features = get_variant(variant), device, clip_features
        self.sampling = sampling or SamplingConfig()
        self.extractor = FeatureExtractor(self.variant, None, device)
        self.vae, self.vocoder = load_vae(variant, None, device), load_vocoder(variant, None, device)
        self.mel = build_mel(self.variant.mode).to(device)

    def encode(self, cases: Sequence[Case], report: Report | None = None) -> list[EncodedCases]:
        """Return the features of every case."""
        encoded = []
        for case in cases:
            clip, sync = (
                torch.from_numpy(case.scene.frames(fps, size)).permute(0, 3, 1, 2).contiguous()  # (T, 3, size, size)
                for fps, size in ((8, self.variant.clip_image_size), (25, self.variant.sync_image_size))
            )
            encoded.append(EncodedCases(
                self.extractor.clip_features(clip), self.extractor.sync_features(sync, case.prompt),
                self.extractor.text_features(case.prompt),
            ))
            if report:
                report(len(encoded))
        return encoded

    @torch.no_grad()
    def latents(
        self, generator: Generator, encoded: Sequence[EncodedCases], duration_sec: float, first_seed: int = 0,
        negatives: Sequence[str] | None = None, sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """Return (B, N, C) latents; item i is sampled with seed ``first_seed + i``, independent of the rest."""
        sequence = sequence_config(self.variant.mode, duration_sec)
        generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
        result = []
        for begin in range(0, len(encoded), _BATCH):
            part = encoded[begin : begin + _BATCH]
            clip, sync, text = (
                torch.cat([getattr(item, name) for item in part]).to(self.device)
                for name in ("clip_f", "sync_f", "text_f")
            )
            if not self.clip_features:
                clip = generator.empty_features(len(part))[0]
            negative = None
            if negatives is not None:
                words = negatives[begin : begin + _BATCH]
                negative = torch.cat([self.extractor.text_features(word) for word in words]).to(self.device)
            seeds = range(first_seed + begin, first_seed + begin + len(part))
            result.append(sample_latents(
                generator, clip, sync, text, seeds, sampling or self.sampling, negative_text=negative
            ))
        return torch.cat(result)

    @torch.no_grad()
    def decode(self, latents: Tensor, duration_sec: float) -> list[np.ndarray]:
        """Return the waveforms (samples,) of (B, N, C) latents, one by one, which is faster on a CPU."""
        samples = round(duration_sec * RATE)
        return [decode_latents(x[None], self.vae, self.vocoder)[0, :samples].cpu().numpy() for x in latents]

    def sounds(
        self, generator: Generator, encoded: Sequence[EncodedCases], duration_sec: float, report: Report | None = None,
        first_seed: int = 0, **options,
    ) -> list[np.ndarray]:
        """Return a generated sound (samples,) for every item; ``options`` go to :meth:`latents`."""
        sounds: list[np.ndarray] = []
        negatives = options.pop("negatives", None)
        for begin in range(0, len(encoded), _BATCH):
            part = slice(begin, begin + _BATCH)
            latents = self.latents(
                generator, encoded[part], duration_sec, first_seed + begin,
                None if negatives is None else negatives[part], **options,
            )
            sounds += self.decode(latents, duration_sec)
            if report:
                report(len(sounds))
        return sounds

    @torch.no_grad()
    def through_codec(self, sound: np.ndarray) -> np.ndarray:
        """Return (samples,) as VAE and vocoder give it back: the best that any generator could reach."""
        duration_sec = len(sound) / RATE
        whole = np.zeros(sequence_config(self.variant.mode, duration_sec).num_audio_frames, dtype=np.float32)
        whole[: len(sound)] = sound
        mean, _ = self.vae.encode(self.mel(torch.from_numpy(whole)[None].to(self.device)))
        return self.decode(mean.mT, duration_sec)[0]


# ---------------------------------------------------------------------------------------------------------------
# scores
# ---------------------------------------------------------------------------------------------------------------


def timing_f1(sounds: Sequence[np.ndarray], events: Sequence[Sequence[float]]) -> list[float]:
    """Return the F1 of the onsets of every sound against the events that belong to it."""
    return [timing(sound, times).f1 for sound, times in zip(sounds, events, strict=True)]


def recognised(sounds: Sequence[np.ndarray], names: Sequence[str], classifier: Classifier) -> list[bool]:
    """Return True for every sound that is classified as what it should be."""
    return [classifier.classify(sound) == name for sound, name in zip(sounds, names, strict=True)]


def shuffled_events(cases: Sequence[Case]) -> list[list[float]]:
    """Return for every case the events of another scene, of the same class where there are several.

    A sound judged by them is what a model would get that knows how often things happen, but not when.

    Raises:
        ValueError: all cases are of one scene.
    """
    if len({case.scene.seed for case in cases}) < 2:
        raise UserError("one scene alone cannot be judged by the events of another")
    result = []
    for i, case in enumerate(cases):
        others = [j for j, other in enumerate(cases) if j != i and other.scene.seed != case.scene.seed]
        same = [j for j in others if cases[j].name == case.name]
        chosen = (same or others)[i % len(same or others)]
        result.append(cases[chosen].events())
    return result


def mean(values: Sequence[float]) -> float:
    """Return the mean as a plain number; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
