"""The unconditional branch of guidance, held in place while an adapter is trained.

Guided sampling moves by  v(empty) + w (v(conditions) - v(empty)),  classifier-free guidance (arXiv:2207.12598). What an
adapter learns for the conditions of its clips reaches the empty ones too, as all share the weights. Then the difference
loses what was learned, and a guidance of w = 4.5 leads away from the new sound: an adapter that makes it well without
guidance makes it badly with it. So for a share of the training clips the adapted model is also taught, without
conditions and at the same points between noise and data, the velocity that the base model has there. The targets have
no noise: where nothing has drifted, they teach nothing. What it is worth is measured in docs/findings.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selva.lora.layers import base_only
from selva.models.generator import Generator


def chosen_rows(first: int, count: int, share: float) -> list[int]:
    """Return the rows of a batch that are also taught without conditions, evenly spread over all clips of a run.

    Args:
        first: number of the batch's first clip, counted from the beginning of the run over all processes.
        count: clips in the batch. share: of all clips, 0 to 1.
    """
    return [row for row in range(count)
            if math.floor((first + row + 1) * share) > math.floor((first + row) * share)]


def drift(generator: Generator, points: Tensor, t: Tensor, precision: torch.dtype) -> Tensor:
    """Return the (B,) mean squared differences of the velocities without conditions from those of the base model.

    Args:
        points: (B, N, C) normalised latents between noise and data. t: (B,) their times.
        precision: autocast dtype of the network. The generator is set to the lengths of the clips.
    """

    def velocity() -> Tensor:
        return generator.predict_flow(points, t, generator.empty_conditions(len(points))).float()

    with generator.computing_in(precision):
        with torch.no_grad(), base_only(generator):
            of_base = velocity()
        own = velocity()
    return (own - of_base).square().mean(dim=(1, 2))
