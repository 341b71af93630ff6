"""Judging sounds of the world: when something happens in them, and which class they are of.

Both are fitted or checked on the world's own sound only and know nothing of any model, so they judge all alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selva.audio.metrics import EventMatch, match_events, onset_times
from selva.models.zoo import build_mel
from toyworld.classes import CLASSES, UNSEEN
from toyworld.scene import make_scene

RATE = 16_000
REFRACTORY_SEC = 0.2  # events of the world are further apart; nearer onsets are the inner structure of one sound
END_SEC = 0.1  # in the world nothing begins so close to the end
_BANDS = 20  # neighbouring mel bands are pooled, so that a vocoder's fine errors do not matter
_RANGE = 2.0  # decades of amplitude below the loudest band that count
_SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity
FIT_SEED = 9_000_000  # the classifier's scenes; neither training nor benchmarks use seeds from here on


def heard_events(sound: np.ndarray, rate: int = RATE) -> list[float]:
    """Return the times in seconds at which something happens in (samples,); where the sound is cut off is no event."""
    times: list[float] = []
    for time in onset_times(torch.from_numpy(np.asarray(sound, dtype=np.float32)), rate):
        if time > len(sound) / rate - END_SEC:
            break
        if not times or time - times[-1] > REFRACTORY_SEC:
            times.append(time)
    return times


def timing(sound: np.ndarray, true_times: Iterable[float], rate: int = RATE) -> EventMatch:
    """Return the match of the events heard in (samples,) and the true times, within 80 ms."""
    return match_events(heard_events(sound, rate), list(true_times))


def sound_statistics(sound: np.ndarray) -> np.ndarray:
    """Return (80,) statistics of (samples,) at 16 kHz that tell its timbre, independent of level and timing.

    Of the log mel in 20 pooled bands, clipped to two decades below the loudest: its mean over the frames that are
    not silent, its 95th percentile, and mean rise and fall from frame to frame where it changes.
    """
    mel = build_mel("16k")(torch.from_numpy(np.asarray(sound, dtype=np.float32))[None])[0].numpy()  # (80, T)
    bands = np.log10((10**mel).reshape(_BANDS, -1, mel.shape[1]).mean(axis=1) + 1e-5)  # (20, T)
    top = np.percentile(bands.max(axis=0), 99)
    bands = np.clip(bands - top, -_RANGE, 0)
    active = bands.max(axis=0) > -1.2
    change = np.diff(bands, axis=1)
    sounding = bands[:, active] if active.any() else bands
    rise, fall = np.maximum(change, 0).sum(axis=1), np.minimum(change, 0).sum(axis=1)
    moving = np.maximum((np.abs(change) > 0.05).sum(axis=1), 1)
    return np.concatenate([sounding.mean(axis=1), np.percentile(bands, 95, axis=1), rise / moving, fall / moving])


@dataclass(frozen=True)
class Classifier:
    """Linear discriminant analysis of :func:`sound_statistics`: one mean per class, one covariance for all.

    Attributes:
        names: (K,) of the classes. means: (K, D). precision: (D, D) inverse covariance.
    """

    names: tuple[str, ...]
    means: np.ndarray
    precision: np.ndarray

    def scores(self, sound: np.ndarray) -> np.ndarray:
        """Return (K,) log probabilities up to a constant."""
        offset = sound_statistics(sound) - self.means  # (K, D)
        return -0.5 * np.einsum("kd,de,ke->k", offset, self.precision, offset)

    def classify(self, sound: np.ndarray) -> str:
        """Return the class that (samples,) at 16 kHz sounds like; "silence" if there is nothing to judge."""
        if not np.abs(sound).max() > 1e-4:
            return "silence"
        return self.names[int(self.scores(sound).argmax())]


def _heard_through_air(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the sound with a little noise and a tilted spectrum, as a recording of it might have."""
    spectrum = np.fft.rfft(sound)
    hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
    tilt = (np.maximum(hertz, 60) / 1000) ** rng.uniform(-0.25, 0.25)
    noise = 10 ** rng.uniform(-4, -1.7) * np.abs(sound).max() * rng.standard_normal(len(sound))
    return (np.fft.irfft(spectrum * tilt, len(sound)) + noise).astype(np.float32)


def fit_classifier(count: int = 40, names: Sequence[str] | None = None, seed: int = FIT_SEED) -> Classifier:
    """Return a classifier fitted to ``count`` single-object scenes of every class, the unseen ones included.

    Every sound is heard as it is and with a little noise and tilt, so that it is judged by what is loud in it.
    """
    names = tuple(names or (*CLASSES, *UNSEEN))
    rng = np.random.default_rng(seed)
    sounds = [[make_scene(seed + i, [name]).sound(RATE) for i in range(count)] for name in names]
    data = np.array(
        [[sound_statistics(v) for x in row for v in (x, _heard_through_air(x, rng))] for row in sounds]
    )  # (K, 2 count, D)
    means = data.mean(axis=1)
    rest = (data - means[:, None]).reshape(-1, data.shape[2])
    covariance = rest.T @ rest / len(rest)
    identity = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    return Classifier(names, means, np.linalg.inv((1 - _SHRINKAGE) * covariance + _SHRINKAGE * identity))
