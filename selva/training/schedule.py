"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from selva.utils.text import counted


class Schedule(Protocol):
    """The settings that the rate depends on."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def lr_schedule(self) -> str: ...
    @property
    def lr_cycles(self) -> int: ...
    @property
    def lr_milestones(self) -> tuple[float, ...]: ...
    @property
    def lr_factor(self) -> float: ...


def milestones(config: Schedule) -> list[float]:
    """Return the steps after the warm-up at which "multistep" lowers the rate, in order."""
    return sorted(when * config.steps if when < 1 else when for when in config.lr_milestones)


def schedule_problem(config: Schedule) -> str | None:
    """Return a warning if "multistep" has no room for its falls, which count their steps after the warm-up."""
    if config.lr_schedule != "multistep":
        return None
    falls = [config.warmup_steps + math.ceil(when) for when in milestones(config)]
    within = sum(fall < config.steps for fall in falls)
    if within == len(falls):
        return None
    at = " and ".join(map(str, falls))
    how_often = ("never falls", "falls only once")[within] if within < 2 else f"falls only {counted(within, 'time')}"
    room = config.steps - math.ceil(milestones(config)[-1])
    fewer = f"a --warmup_steps below {room}, " if room > 0 else ""
    return (f"multistep lowers the rate at steps {at}, counted after the warm-up of {config.warmup_steps} as MMAudio "
            f"did; with --steps {config.steps} it {how_often}. Use {fewer}earlier --lr_milestones, or --lr_schedule "
            "cosine")


def learning_rate(step: int, config: Schedule) -> float:
    """Return the rate of optimiser step ``step`` (from 0): linear warm-up (k+1)/(W+1), then the schedule.

    The first step already learns, as in MMAudio (pitfall F1). "cosine" falls to 0 at the last step;
    "cosine_restarts" does so ``lr_cycles`` times; "multistep" multiplies by ``lr_factor`` at each of
    ``lr_milestones`` (counted after the warm-up, as in MMAudio; a long warm-up pushes them beyond the end, see
    :func:`schedule_problem`).
    """
    after = step - config.warmup_steps
    if after < 0:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = after / max(1, config.steps - config.warmup_steps)  # from 0 to below 1
    if config.lr_schedule == "multistep":
        return multistep_rate(step, config.lr, config.warmup_steps, milestones(config), config.lr_factor)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "cosine_restarts":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (progress * config.lr_cycles % 1)))
    return config.lr


def multistep_rate(
    step: int, lr: float, warmup_steps: int, marks: Sequence[float], gamma: float = 0.1
) -> float:
    """Return MMAudio's rate of optimiser step ``step`` (from 0).

    Args:
        marks: steps, counted after the warm-up, from which on the rate is multiplied by ``gamma`` once more; none for
            a constant rate. The published ones are 240 000 and 270 000.
    """
    after = step - warmup_steps
    if after < 0:
        return lr * (step + 1) / (warmup_steps + 1)
    return lr * gamma ** sum(after >= mark for mark in marks)
