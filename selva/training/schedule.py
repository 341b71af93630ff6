"""Learning-rate schedules."""

from __future__ import annotations

import math

from selva.training.config import TrainConfig

MULTISTEP_DECAYS = (0.8, 0.9)  # fractions of all steps at which multistep divides the rate by ten, as MMAudio did


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of optimiser step ``step`` (from 0): linear warm-up (k+1)/(W+1), then the schedule.

    The first step already learns, as in MMAudio (pitfall F1). "cosine" falls to 0 at the last step;
    "cosine_restarts" does so ``lr_cycles`` times; "multistep" divides by ten twice (``MULTISTEP_DECAYS``, counted
    after the warm-up, as in MMAudio).
    """
    after = step - config.warmup_steps
    if after < 0:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = after / max(1, config.steps - config.warmup_steps)  # from 0 to below 1
    if config.lr_schedule == "multistep":
        return config.lr * 0.1 ** sum(after >= decay * config.steps for decay in MULTISTEP_DECAYS)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "cosine_restarts":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (progress * config.lr_cycles % 1)))
    return config.lr
