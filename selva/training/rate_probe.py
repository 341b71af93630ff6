"""Probe of the learning rate: a short range test before the training, on a few fixed batches of its own clips.

The rate rises by a constant factor from step to step, from one that changes nothing to one that breaks everything
(Smith, arXiv:1506.01186). Batches, noise and times are fixed, so that the loss changes by the steps alone. It falls, is
lowest, and rises where steps become too large; the rate for a whole training is a fixed part of that at the lowest
loss, as a long training wants smaller steps than a few. Takes about 30 steps; the adapter is as before afterwards.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selva.data.dataset import Batch, ClipDataset
from selva.data.order import BucketBatchSampler
from selva.lora.state import load_lora_state_, lora_parameters, lora_plus_groups, lora_state_dict
from selva.models.generator import Generator
from selva.training.config import TrainConfig
from selva.training.objective import NoiseSample, flow_loss, sample_noise
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

LOWEST, HIGHEST, PER_DECADE = 1e-5, 1.0, 8  # rates of the test
NUM_BATCHES = 4  # used in turn; a figure is the mean over all of them
MOST_DRAWN = 12  # to find so many whose loss is finite
NAMED = 5  # clips in a message
PART = 0.5  # of the rate at the lowest loss; the tests have the problems that it was chosen on
BROKEN = 1.5  # times its first loss, and no higher rate is tried


@dataclass(frozen=True)
class ProbedRate:
    """Result of a probe.

    Attributes:
        lr: the rate to train with. lowest_at: the rate at which the loss was lowest. fallen: by what share it had
            fallen there. steps: of the test.
        at_the_end: no higher rate was tried, though none had broken anything.
    """

    lr: float
    lowest_at: float
    fallen: float
    steps: int
    at_the_end: bool = False

    @property
    def reason(self) -> str:
        """A sentence for the log."""
        end = "; it was still falling, so give --lr if you know better" if self.at_the_end else ""
        fixed, steps = counted(NUM_BATCHES, "fixed batch", "fixed batches"), counted(self.steps, "step")
        return (f"{PART:g} of {self.lowest_at:.1e}, where the loss of {fixed} was lowest "
                f"({100 * self.fallen:.0f} % below the first) while the rate rose over {steps}{end}")


def range_test(
    optimizer: torch.optim.Optimizer, losses: Sequence[Callable[[], Tensor]], grad_clip: float = 1.0,
    agreed: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> ProbedRate:
    """Return the rate for a training, from steps with rising rates; the parameters are left where these end.

    Args:
        optimizer: whose groups have their ratios to the rate as ``lr``.
        losses: of fixed batches, each computes a scalar.
        agreed: gives all processes of a training the same number.

    Raises:
        UserError: a step at the lowest rates leaves a loss that is not finite.
    """
    ratios = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    firsts: list[float] = []
    relative: list[float] = []
    count = round(math.log10(HIGHEST / LOWEST) * PER_DECADE)
    for step in range(count):
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = LOWEST * 10 ** (step / PER_DECADE) * ratio
        optimizer.zero_grad(set_to_none=True)
        loss = losses[step % len(losses)]()
        loss.backward()
        value = agreed(loss.detach()).item()
        firsts += [value] if step < len(losses) else []
        relative.append(value / firsts[step % len(losses)])
        if not relative[-1] <= BROKEN:  # or it is not finite
            relative.pop()
            break
        torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        optimizer.step()
    width = len(losses)
    if len(relative) < width:
        raise UserError(f"--lr_probe: the loss is not finite after {counted(len(relative), 'step')} at rates from "
                        f"{LOWEST:g} on, expected one that can be measured; gradients beyond --precision: use "
                        "--precision fp32, or give --lr instead of the probe")
    means = [sum(relative[i : i + width]) / width for i in range(max(1, len(relative) - width + 1))]
    place = min(range(len(means)), key=means.__getitem__)
    # The loss of a step is that after the steps before it; of all in the mean, the middle one.
    lowest_at = LOWEST * 10 ** ((place + (width - 1) / 2 - 1) / PER_DECADE)
    return ProbedRate(PART * lowest_at, lowest_at, 1 - means[place], len(relative),
                      len(relative) == count and place == len(means) - 1)


def probe_rate(
    generator: Generator, clips: ClipDataset, config: TrainConfig, precision: torch.dtype, world: World
) -> ProbedRate:
    """Return the rate to train a fresh adapter with, which depends on the arguments only; the adapter is not changed.

    Args:
        generator: with its adapter, on its device. clips: to train on; the same in all processes.
        config: batch size, seed, objective and LoRA+; its ``lr`` does not matter.

    Raises:
        UserError: the loss of too many batches is not finite, or becomes so at the lowest rates.
    """
    held, was_training = lora_state_dict(generator), generator.training
    generator.eval()  # without dropout
    scale = 1024.0 if precision == torch.float16 else 1.0  # gradients below 6e-8 would vanish; Adam knows no scale

    def agreed(loss: Tensor) -> Tensor:
        return world.sum_(loss) / world.size

    optimizer = torch.optim.AdamW(lora_plus_groups(generator, 1.0, config.lora_plus_ratio), betas=config.betas,
                                  eps=config.adam_eps, weight_decay=0.0)
    try:
        losses = _fixed_losses(generator, clips, config, precision, agreed)
        found = range_test(optimizer, [lambda one=one: scale * one().mean() for one in losses],
                           scale * config.grad_clip, agreed)
    finally:
        load_lora_state_(generator, held)
        for parameter in lora_parameters(generator):
            parameter.grad = None
        generator.train(was_training)
    log.info("learning rate %.2e: %s", found.lr, found.reason)
    return found


def _fixed_losses(
    generator: Generator, clips: ClipDataset, config: TrainConfig, precision: torch.dtype,
    agreed: Callable[[Tensor], Tensor],
) -> list[Callable[[], Tensor]]:
    """Return functions that compute the (B,) losses of the first batches whose loss is finite.

    Others are left out, as a training leaves out their updates, and their clips are named.
    """
    batches, rng = BucketBatchSampler(clips, config.batch_size, config.seed), torch.Generator().manual_seed(config.seed)
    losses: list[Callable[[], Tensor]] = []
    for _ in range(MOST_DRAWN):
        windows = batches.draw()
        batch = batches.load(windows).to(generator.latent_mean.device)
        noise = sample_noise(batch.mean.shape, config, rng, 0.0)

        def compute(batch: Batch = batch, noise: NoiseSample = noise) -> Tensor:
            return flow_loss(generator, batch, noise, config, precision)

        found = compute().detach()
        if math.isfinite(agreed(found.mean()).item()):
            losses.append(compute)
            if len(losses) == NUM_BATCHES:
                return losses
        else:
            names = [clips.ids[use.index] for use, loss in zip(windows, found.tolist(), strict=True)
                     if not math.isfinite(loss)]
            log.warning("--lr_probe: the loss of %s is not finite, so another batch is taken", listed(names, NAMED))
    raise UserError(f"--lr_probe: the loss of {MOST_DRAWN - len(losses)} of {counted(MOST_DRAWN, 'batch', 'batches')} "
                    f"is not finite, expected at most {MOST_DRAWN - NUM_BATCHES}; features of another model, or values "
                    "beyond --precision: look at the clips that are named above, or use --precision fp32")
