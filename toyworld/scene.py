"""A scene: one or two things before a backdrop, what happens to them, and the pictures and the sound of it.

    scene = make_scene(seed=7, classes=["bell", "drum"], num_objects=2)
    scene.frames(25, 112)      (200, 112, 112, 3) uint8
    scene.sound(only=0)        (128000,) float32, the first thing alone
    scene.events(0)            times in seconds

Everything follows from the seed. Pictures and sound are computed from the same curves, at any rate and size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selva.utils.errors import UserError
from selva.utils.text import counted
from toyworld import motion
from toyworld.backdrop import Backdrop, camera_noise, draw_backdrop
from toyworld.classes import CLASSES, SoundClass, get_class
from toyworld.looks import Now
from toyworld.motion import Event
from toyworld.paint import Colour
from toyworld.sound import BOW_HZ, FAN_HZ, LAMP_HZ

PEAK = 0.9  # of the whole sound
SEPARATION_SEC = 0.2  # between events of two things, where there is room for it
_TURNS_HZ = {"siren": LAMP_HZ, "violin": BOW_HZ}  # of running sources; that of the others is the fan's
_SOUND, _NOISE = 1, 2  # streams of random numbers, apart from the one that draws the scene


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        name: its class. colour: name of its colour; rgb: the colour itself, slightly varied.
        x: its middle, 0 left to 1 right. ground: y of the floor under it. reach: about half its width.
        size: reach in relation to a thing of middle size; sets the pitch.
        loudness: level in relation to other things.
        events: what happens, in order of time.
    """

    name: str
    colour: str
    rgb: Colour
    x: float
    ground: float
    reach: float
    size: float
    loudness: float
    events: tuple[Event, ...]

    @property
    def kind(self) -> SoundClass:
        """Its class."""
        return get_class(self.name)


@dataclass(frozen=True)
class Scene:
    """See the module; made by :func:`make_scene`."""

    seed: int
    duration_sec: float
    objects: tuple[Thing, ...]
    backdrop: Backdrop
    noise_sigma: float

    def events(self, index: int | None = None) -> np.ndarray:
        """Return the times in seconds, ascending, of impacts and starts of one object, or of all with None."""
        things = self.objects if index is None else (self.objects[index],)
        return np.array(sorted(event.time_sec for thing in things for event in thing.events))

    def prompt(self, rng: np.random.Generator, index: int = 0) -> str:
        """Return one of the wordings for an object."""
        thing = self.objects[index]
        return str(rng.choice(thing.kind.prompts)).format(colour=thing.colour)

    def prompts(self, rng: np.random.Generator, count: int, index: int = 0) -> list[str]:
        """Return up to ``count`` different wordings for an object, the one of :meth:`prompt` last."""
        thing, own = self.objects[index], self.prompt(rng, index)
        others = [text for one in thing.kind.prompts if (text := one.format(colour=thing.colour)) != own]
        return [*rng.permutation(others)[: count - 1].tolist(), own]

    def frames(self, fps: float, size: int) -> np.ndarray:
        """Return (int(duration * fps), size, size, 3) uint8 RGB pictures; picture i shows the moment i / fps."""
        times = np.arange(int(self.duration_sec * fps + 1e-6)) / fps
        still = self.backdrop.paint(size)
        for thing in self.objects:
            thing.kind.still(still, thing)
        states = [_states(thing, times) for thing in self.objects]
        rng = np.random.default_rng([self.seed, _NOISE])
        pictures = np.empty((len(times), size, size, 3), np.uint8)
        for i in range(len(times)):
            canvas = type(still)(still.pixels)
            for thing, state in zip(self.objects, states, strict=True):
                thing.kind.look(canvas, thing, state[i])
            pixels = canvas.pixels
            pixels += camera_noise(rng, size, self.noise_sigma)
            np.clip(pixels, 0, 255, out=pixels)
            pictures[i] = pixels
        return pictures

    def sound(self, rate: int = 16_000, only: int | None = None) -> np.ndarray:
        """Return (samples,) float32 of everything, or of the object ``only``; those of all objects add up to the whole.

        The whole peaks at 0.9; sample 0 belongs to the first picture.
        """
        tracks = [
            thing.loudness * _track(thing, np.random.default_rng([self.seed, _SOUND, i]), rate, self.duration_sec)
            for i, thing in enumerate(self.objects)
        ]
        gain = PEAK / max(np.abs(sum(tracks)).max(), 1e-9)
        return (gain * (sum(tracks) if only is None else tracks[only])).astype(np.float32)

    def write(
        self, path: str | os.PathLike[str], size: int = 224, fps: int = 25, rate: int = 16_000, lossless: bool = False
    ) -> None:
        """Write an .mp4 of H.264 pictures and AAC, or with ``lossless`` FLAC, sound."""
        from selva.media import write_video

        write_video(path, self.frames(fps, size), fps, self.sound(rate), rate, lossless=lossless)


