"""Settings of a training: how an adapter is optimised, on which objective, and when it is validated and saved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selva import flow

LATENT_MODES = ("sample", "mode")
LR_SCHEDULES = ("constant", "cosine", "multistep", "cosine_restarts")
CLIP_FEATURE_MODES = ("use", "empty")


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained; one step is one optimiser update, whatever ``grad_accum`` is."""

    steps: int = 2000
    lr: float = 1e-4
    warmup_steps: int = 100
    lr_schedule: str = "constant"
    lr_cycles: int = 4  # of cosine_restarts
    batch_size: int = 4
    grad_accum: int = 1
    lora_plus_ratio: float = 1.0  # learning rate of lora_B over that of lora_A (arXiv:2402.12354)
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    timestep_mode: str = "logit_normal"
    logit_normal_sigma: float = 1.0
    curriculum_switch: float = 0.6  # fraction of all steps
    null_prob: float = 0.1
    latent: str = "sample"
    clip_features: str = "use"
    ema_decay: float = 0.0  # 0: no average of the adapter is kept
    patience: int = 0  # stop after so many validations without a new best; 0: never
    seed: int = 42
    save_every: int = 500
    val_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {least}"
            for name, least in (("steps", 1), ("warmup_steps", 0), ("batch_size", 1), ("grad_accum", 1),
                                ("save_every", 1), ("val_every", 1), ("log_every", 1), ("lr_cycles", 1),
                                ("patience", 0))
            if getattr(self, name) < least
        ]
        problems += [
            f"{name} is {getattr(self, name)}, expected a number above 0"
            for name in ("lr", "lora_plus_ratio", "logit_normal_sigma", "grad_clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        problems += [
            f"{name} is {getattr(self, name)}, expected 0 to 1"
            for name in ("null_prob", "curriculum_switch")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay is {self.ema_decay}, expected 0 to below 1")
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay is {self.weight_decay}, expected at least 0")
        problems += [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
            for name, allowed in (("timestep_mode", flow.TIMESTEP_MODES), ("latent", LATENT_MODES),
                                  ("clip_features", CLIP_FEATURE_MODES), ("lr_schedule", LR_SCHEDULES))
            if getattr(self, name) not in allowed
        ]
        if problems:
            raise ValueError("; ".join(problems))
