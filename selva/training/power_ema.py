"""Averages by power functions: several widths at once, from which any other is synthesised after the training.

The average of width sigma_rel (its deviation in relation to the length of the training so far) weighs the parameters of
step tau at step u in proportion to tau ** gamma. Snapshots of two such averages span a space in which those of other
widths nearly lie. Source: Karras et al., arXiv:2312.02696, section 3, in the form of MMAudio's trainer (nitrous-ema),
whose decay differs from the paper's by a shift of about 1.5 updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selva.training.ema import applied
from selva.utils.errors import UserError

SIGMA_RELS = (0.05, 0.10)  # the two widths of MMAudio; the first is that of its published weights
MAX_SIGMA_REL = 12**-0.5  # of gamma = 0, the mean of all steps with equal weights
UNUSED = 1e-9  # weights of snapshots below it are rounding errors of the solution


def exponent(sigma_rel: float) -> float:
    """Return gamma, 0 or more, of the power function whose width is ``sigma_rel``, in (0, 0.288].

    The largest root of gamma**3 + 7 gamma**2 + (16 - sigma_rel**-2) gamma + 12 - sigma_rel**-2; arXiv:2312.02696,
    appendix C.

    Raises:
        UserError: there is no such function.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise UserError(f"the width of an average is {sigma_rel}, expected more than 0 and at most "
                        f"{MAX_SIGMA_REL:.4f}, which is the mean of all steps")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots[np.isreal(roots)].real.max()))


def decay(step: int, gamma: float, every: int = 1) -> float:
    """Return the share of the old average that update number ``step`` (from 1) keeps, if one in ``every`` counts."""
    # The geometric mean over the step and the one that follows, as MMAudio corrects for the size of the step.
    near, far = 1 - 1 / (step + 1), 1 - 1 / (step + 1 + every)
    return (near * far) ** ((gamma + 1) * every / 2)


def synthesis_weights(snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> np.ndarray:
    """Return the factors with which snapshots add up to the average of width ``sigma_rel`` at ``step``.

    Least squares between the power functions, in float64; the factors need not sum to 1. Snapshots later than ``step``
    are used as well.

    Args:
        snapshots: (step, sigma_rel) of each, no two the same.

    Returns:
        (len(snapshots),) float64.
    """
    steps = np.array([at for at, _ in snapshots], dtype=np.float64)
    # Rounded as MMAudio's program rounds them, so that the results are the same.
    gammas = np.array([exponent(width) for _, width in snapshots], dtype=np.float32).astype(np.float64)
    target = float(np.float32(exponent(sigma_rel)))
    gram = _inner(steps[:, None], gammas[:, None], steps, gammas)
    return np.linalg.solve(gram, _inner(steps, gammas, np.float64(step), np.float64(target)))


def synthesis_error(
    snapshots: Sequence[tuple[int, float]], weights: np.ndarray, step: int, sigma_rel: float
) -> float:
    """Return the distance of a synthesised average from a tracked one, in relation to its length, from 0 to 1.

    Between the two power functions, whose squares add up; so it is the share of the noise of single steps that differs.
    """
    steps = np.array([at for at, _ in snapshots], dtype=np.float64)
    gammas, gamma = np.array([exponent(width) for _, width in snapshots]), exponent(sigma_rel)
    length = (gamma + 1) ** 2 / ((2 * gamma + 1) * step)
    explained = weights @ _inner(steps, gammas, np.float64(step), np.float64(gamma)) / length
    return math.sqrt(min(1.0, max(0.0, 1 - float(explained))))


def _inner(t_a: np.ndarray, gamma_a: np.ndarray, t_b: Any, gamma_b: Any) -> np.ndarray:
    """Return the inner product of the normalised functions tau ** gamma on (0, t]."""
    powers = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** powers / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


class PowerEMA:
    """Averages of parameters by name, one track for every width.

    Args:
        parameters: what the model holds; those that need no gradient are constants, and not averaged.
        sigma_rels: widths of the tracks; the first is the one that :meth:`applied` uses.
        every: only one in so many updates counts, the first of them.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], sigma_rels: Sequence[float] = SIGMA_RELS, every: int = 1
    ) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.constants = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.sigma_rels, self.every = tuple(sigma_rels), every
        self.gammas = [exponent(sigma_rel) for sigma_rel in sigma_rels]
        self.step = 0  # updates of the parameters that were seen
        self.tracks: list[dict[str, Tensor]] = [
            {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()} for _ in sigma_rels
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after ``step`` updates into the averages.

        The first update is copied. An average that is switched on later takes all steps before as its start values.
        """
        self.step = step
        if (step - 1) % self.every:
            return
        values = [p.detach().to(torch.float32) for p in self.parameters.values()]
        for track, gamma in zip(self.tracks, self.gammas, strict=True):
            kept = 0.0 if step == 1 else decay(step, gamma, self.every)
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  -- one kernel, no public name
                list(track.values()), values, 1 - kept)

    @property
    def average(self) -> dict[str, Tensor]:
        """The first track."""
        return self.tracks[0]

    def values(self, track: int) -> dict[str, Tensor]:
        """Return all parameters with the averages of one track; constants are themselves."""
        return {**{name: p.detach() for name, p in self.constants.items()}, **self.tracks[track]}

    def start_at(self, values: Mapping[str, Tensor]) -> None:
        """Begin with these values, by the names of the parameters, in every track."""
        for track in self.tracks:
            for name, value in track.items():
                value.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """Return the state that :meth:`restore` continues from."""
        return {"kind": "power", "sigma_rels": list(self.sigma_rels), "step": self.step, "tracks": self.tracks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a stored state.

        Raises:
            UserError: it is of other widths.
        """
        if not all(map(math.isclose, state["sigma_rels"], self.sigma_rels)) or (
            len(state["sigma_rels"]) != len(self.sigma_rels)
        ):
            raise UserError(f"the stored averages are of the widths {list(state['sigma_rels'])} and this run asks for "
                            f"{list(self.sigma_rels)}; use the same, or start a new run")
        self.step = state["step"]
        for track, stored in zip(self.tracks, state["tracks"], strict=True):
            for name, value in track.items():
                value.copy_(stored[name])

    def applied(self) -> AbstractContextManager[None]:
        """Put the first track into the model for the duration of the block."""
        return applied(self.parameters, self.average)
