"""State of a base training, and the step that changes it."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset
from selva.data.mixture import MixedClips
from selva.models import winograd_conv
from selva.models.generator import Generator
from selva.training.base.config import BaseTrainConfig
from selva.training.base.parallel import ParallelObjective, whole
from selva.training.base.stream import BatchStream
from selva.training.compiling import compile_blocks_
from selva.training.objective import ALONE, validate
from selva.training.power_ema import PowerEMA
from selva.training.run import finite_step_
from selva.training.schedule import learning_rate
from selva.utils.device import FUSED_DEVICES
from selva.utils.distributed import World
from selva.utils.errors import UserError

log = logging.getLogger(__name__)

CONSTANTS = ("latent_mean", "latent_std", "empty_string_feat")  # never trained
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for every parameter


def choose_trainable_(generator: Generator, patterns: Sequence[str]) -> list[str]:
    """Let the parameters need gradients whose names match a pattern, and no others; return their names.

    Raises:
        UserError: a pattern matches nothing that can be trained.
    """
    names = [name for name, _ in generator.named_parameters() if name not in CONSTANTS]
    if idle := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
        raise UserError(f"--trainable {' '.join(idle)}: matches no parameter; there are, for example, {names[5]} and "
                        f"{names[-1]}")
    chosen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


class BaseRun:
    """State of a training of a whole generator: weights, optimiser, averages, place in the data.

    There is no random state: all draws are functions of the seed and the place in the data.

    Args:
        generator: float32, on its device, with the weights to start from; the same in every process.
        val_clips: held-out rows, possibly none.
        precision: autocast dtype of the network; float32 switches autocast off.
    """

    rows_per_step = False
    advice = "look at --data: more of it, or a smaller number of steps"

    def __init__(
        self, generator: Generator, clips: MixedClips, val_clips: ClipDataset, config: BaseTrainConfig,
        precision: torch.dtype, world: World = ALONE,
    ) -> None:
        self.generator, self.clips, self.val_clips, self.config = generator, clips, val_clips, config
        self.precision, self.world, self.device = precision, world, generator.latent_mean.device
        choose_trainable_(generator, config.trainable)
        generator.gradient_checkpointing = config.grad_checkpointing
        if config.compile:
            compile_blocks_(generator)
        self.objective = ParallelObjective(generator, config, precision, world, config.shard)
        self.parameters = dict(generator.named_parameters())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.fused = self.device.type in FUSED_DEVICES and not self.objective.is_sharded
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay,
            eps=config.eps("fp32" if precision == torch.float32 else "bf16"), fused=self.fused)
        self.average = PowerEMA(self.parameters, config.ema_sigma_rel)
        self.stream = BatchStream(
            clips, config, batch_size=config.batch_size, steps=config.steps, world=world,
            micro_batch_size=config.micro_batch_size, prefetch=config.prefetch, readers=config.readers,
            pin=self.device.type == "cuda")
        self.step = 0  # optimiser updates done
        self.place = 0  # of the next visit in the mixture
        self.seen = [0] * len(clips.sets)  # visits to every set
        self.best_step, self.best_val_loss, self.worse_in_a_row = 0, math.inf, 0

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimiser update and return the loss and the unclipped gradient norm, both scalars on the device.

        An update whose gradient is not finite is skipped.
        """
        config, world = self.config, self.world
        drawn, total = self.stream.draw(), torch.zeros((), device=self.device)
        for number, part in enumerate(drawn.parts):
            with self.objective.gradients_stay(number + 1 < len(drawn.parts)):
                losses = self.objective(part.batch.to(self.device), part.noise)
                # The mean over all processes of the sums of their own rows, which may be fewer by one in some.
                (losses.sum() * (world.size / config.batch_size)).backward()
            total += losses.detach().sum()
        total = world.sum_(total) / config.batch_size
        norm = whole(torch.nn.utils.clip_grad_norm_(self.trained.values(), config.grad_clip))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        finite_step_(self.optimizer, norm, self.fused)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.place += config.batch_size
        self.seen = [seen + new for seen, new in zip(self.seen, drawn.per_source, strict=True)]
        self.average.update(self.step)
        return total, norm

    def validate(self) -> dict[str, Any]:
        """Return the row for ``metrics.jsonl`` of a validation now, with the averaged weights; keep track of the best.

        All processes have to come here together.
        """
        if self.objective.is_sharded:  # gathered weights have no mark by which it could tell that they have changed
            winograd_conv.forget()
        with self.average.applied():
            bins = validate(self.generator, self.val_clips, self.config, self.precision, self.world, self.objective)
        loss = sum(bins) / len(bins)
        self.worse_in_a_row += 1
        if loss < self.best_val_loss:
            self.best_step, self.best_val_loss, self.worse_in_a_row = self.step, loss, 0
        return {"step": self.step, "val_loss": loss, "val_loss_bins": bins}

    # -- state ---------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by name, themselves; those of the optimiser are made where there are none."""
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                tensors[f"{moment}.{name}"] = state[moment]
            if "step" not in state:
                state["step"] = torch.zeros((), device=self.device if self.fused else "cpu")
        for number, track in enumerate(self.average.tracks):
            tensors |= {f"ema{number}.{name}": value for name, value in track.items()}
        return tensors

    def numbers(self) -> dict[str, Any]:
        """Return the rest of the state, as JSON can hold it; :meth:`restore` takes it back."""
        first = next(iter(self.trained.values()))
        return {
            "step": self.step, "place": self.place, "seen": self.seen,
            "updates": int(self.optimizer.state[first]["step"]) if self.optimizer.state[first] else 0,
            "best": {"step": self.best_step, "val_loss": self.best_val_loss if self.best_step else None,
                     "worse_in_a_row": self.worse_in_a_row},
            "ema": {"sigma_rels": list(self.average.sigma_rels), "step": self.average.step},
        }

    def restore(self, numbers: dict[str, Any]) -> None:
        """Continue from stored numbers, when the tensors of :meth:`tensors` hold their stored values already."""
        self.step, self.place, self.seen = numbers["step"], numbers["place"], list(numbers["seen"])
        for parameter in self.trained.values():
            self.optimizer.state[parameter]["step"].fill_(float(numbers["updates"]))
        best = numbers["best"]
        self.best_step, self.worse_in_a_row = best["step"], best["worse_in_a_row"]
        self.best_val_loss = math.inf if best["val_loss"] is None else best["val_loss"]
        self.average.step = numbers["ema"]["step"]
        self.stream.start_at(self.step, self.place)

    def weights(self, track: int | None = None) -> dict[str, Tensor]:
        """Return the whole state dict of the generator on the CPU, or that of an average, in the process that writes.

        All processes have to come here together; the others get an empty one.
        """
        values = self.parameters if track is None else self.average.values(track)
        gathered: dict[str, Tensor] = {}
        for name in self.parameters:  # in the order of the published files
            value = whole(values[name].detach())
            if self.world.is_main:
                gathered[name] = value.to("cpu", torch.float32, copy=True)
        return gathered


def described(config: BaseTrainConfig) -> dict[str, Any]:
    """Return the settings that change what is learned, which a continued run has to share."""
    objective = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
                 if field.name in ("timestep_mode", "logit_normal_sigma", "curriculum_switch", "null_prob", "latent",
                                   "clip_features", "seed")}
    return {**objective, "variant": config.model.variant, "trainable": list(config.trainable),
            "ema_sigma_rel": list(config.ema_sigma_rel)}
