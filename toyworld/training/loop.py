"""The loop that all stages share: AdamW, averaged weights, checkpoints, exact resume.

Everything random about a step depends on the seed and the number of the step, so a run that was stopped and resumed
ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from selva.training.ema import EMA
from selva.utils.errors import UserError
from selva.utils.files import atomic_path
from selva.utils.progress import Progress
from selva.utils.text import counted
from selva.utils.torch_files import write_torch

log = logging.getLogger(f"selva.{__name__}")  # below the logger that scripts set up

STATE_FILE, METRICS_FILE = "state.pt", "metrics.jsonl"


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the optimisation of one stage.

    Attributes:
        lr: held after a linear warm-up, then falls linearly to 0 over the last ``decay_fraction`` of the steps.
        ema_decay: of the averaged weights, which are the result; the average starts with the first weights and is
            slow to follow only as far as steps allow it.
    """

    steps: int
    lr: float
    batch_size: int
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    seed: int = 0
    precision: str = "fp32"
    save_every_sec: float = 60.0
    log_every: int = 100
    val_every: int = 1000


class Task(ABC):
    """The objective of a stage. ``network`` holds everything that is trained, temporary heads included."""

    network: nn.Module

    @abstractmethod
    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss of one random batch, and numbers worth logging."""

    def after_update_(self) -> None:  # noqa: B027 -- most stages have nothing to do there
        """Change the network in place after every optimiser step."""

    def validate(self) -> dict[str, float]:
        """Return the measures of the stage on data that is never trained on, with the averaged weights in place."""
        return {}


def learning_rate(step: int, config: LoopConfig) -> float:
    """Return the rate of step ``step`` (from 0)."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    left = (config.steps - step) / max(1.0, config.decay_fraction * config.steps)
    return config.lr * warm * min(1.0, left)


def step_rng(seed: int, step: int) -> np.random.Generator:
    """Return the random state of one step, independent of the steps before it in this process."""
    return np.random.default_rng((seed, step))


def torch_rng(rng: np.random.Generator) -> torch.Generator:
    """Return a CPU generator seeded from ``rng``."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def train(task: Task, config: LoopConfig, folder: Path, device: torch.device, resume: bool = True) -> None:
    """Train ``task.network`` in place up to ``config.steps`` and leave the averaged weights in it.

    ``folder`` receives the state to resume from and ``metrics.jsonl``.

    Raises:
        ValueError: the loss is not finite.
    """
    network, average, optimizer, start = _prepare(task, config, folder, device, resume)
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    parameters = list(average.parameters.values())
    sums: dict[str, float] = {}
    last_save = began = time.monotonic()
    with Progress(config.steps, folder.name, "steps", interval_sec=30) as progress:
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                loss, numbers = task.loss(step_rng(config.seed, step), config.batch_size)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            if not math.isfinite(float(norm)):
                raise UserError(f"{folder.name}: the gradient of step {step} is not finite")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            task.after_update_()
            average.update(step)
            for name, value in {"loss": loss.detach(), "grad_norm": norm, **numbers}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                since = (done - 1) % config.log_every + 1 if done % config.log_every else config.log_every
                row = {"step": done, "sec": round(time.monotonic() - began, 1)}
                row |= {name: round(value / since, 5) for name, value in sums.items()}
                sums = {}
                if done % config.val_every == 0 or done == config.steps:
                    network.eval()
                    with average.applied():
                        row |= {name: round(value, 5) for name, value in task.validate().items()}
                    network.train()
                _append(folder / METRICS_FILE, row)
                progress.update(done, " ".join(f"{k}={v:.4g}" for k, v in row.items() if k not in ("step", "sec")))
            if time.monotonic() - last_save > config.save_every_sec or done == config.steps:
                _save(folder / STATE_FILE, network, average, optimizer, done, config)
                last_save = time.monotonic()
    network.load_state_dict(average.average, strict=False)
    network.eval()


def _prepare(
    task: Task, config: LoopConfig, folder: Path, device: torch.device, resume: bool
) -> tuple[nn.Module, EMA, torch.optim.Optimizer, int]:
    network = task.network.to(device).train()
    average = EMA({name: p for name, p in network.named_parameters() if p.requires_grad}, config.ema_decay)
    optimizer = torch.optim.AdamW(
        _groups(average.parameters, config.weight_decay), lr=config.lr, betas=config.betas
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE_FILE
    if not (resume and path.is_file()):
        (folder / METRICS_FILE).unlink(missing_ok=True)
        return network, average, optimizer, 0
    state = torch.load(path, map_location=device, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    average.restore(state["average"])
    log.info("%s: continues after %d of %s", folder.name, state["step"], counted(config.steps, "step"))
    return network, average, optimizer, state["step"]


def _groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict]:
    """Return optimiser groups: only matrices decay, not biases, norms, gains and learned tokens."""
    matrices = [p for name, p in parameters.items() if p.ndim >= 2 and name.endswith("weight")]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters.values() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _save(
    path: Path, network: nn.Module, average: EMA, optimizer: torch.optim.Optimizer, step: int, config: LoopConfig
) -> None:
    state = {
        "network": network.state_dict(), "average": average.average, "optimizer": optimizer.state_dict(), "step": step,
        "config": asdict(config),
    }
    with atomic_path(path) as temporary:
        write_torch(state, temporary)


def _append(path: Path, row: Mapping[str, float]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
