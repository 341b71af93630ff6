"""Memorisation: whether training clips get better while held-out ones do not, and whether the adapter does anything.

Per validation, at the same noise and times for all: how much the loss of some training clips has fallen below that of
the base model, and that of the held-out clips beside it. Where the two come apart, clips are being learned by heart.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selva.data.dataset import ClipDataset
from selva.lora.state import adapter_off
from selva.models.generator import Generator
from selva.training.config import TrainConfig
from selva.training.objective import ALONE, clip_losses, fixed_draw, predicted_velocity
from selva.utils.distributed import World

log = logging.getLogger(__name__)

FEWEST_MEMBERS, MOST_MEMBERS = 8, 16  # training clips that are watched: as many as are held out, within these
CHANGE_CLIPS = 4  # held-out clips whose velocity is compared with the base model's
NO_EFFECT = 1e-3  # relative change of the velocity below which an adapter does nothing


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` numbers below ``count``, evenly spread."""
    taken = min(count, most)
    return [round(i * (count - 1) / max(1, taken - 1)) for i in range(taken)]


def area_under_curve(members: Sequence[float], others: Sequence[float]) -> float:
    """Return the probability that a value of ``members`` is above one of ``others``, ties counting half.

    The area under the ROC curve (Mann and Whitney, 1947): 0.5 means that the two cannot be told apart, 1 that all can.
    """
    first, second = np.asarray(members)[:, None], np.asarray(others)[None]
    return float(((first > second) + 0.5 * (first == second)).mean())


class Watch:
    """Comparison of a model in training with its base on fixed clips, noise and times.

    Args:
        clips: training clips, without sounds to preserve. val_clips: held-out clips, at least one.
        world: the processes that share the validation; this one looks at its own held-out clips only.
    """

    def __init__(
        self, generator: Generator, clips: ClipDataset, val_clips: ClipDataset, config: TrainConfig,
        precision: torch.dtype, world: World = ALONE,
    ) -> None:
        self.generator, self.config, self.precision = generator, config, precision
        self.val_clips, self.world = val_clips, world
        self.members = clips.subset(spread(len(clips), min(MOST_MEMBERS, max(FEWEST_MEMBERS, len(val_clips)))))
        self.base_losses: tuple[Tensor, Tensor] | None = None  # (members, bins), (own held-out clips, bins)
        self.base_velocities: list[Tensor] = []  # (bins, N, C) each
        self._said = False

    def row(self, step: int, held_out: Tensor) -> dict[str, float]:
        """Return the figures of a validation, and say when the adapter does nothing although the rate is at its height.

        Args:
            held_out: (own held-out clips, bins) losses now, on the device.

        Returns:
            ``train_drop``, ``val_drop``: by which share of the base model's the mean losses fell. ``member_auc``: how
            well the drop tells training clips from held-out ones, see :func:`area_under_curve`. ``velocity_change``:
            of the held-out clips, relative to the base model's velocity.
        """
        row = self._row(held_out)
        change = row["velocity_change"]
        if step > self.config.warmup_steps and change < NO_EFFECT and not self._said:
            self._said = True
            log.warning("step %d: the adapter has no effect: it changes what the model predicts for held-out clips by "
                        "%.2g of it, less than a thousandth. Try a higher --lr (3 to 10 times), --lora_plus_ratio 8, "
                        "or more layers (--target attn+mlp)", step, change)
        return row

    def now(self) -> dict[str, float]:
        """Return the figures of :meth:`row` as the model stands, without a word about them."""
        return self._row(clip_losses(self.generator, self.val_clips, self.config, self.precision, self.world))

    def _row(self, held_out: Tensor) -> dict[str, float]:
        self._measure_base()
        assert self.base_losses is not None
        now = self.member_losses()
        drops = [base.mean(dim=1) - new.mean(dim=1)
                 for base, new in zip(self.base_losses, (now, held_out), strict=True)]
        change = self.velocity_change()
        return {
            "train_drop": float(drops[0].mean() / self.base_losses[0].mean()),
            "val_drop": float(drops[1].mean() / self.base_losses[1].mean()),
            "member_auc": area_under_curve(drops[0].tolist(), drops[1].tolist()),
            "velocity_change": change,
        }

    def _measure_base(self) -> None:
        """Measure the base model once, with the adapter off."""
        if self.base_losses is not None:
            return
        with adapter_off(self.generator):
            self.base_losses = (
                self.member_losses(),
                clip_losses(self.generator, self.val_clips, self.config, self.precision, self.world),
            )
            self.base_velocities = self._velocities()

    def member_losses(self) -> Tensor:
        """Return the (members, bins) losses of the watched training clips now."""
        return clip_losses(self.generator, self.members, self.config, self.precision)

    def velocity_change(self) -> float:
        """Return the length of the change of the velocity over the length of the base model's."""
        changes = [(now - base).square().sum().item()
                   for now, base in zip(self._velocities(), self.base_velocities, strict=True)]
        return (sum(changes) / sum(base.square().sum().item() for base in self.base_velocities)) ** 0.5

    @torch.no_grad()
    def _velocities(self) -> list[Tensor]:
        was_training = self.generator.training
        self.generator.eval()
        found = [
            predicted_velocity(self.generator, *fixed_draw(self.generator, self.val_clips.clip(index), self.config),
                               self.config, self.precision)[0].float()
            for index in spread(len(self.val_clips), CHANGE_CLIPS)
        ]
        self.generator.train(was_training)
        return found
