"""The sounds of the world: struck bodies as sums of decaying partials, bursts and streams of filtered noise, sweeps.

Impacts are functions ``(rate, size, strength, rng) -> samples`` that begin with the impact itself. Running sources are
functions ``(rate, num_samples, size, events, rng) -> samples`` over the whole clip. ``size`` is 1 for an object of
middle size; larger ones are lower. Results are float64 of any level; the table in :mod:`toyworld.classes` balances
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from toyworld.motion import Event, gate, turns

_HIGHEST = 0.47  # of the rate: partials above would fold back


def partials(
    rate: int, seconds: float, hertz: Iterable[float], levels: Iterable[float], decays_sec: Iterable[float]
) -> np.ndarray:
    """Return a sum of decaying sines, the sound of a struck stiff body."""
    t = np.arange(round(seconds * rate)) / rate
    sound = np.zeros(len(t))
    for f, level, decay in zip(hertz, levels, decays_sec, strict=True):
        if f < _HIGHEST * rate:
            sound += level * np.sin(2 * np.pi * f * t) * np.exp(-t / decay)
    return sound


def sweep(rate: int, hertz: np.ndarray) -> np.ndarray:
    """Return a sine of the given frequency at every sample."""
    return np.sin(2 * np.pi * np.cumsum(np.minimum(hertz, _HIGHEST * rate)) / rate)


def band_noise(rng: np.random.Generator, rate: int, num_samples: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return noise of standard deviation 1 whose spectrum is flat between two frequencies and falls off outside."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    hertz = np.fft.rfftfreq(num_samples, 1 / rate)
    inside = 1 / (1 + (low_hz / np.maximum(hertz, 1)) ** 6) / (1 + (hertz / high_hz) ** 6)
    noise = np.fft.irfft(spectrum * inside, num_samples)
    return noise / max(noise.std(), 1e-12)


def _click(rng: np.random.Generator, rate: int, low_hz: float, high_hz: float, decay_sec: float) -> np.ndarray:
    length = round(8 * decay_sec * rate)
    return 0.3 * band_noise(rng, rate, length, low_hz, high_hz) * np.exp(-np.arange(length) / rate / decay_sec)


def _sum(*parts: np.ndarray) -> np.ndarray:
    """Return the parts added up from their common beginning; they may differ in length."""
    total = np.zeros(max(len(part) for part in parts))
    for part in parts:
        total[: len(part)] += part
    return total


# -- impacts -----------------------------------------------------------------------------------------------------------


def wood(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a short dry knock: three partials of a bar that lose their energy within 40 ms."""
    f = 640 / size
    body = partials(rate, 0.3, (f, 2.57 * f, 4.9 * f), (1.0, 0.5, 0.25), (0.040, 0.022, 0.012))
    return strength * _sum(body, _click(rng, rate, 900, 4000, 0.003))


