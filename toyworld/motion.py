"""The times of events, and the movements before and after them.

Impacts have a time and a strength; running sources (rain, a motor) have a time when they start and one when they stop.
All curves are functions of time, so pictures and sound can be sampled at any rate and agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAD_SEC = 0.35  # nothing happens before, so that an approach can be seen ...
TAIL_SEC = 0.35  # ... or this close to the end, so that it can be heard
SWING_SEC = 0.16  # a striker comes down this fast
REBOUND_SEC = 0.14
GLOW_SEC = 0.09  # decay of the visible reaction to an impact
GATE_RAMP_SEC = 0.03  # a running source is up to level after this ...
GATE_RELEASE_SEC = 0.2  # ... and silent again after this
BALL_FLIGHT_SEC = 0.9  # a ball flies this long at most between two impacts
GRAVITY = 4.0  # picture heights per second squared


@dataclass(frozen=True)
class Event:
    """One thing that is seen and heard.

    Attributes:
        time_sec: the impact, or the moment a running source starts.
        strength: in (0, 1].
        end_sec: when a running source stops; None for an impact.
    """

    time_sec: float
    strength: float
    end_sec: float | None = None


def draw_impacts(
    rng: np.random.Generator, duration_sec: float, min_gap_sec: float, most_in_8_sec: int
) -> tuple[Event, ...]:
    """Return impacts at irregular times, between 3 and ``most_in_8_sec`` of them in 8 s, none closer than the gap."""
    span = duration_sec - LEAD_SEC - TAIL_SEC
    share = duration_sec / 8
    count = rng.integers(round(3 * share), round(most_in_8_sec * share) + 1)
    count = max(1, min(int(count), int(span / min_gap_sec)))
    times = LEAD_SEC + np.sort(rng.uniform(0, span - (count - 1) * min_gap_sec, count)) + min_gap_sec * np.arange(count)
    return tuple(Event(float(t), float(s)) for t, s in zip(times, rng.uniform(0.5, 1.0, count), strict=True))


def draw_runs(rng: np.random.Generator, duration_sec: float) -> tuple[Event, ...]:
    """Return two to four runs in 8 s, each on for at least 0.5 s and off for at least 0.4 s before it."""
    count = max(1, min(int(rng.integers(2, 5)), int(duration_sec / 2)))
    weights = rng.dirichlet(np.full(2 * count + 1, 2.0))  # how the free time is shared out
    free = duration_sec - TAIL_SEC - 0.9 * count
    pauses, runs = 0.4 + free * weights[: count + 1], 0.5 + free * weights[count + 1 :]
    starts = np.cumsum(pauses[:count]) + np.concatenate([[0.0], np.cumsum(runs)[:-1]])
    strengths = rng.uniform(0.5, 1.0, count)
    return tuple(
        Event(float(a), float(s), float(a + r)) for a, r, s in zip(starts, runs, strengths, strict=True)
    )


def with_flight_strength(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return impacts as strong as a ball is fast at the floor, which is gravity times half the flight."""
    return tuple(
        Event(event.time_sec, 0.4 + 0.6 * flight / BALL_FLIGHT_SEC)
        for event, flight in zip(events, flights(events), strict=True)
    )


def flights(events: Sequence[Event]) -> list[float]:
    """Return the seconds of flight before every impact of a ball."""
    result, before = [], 0.0
    for index, event in enumerate(events):
        available = 2 * event.time_sec if index == 0 else event.time_sec - before  # the first one is dropped
        result.append(min(BALL_FLIGHT_SEC, available))
        before = event.time_sec
    return result


# -- curves: one value for every time ----------------------------------------------------------------------------------


def lift(times: np.ndarray, events: Sequence[Event]) -> np.ndarray:
    """Return the height of a raised striker: 0 at an impact, up to 1 between two, higher before a stronger one."""
    hits = np.array([e.time_sec for e in events])
    heights = 0.4 + 0.6 * np.array([e.strength for e in events])
    after = np.min(np.where(hits >= times[:, None], hits - times[:, None], np.inf), axis=1)
    since = np.min(np.where(hits <= times[:, None], times[:, None] - hits, np.inf), axis=1)
    down = 1 - np.clip(1 - after / SWING_SEC, 0, 1) ** 2  # starts slowly, is fastest at the impact
    up = 1 - np.clip(1 - since / REBOUND_SEC, 0, 1) ** 2
    return np.minimum(down, up) * np.interp(times, hits, heights)


def glow(times: np.ndarray, events: Sequence[Event], decay_sec: float = GLOW_SEC) -> np.ndarray:
    """Return the reaction to impacts: jumps to their strength and dies away."""
    since = times[:, None] - np.array([e.time_sec for e in events])
    strengths = np.array([e.strength for e in events])
    return np.minimum(1, np.where(since >= 0, strengths * np.exp(-np.maximum(since, 0) / decay_sec), 0).sum(axis=1))


def sway(times: np.ndarray, events: Sequence[Event], hz: float = 2.5, decay_sec: float = 0.35) -> np.ndarray:
    """Return the swinging of something hung up that is struck, within about [-1, 1]."""
    since = np.maximum(times[:, None] - np.array([e.time_sec for e in events]), 0)
    strengths = np.array([e.strength for e in events])
    return (strengths * np.sin(2 * np.pi * hz * since) * np.exp(-since / decay_sec)).sum(axis=1)


def ball_height(times: np.ndarray, events: Sequence[Event]) -> np.ndarray:
    """Return the height of a ball over the floor, in picture heights: held, dropped, then hopping to every impact."""
    height = np.zeros(len(times))
    for index, (event, flight) in enumerate(zip(events, flights(events), strict=True)):
        to_go = event.time_sec - times
        flying = (to_go > 0) & (to_go <= flight)
        height[flying] = GRAVITY / 2 * to_go[flying] * (flight - to_go[flying])
        if index == 0:
            height[to_go >= flight / 2] = GRAVITY / 2 * (flight / 2) ** 2
    return height


def gate(times: np.ndarray, events: Sequence[Event]) -> np.ndarray:
    """Return 0 where a running source is off and its strength where it is on, with short ramps."""
    result = np.zeros(len(times))
    for event in events:
        assert event.end_sec is not None  # a running source, not an impact
        rise = np.clip((times - event.time_sec) / GATE_RAMP_SEC, 0, 1)
        fall = np.clip((event.end_sec + GATE_RELEASE_SEC - times) / GATE_RELEASE_SEC, 0, 1)
        level = np.minimum(rise, fall)
        result += event.strength * level * level * (3 - 2 * level)  # no corners, which would click
    return result


def turns(times: np.ndarray, events: Sequence[Event], slowest_hz: float, fastest_hz: float) -> np.ndarray:
    """Return the revolutions done since the start; while running, the speed grows with the strength of the run."""
    result = np.zeros(len(times))
    for event in events:
        assert event.end_sec is not None
        on = np.clip(times - event.time_sec, 0, event.end_sec + GATE_RELEASE_SEC - event.time_sec)  # it coasts to rest
        result += on * speed_hz(event, slowest_hz, fastest_hz)
    return result


def speed_hz(event: Event, slowest_hz: float, fastest_hz: float) -> float:
    """Return the revolutions per second of a run: the slowest at strength 0.5, the fastest at 1."""
    return slowest_hz + (fastest_hz - slowest_hz) * (event.strength - 0.5) / 0.5