def _track(thing: Thing, rng: np.random.Generator, rate: int, duration_sec: float) -> np.ndarray:
    """Return (samples,) float64 of one object at the level of its class."""
    num_samples, kind = round(duration_sec * rate), thing.kind
    if kind.running:
        return kind.level * kind.sound(rate, num_samples, thing.size, thing.events, rng)
    track = np.zeros(num_samples)
    for event in thing.events:
        begin = round(event.time_sec * rate)
        part = kind.sound(rate, thing.size, event.strength, rng)
        fade = len(part) // 3  # of the last third, so that a cut tail is no click
        part[len(part) - fade :] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fade) / fade)
        part = part[: num_samples - begin]
        track[begin : begin + len(part)] += kind.level * part
    return track


def _states(thing: Thing, times: np.ndarray) -> list[Now]:
    """Return the state of a thing at every time."""
    events = thing.events
    if thing.kind.running:
        slowest, fastest = _TURNS_HZ.get(thing.name, FAN_HZ)
        gates = motion.gate(times, events).tolist()
        turns, times = motion.turns(times, events, slowest, fastest).tolist(), times.tolist()
        return [Now(gate=g, turns=n, time_sec=t) for g, n, t in zip(gates, turns, times, strict=True)]
    hits = np.array([event.time_sec for event in events])
    to_next = np.where(hits > times[:, None], hits - times[:, None], np.inf).min(axis=1)
    since = np.where(hits <= times[:, None], times[:, None] - hits, np.inf).min(axis=1)
    height = motion.ball_height(times, events) if thing.name == "ball" else np.zeros(len(times))
    columns = (motion.lift(times, events), motion.glow(times, events), motion.sway(times, events), height, to_next,
               since, times)
    return [
        Now(lift=a, glow=b, sway=c, height=h, to_next=n, since=s, time_sec=t)
        for a, b, c, h, n, s, t in zip(*(column.tolist() for column in columns), strict=True)
    ]


# -- drawing a scene ---------------------------------------------------------------------------------------------------


def make_scene(
    seed: int,
    classes: Sequence[str] | None = None,
    num_objects: int = 1,
    duration_sec: float = 8.0,
    cluttered: bool | None = None,
) -> Scene:
    """Return the scene of that seed.

    Args:
        seed: 0 or more.
        classes: names to draw from, without repetition; None for all of ``CLASSES``. One name, or two for two objects,
            fixes what there is.
        num_objects: 1, or 2 of different classes side by side.
        duration_sec: at least 1.5.
        cluttered: whether there is clutter behind; None leaves it to the seed.

    Raises:
        ValueError: an unknown class, fewer classes than objects, or a number out of range.
    """
    names = list(CLASSES) if classes is None else [get_class(name).name for name in classes]
    if num_objects not in (1, 2):
        raise UserError(f"num_objects is {num_objects}, expected 1 or 2")
    if len(set(names)) < num_objects:
        raise UserError(f"{counted(num_objects, 'object')}, expected as many different classes, got "
                        f"{', '.join(names) or 'none'}")
    if not 1.5 <= duration_sec <= 600:
        raise UserError(f"duration is {duration_sec} s, expected 1.5 to 600")
    rng = np.random.default_rng([seed, 0])
    chosen = [str(name) for name in rng.choice(sorted(set(names)), num_objects, replace=False)]
    things: list[Thing] = []
    for index, name in enumerate(chosen):
        events = _draw_events(rng, get_class(name), duration_sec, [e for thing in things for e in thing.events])
        things.append(_draw_thing(rng, name, index if num_objects == 2 else None, events))
    clutter = bool(rng.random() < 0.5) if cluttered is None else cluttered
    return Scene(seed, float(duration_sec), tuple(things), draw_backdrop(rng, clutter), float(rng.uniform(1, 4)))


def _draw_events(
    rng: np.random.Generator, kind: SoundClass, duration_sec: float, others: Sequence[Event]
) -> tuple[Event, ...]:
    """Return events of a class that keep away from those of the other object as well as twenty attempts allow."""
    best, fewest = (), None
    for _ in range(20):
        if kind.running:
            events = motion.draw_runs(rng, duration_sec)
        else:
            events = motion.draw_impacts(rng, duration_sec, kind.min_gap_sec, kind.most_events)
        if kind.name == "ball":
            events = motion.with_flight_strength(events)
        clashes = sum(abs(a.time_sec - b.time_sec) < SEPARATION_SEC for a in events for b in others)
        if fewest is None or clashes < fewest:
            best, fewest = events, clashes
        if clashes == 0:
            break
    return best


def _draw_thing(rng: np.random.Generator, name: str, side: int | None, events: tuple[Event, ...]) -> Thing:
    kind = get_class(name)
    colour = str(rng.choice(list(kind.colours)))
    red, green, blue = np.clip(np.array(kind.colours[colour]) * rng.uniform(0.9, 1.1, 3), 0, 255).tolist()
    if side is None:
        x, reach, middle = rng.uniform(0.38, 0.62), rng.uniform(0.19, 0.27), 0.23
    else:
        x, reach, middle = (0.26, 0.74)[side] + rng.uniform(-0.02, 0.02), rng.uniform(0.14, 0.19), 0.165
    return Thing(
        name, colour, (red, green, blue), float(x), float(rng.uniform(0.82, 0.9)), float(reach),
        float((reach / middle) ** 1.3), float(rng.uniform(0.75, 1.25)) if side is not None else 1.0, events,
    )