def bell(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return bright metal with the minor third of bells, ringing for a second."""
    f = 1050 / size
    ratios, levels = np.array((0.5, 1.0, 1.19, 1.5, 2.0, 2.74, 3.9)), (0.35, 0.8, 0.6, 0.4, 0.6, 0.4, 0.25)
    body = partials(rate, 1.8, f * ratios, levels, 0.55 / ratios**0.6)
    return strength * _sum(body, _click(rng, rate, 2500, 7000, 0.004))


def drum(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a low skin whose tension, and so its pitch, falls after the stroke, with the slap of the stick."""
    t = np.arange(round(0.7 * rate)) / rate
    f = 95 / size * (1 + 0.7 * np.exp(-t / 0.03))
    skin = sweep(rate, f) * np.exp(-t / 0.16) + 0.4 * sweep(rate, 1.59 * f) * np.exp(-t / 0.08)
    return strength * _sum(skin, 1.5 * _click(rng, rate, 150, 1400, 0.018))


def ball(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return rubber: a dull, quickly damped thud that glides upwards as the ball leaves the floor."""
    t = np.arange(round(0.35 * rate)) / rate
    f = 270 / size * (1 + 0.6 * (1 - np.exp(-t / 0.05)))
    thud = (sweep(rate, f) + 0.5 * sweep(rate, 2 * f) + 0.25 * sweep(rate, 3 * f)) * np.exp(-t / 0.055)
    return strength * _sum(thud, 0.5 * _click(rng, rate, 200, 900, 0.006))


def glass(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return glass, high, thin and clear: few partials above 2 kHz, ringing for a third of a second."""
    f = 2600 / size**0.7
    body = partials(rate, 0.9, (f, 1.51 * f, 2.32 * f), (0.9, 0.5, 0.3), (0.20, 0.13, 0.08))
    return strength * _sum(body, 0.6 * _click(rng, rate, 4000, 7500, 0.002))


def drop(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a water drop: the bubble it pulls under sings upwards, over a small splash."""
    t = np.arange(round(0.25 * rate)) / rate
    rise = 620 / size * (1 + 1.6 * np.minimum(t / 0.07, 1.3) ** 1.5)
    bubble = sweep(rate, rise) * np.exp(-t / 0.045) * np.minimum(1, t / 0.002)
    return strength * _sum(bubble, 0.5 * _click(rng, rate, 1800, 5000, 0.008))


def shaker(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return seeds against the shell of a maraca: a burst of high noise without any pitch."""
    t = np.arange(round(0.25 * rate)) / rate
    shape = np.minimum(1, t / 0.004) * np.exp(-t / 0.045)
    return 0.35 * strength * shape * band_noise(rng, rate, len(t), 3200 / size**0.5, 7400)


def gong(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a large metal plate: low inharmonic partials, the higher ones swelling after the stroke, for seconds."""
    f = 150 / size
    ratios = np.array((1.0, 1.41, 1.96, 2.44, 3.03, 3.57, 4.31, 5.2, 6.3, 7.7))
    body = partials(rate, 2.4, f * ratios, 1 / np.sqrt(ratios), 0.9 / ratios**0.5)
    t = np.arange(len(body)) / rate
    shimmer = 0.10 * band_noise(rng, rate, len(body), 500, 2400) * (1 - np.exp(-t / 0.06)) * np.exp(-t / 0.5)
    return strength * _sum(body * np.minimum(1, t / 0.002), shimmer, 2.0 * _click(rng, rate, 300, 4500, 0.014))


def chirp(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a bird: a tweet of two quick sweeps, down and up again, around 2 kHz."""
    t = np.arange(round(0.21 * rate)) / rate
    low = 1700 / size**0.6
    hertz = low * np.where(t < 0.09, 1.5 - 0.5 * t / 0.09, 1.0 + 0.6 * (t - 0.09) / 0.12)
    shape = np.minimum(1, t / 0.003) * np.clip((0.21 - t) / 0.03, 0, 1)
    shape *= 1 - 0.9 * np.exp(-(((t - 0.09) / 0.01) ** 2))  # a breath between the two
    return strength * shape * (sweep(rate, hertz) + 0.3 * sweep(rate, 2 * hertz))


def laser(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a toy ray gun: a buzzing tone that falls by three octaves in a quarter of a second."""
    t = np.arange(round(0.32 * rate)) / rate
    f = 300 / size + 2400 / size * np.exp(-t / 0.06)
    tone = sum(sweep(rate, k * f) * (k * f < _HIGHEST * rate) / k for k in (1, 2, 3, 4, 5))
    return strength * tone * np.minimum(1, t / 0.002) * np.exp(-t / 0.11)


def gravel(rate: int, size: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a step on gravel: grains of stone at random moments over a fifth of a second, no two steps alike."""
    grain, num_grains = np.arange(round(0.02 * rate)) / rate, 150
    times = np.concatenate([np.zeros(6), 0.19 * rng.beta(1, 2, num_grains)])
    levels = np.concatenate([np.full(6, 0.8), rng.lognormal(-0.7, 0.5, num_grains) * np.exp(-times[6:] / 0.1)])
    hertz, decays = rng.uniform(350, 2600, len(times)) / size, rng.uniform(0.001, 0.004, len(times))
    phases = rng.uniform(0, 2 * np.pi, len(times))
    sound = np.zeros(round(0.26 * rate))
    for begin, level, f, decay, phase in zip((times * rate).astype(int), levels, hertz, decays, phases, strict=True):
        sound[begin : begin + len(grain)] += level * np.sin(2 * np.pi * f * grain + phase) * np.exp(-grain / decay)
    return 0.45 * strength * _sum(sound, _click(rng, rate, 300, 1200, 0.03))


# -- running sources ---------------------------------------------------------------------------------------------------


def rain(rate: int, num_samples: int, size: float, events: Sequence[Event], rng: np.random.Generator) -> np.ndarray:
    """Return steady wide noise whose level follows how densely it rains."""
    times = np.arange(num_samples) / rate
    return 0.30 * gate(times, events) * band_noise(rng, rate, num_samples, 700 / size, 4200 / size**0.5)


FAN_HZ = (0.7, 2.2)  # revolutions per second of the slowest and the fastest run; 4 blades
LAMP_HZ = (0.6, 1.2)  # revolutions per second of the siren's light
BOW_HZ = (0.4, 0.9)  # to and fro of the violin's bow
VIOLIN_HZ = 600.0  # lowest note, of a violin of size 1


def motor(rate: int, num_samples: int, size: float, events: Sequence[Event], rng: np.random.Generator) -> np.ndarray:
    """Return the hum of a fan: harmonics of a pitch that follows its speed, beating with the blades, and moved air."""
    times = np.arange(num_samples) / rate
    cycles = 75 / size * turns(times, events, *FAN_HZ)
    hum = sum(np.sin(2 * np.pi * k * cycles + k * k) / np.sqrt(k) for k in range(1, 13))
    beat = 1 + 0.15 * np.cos(2 * np.pi * 4 * turns(times, events, *FAN_HZ))
    air = band_noise(rng, rate, num_samples, 150, 1800)
    return 0.25 * gate(times, events) * (beat * hum + 0.8 * air)


def siren(rate: int, num_samples: int, size: float, events: Sequence[Event], rng: np.random.Generator) -> np.ndarray:
    """Return a buzzing horn that rises and falls once with every turn of the light."""
    times = np.arange(num_samples) / rate
    hertz = 500 / size * (1 - 0.15 * np.cos(2 * np.pi * turns(times, events, *LAMP_HZ)))
    horn = sum((k * hertz < _HIGHEST * rate) * sweep(rate, k * hertz) / k**0.3 for k in range(1, 15))
    return 0.2 * gate(times, events) * horn


def violin(rate: int, num_samples: int, size: float, events: Sequence[Event], rng: np.random.Generator) -> np.ndarray:
    """Return a bowed string, one note for every stroke of the bow: harmonics with vibrato, and a little rosin.

    So high that its harmonics are well apart, and with so little rosin that the quiet bands count for nothing: what
    compresses and restores sound must be able to carry it, or no adapter could ever teach it.
    """
    times = np.arange(num_samples) / rate
    vibrato = 1 + 0.012 * np.sin(2 * np.pi * 5.5 * times)
    hertz = np.full(num_samples, VIOLIN_HZ / size)
    for event in events:  # a faster bow plays a higher note, up to a fifth
        hertz[times >= event.time_sec] = VIOLIN_HZ / size * 1.5 ** ((event.strength - 0.5) / 0.5)
    hertz *= vibrato
    string = sum((k * hertz < _HIGHEST * rate) * sweep(rate, k * hertz) / k**1.3 for k in range(1, 9))
    rosin = band_noise(rng, rate, num_samples, 1500, 4500)
    return 0.3 * gate(times, events) * (string + 0.005 * rosin)


# -- beyond the classes ------------------------------------------------------------------------------------------------


def random_sound(rng: np.random.Generator, duration_sec: float = 8.0, rate: int = 16_000) -> np.ndarray:
    """Return (samples,) float32 of sounds that belong to no class: random partials, sweeps and noises.

    For training what compresses and restores sound, which should know more than the classes of the world.
    """
    num_samples = round(duration_sec * rate)
    sound = np.zeros(num_samples)
    parts = _random_call if rng.random() < 0.3 else _random_part
    for _ in range(rng.integers(2, 16)):
        begin = int(rng.uniform(0, num_samples))
        part = 10 ** rng.uniform(-1, 0) * parts(rng, rate)[: num_samples - begin]
        sound[begin : begin + len(part)] += part
    return (rng.uniform(0.3, 0.95) * sound / max(np.abs(sound).max(), 1e-9)).astype(np.float32)


def _random_part(rng: np.random.Generator, rate: int) -> np.ndarray:
    seconds = float(np.exp(rng.uniform(np.log(0.05), np.log(2.5))))
    t = np.arange(max(64, round(seconds * rate))) / rate
    decay = np.exp(-t / (seconds * rng.uniform(0.1, 1.0))) * np.minimum(1, t / rng.choice([0.001, 0.005, 0.03]))
    decay *= np.minimum(1, (t[-1] - t) / 0.01)
    lowest = float(np.exp(rng.uniform(np.log(60), np.log(3500))))
    kind = rng.integers(4)
    if kind == 0:
        low = lowest * 0.7
        return decay * 0.4 * band_noise(rng, rate, len(t), low, low * rng.uniform(1.3, 20))
    if kind == 1:
        hertz = lowest * np.exp(rng.uniform(-2, 2) * (1 - np.exp(-t / rng.uniform(0.02, 0.3))))
        tones = (sweep(rate, k * hertz) * (k * hertz < _HIGHEST * rate) / k for k in range(1, rng.integers(2, 7)))
        return decay * sum(tones)
    ratios = np.arange(1, 9) if kind == 2 else np.sort(rng.uniform(1, 9, 8))
    ratios = ratios / ratios[0]
    levels = rng.uniform(0, 1, 8) / ratios ** rng.uniform(0, 1)
    return partials(rate, len(t) / rate, lowest * ratios, levels, np.full(8, seconds))[: len(t)] * decay


def _random_call(rng: np.random.Generator, rate: int) -> np.ndarray:
    """Return a whistle that goes up and down between random pitches: a thin line, gone before it can be averaged."""
    seconds = rng.uniform(0.06, 0.4)
    t = np.arange(round(seconds * rate)) / rate
    corners = np.linspace(0, seconds, rng.integers(2, 5))
    hertz = np.exp(rng.uniform(np.log(500), np.log(4500)) + np.interp(t, corners, rng.uniform(-0.5, 0.5, len(corners))))
    level = np.interp(t, corners, rng.uniform(0.1, 1.0, len(corners)))
    level *= np.clip(t / 0.004, 0, 1) * np.clip((seconds - t) / 0.02, 0, 1)
    octave = rng.uniform(0, 0.6) * (2 * hertz < _HIGHEST * rate)
    return level * (sweep(rate, hertz) + octave * sweep(rate, 2 * hertz))
