"""Sounds of the toy world that are spoilt by a known amount, for `metric_trust.py`; and rank correlation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selva.evaluation import intervals
from selva.evaluation.outputs import ROWS
from selva.evaluation.run import PAIRED
from selva.media import read_audio, write_audio
from selva.utils.progress import Progress
from toyworld import CLASSES
from toyworld.judging import RATE
from toyworld.measure import Case, ToyGenerator
from toyworld.scene import Scene

STRUCK = tuple(name for name, kind in CLASSES.items() if not kind.running)
LEVELS: dict[str, tuple[float, ...]] = {  # from nothing wrong to most
    "timing": (0.0, 0.01, 0.02, 0.04, 0.08, 0.12, 0.2, 0.3, 0.4),  # s
    "class": (0.0, 0.25, 0.5, 0.75, 1.0),
    "noise": (-99.0, -40.0, -30.0, -20.0, -10.0, 0.0),  # dB in relation to the sound; -99: none
    "adapter": (0.0, 0.25, 0.5, 0.75, 1.0),  # 1 - strength
}
RESAMPLES = 1000
Item = tuple[str, float, dict[str, Any]]  # scene, amount of what is wrong, figures


def another_take(scene: Scene) -> Scene:
    """Return a scene with the same events whose sound differs in its details."""
    return dataclasses.replace(scene, seed=scene.seed + 10_000_000)


def wrong_strokes(case: Case, share: float) -> set[int]:
    """Return the numbers of the strokes that are of another class, evenly spread, so many that it is about a share."""
    number = len(case.scene.objects[case.index].events)
    count = round(share * number)
    return {int((i + 0.5) * number / count) for i in range(count)}


def with_wrong_class(case: Case, share: float) -> np.ndarray:
    """Return another take (samples,) in which a share of the strokes is of another class."""
    thing, wrong = case.scene.objects[case.index], wrong_strokes(case, share)
    other = [name for name in STRUCK if name != thing.name][case.scene.seed % (len(STRUCK) - 1)]
    things = [dataclasses.replace(thing, name=name, events=tuple(event for i, event in enumerate(thing.events)
                                                                 if (i in wrong) is of_other))
              for name, of_other in ((thing.name, False), (other, True))]
    kept = tuple(one for one in things if one.events)
    return dataclasses.replace(another_take(case.scene), objects=kept).sound(RATE)


def shifted(sound: np.ndarray, seconds: float) -> np.ndarray:
    """Return (samples,) that come so much later, or earlier if negative, with silence where nothing comes."""
    by = round(seconds * RATE)
    result = np.zeros_like(sound)
    result[max(0, by) : len(sound) + min(0, by)] = sound[max(0, -by) : len(sound) - max(0, by)]
    return result


def noisy(sound: np.ndarray, level_db: float, seed: int) -> np.ndarray:
    """Return (samples,) with white noise of a level in relation to the sound's."""
    if level_db <= LEVELS["noise"][0]:
        return sound
    noise = np.random.default_rng(seed).standard_normal(len(sound))
    mixed = sound + noise * np.sqrt(np.mean(sound**2)) * 10 ** (level_db / 20)
    return (mixed / max(1.0, np.abs(mixed).max())).astype(np.float32)


def spoilt(part: str, level: float, case: Case, plain: np.ndarray, maker: ToyGenerator) -> np.ndarray:
    """Return (samples,) of a case, spoilt as a part says; ``plain`` is what it would be with nothing wrong."""
    if part == "class":
        return maker.through_codec(with_wrong_class(case, level))
    if part == "timing":
        return shifted(plain, level if case.scene.seed % 2 else -level)
    return noisy(plain, level, case.scene.seed)


def make_sounds(part: str, cases: Sequence[Case], maker: ToyGenerator, work: Path) -> dict[tuple[str, float], float]:
    """Write the sounds of a part that are not there yet; return {(name, level): true amount of what is wrong}."""
    truth: dict[tuple[str, float], float] = {}
    with Progress(len(cases), f"{part}: making sounds", "scenes") as progress:
        for number, case in enumerate(cases, 1):
            name = f"{case.name}_{case.scene.seed}"
            reference, base = (work / folder / f"{name}.flac" for folder in ("reference", "plain"))
            if not reference.is_file():
                _write(reference, case.scene.sound(RATE))
            if not base.is_file():
                _write(base, maker.through_codec(another_take(case.scene).sound(RATE)))
            plain = read_audio(base)[0][0].numpy()
            strokes = len(case.scene.objects[case.index].events)
            for level in LEVELS[part]:
                truth[name, level] = len(wrong_strokes(case, level)) / strokes if part == "class" else level
                path = work / f"{part}_{level:g}" / f"{name}.flac"
                if not path.is_file():
                    _write(path, spoilt(part, level, case, plain, maker))
            progress.update(number)
    return truth


def _write(path: Path, sound: np.ndarray) -> None:
    write_audio(path, torch.from_numpy(sound), RATE)


# -- rank correlation --------------------------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of (n,) values from 1; equal ones share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two (n,) arrays; NaN where one of them does not vary."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def correlation(items: Sequence[Item], key: str) -> intervals.Figure:
    """Return the rank correlation of a figure with what is wrong: -1 misled, 0 blind, 1 always right.

    The interval comes from drawing the scenes, with all their sounds, again and again. Sounds without the figure are
    left out; ``items`` of the result counts the others.
    """
    scenes: dict[str, list[tuple[float, float]]] = {}
    for name, truth, figures in items:
        if (value := figures[key]) is not None:
            value = abs(value) if PAIRED[key] else value
            scenes.setdefault(name, []).append((truth, value if ROWS[key].better == "lower" else -value))
    rows = [np.array(values) for values in scenes.values()]
    if not rows:
        return intervals.Figure(float("nan"), None, None, 0)
    together = np.concatenate(rows)
    rng, found = np.random.default_rng(intervals.SEED), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        found.append(spearman(drawn[:, 0], drawn[:, 1]))
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (None, None)
    return intervals.Figure(spearman(together[:, 0], together[:, 1]), low, high, len(together))
