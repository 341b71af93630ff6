"""Flow matching: the path from noise to data, its velocity, the loss, times for training, and solvers for sampling.

Time runs as in MMAudio: t = 0 is noise, t = 1 is data. Functions of tensors only; sigma_min is 0 throughout.
Source: Lipman et al., arXiv:2210.02747; MMAudio, arXiv:2412.15322.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selva.utils.errors import UserError
from selva.utils.settings import setting

if TYPE_CHECKING:  # the settings in here must not cost the seconds that importing PyTorch takes
    import torch
    from torch import Tensor

    # fn(t, x): scalar time on the CPU and state on any device -> velocity of the state's shape
    Velocity = Callable[[Tensor, Tensor], Tensor]

OnStep = Callable[[int], None]
Interval = tuple[float, float]

TIMESTEP_MODES = ("logit_normal", "uniform", "curriculum")


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Return the point at time ``t`` on the straight path from noise to data.

    Args:
        x0: (B, N, C) Gaussian noise.
        x1: (B, N, C) normalised audio latents.
        t: (B,) times in [0, 1].

    Returns:
        (B, N, C) ``(1 - t) x0 + t x1``; arXiv:2210.02747, eq. 22 with sigma_min = 0.
    """
    t = t[:, None, None]  # (B, 1, 1)
    return (1 - t) * x0 + t * x1


def loss(velocity: Tensor, x0: Tensor, x1: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Return (B,) the mean squared error per sample against the target velocity ``x1 - x0``, in float32.

    Args:
        left_out: (B, N) bool, True where a frame does not count; the mean of a sample is over its other frames.
    """
    errors = (velocity.float() - (x1 - x0).float()).square()  # (B, N, C)
    if left_out is None:
        return errors.mean(dim=(1, 2))
    counted = (~left_out).float()
    return (errors.mean(dim=2) * counted).sum(dim=1) / counted.sum(dim=1)


def guided(v_cond: Tensor, v_uncond: Tensor, w: float) -> Tensor:
    """Return ``w v_cond + (1 - w) v_uncond``, classifier-free guidance (arXiv:2207.12598) of strength ``w``."""
    return w * v_cond + (1 - w) * v_uncond


def _intervals(num_steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (number, t, t_next) of every step, scalar float32 times on the CPU, from t = 0 to t = 1.

    The grid is ``linspace(0, 1, num_steps + 1)`` in float32, as in the reference; callers take the float32 difference
    of neighbours as the step. It stays on the CPU: a scalar of the CPU multiplies a tensor of any device, and whoever
    decides something by the time need not wait for a device to tell it.
    """
    import torch

    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}, expected at least 1")
    grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.float32, device="cpu")
    for i in range(num_steps):
        yield i + 1, grid[i], grid[i + 1]


def euler(fn: Velocity, x0: Tensor, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """Return the end point (t = 1) of ``dx/dt = fn(t, x)`` from ``x0`` (t = 0) with ``num_steps`` Euler steps.

    First order, one evaluation per step. The solver of the reference: with it, the same seed gives the same sound.

    Args:
        fn: maps a float32 scalar time on the CPU and the state to the velocity; never called at t = 1.
        x0: (B, N, C); the state keeps this dtype, so pass float32 whatever the network runs in.
        on_step: called with the number of steps done, for progress bars.
    """
    x = x0
    for number, t, t_next in _intervals(num_steps):
        x = x + (t_next - t) * fn(t, x)
        if on_step is not None:
            on_step(number)
    return x


def midpoint(fn: Velocity, x0: Tensor, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """Return the end point of ``dx/dt = fn(t, x)`` with ``num_steps`` midpoint steps; arguments as for :func:`euler`.

    Second order, two evaluations per step: an Euler step over half the interval, then a whole step with the velocity
    found there. ``fn`` is never called at t = 1.
    """
    x = x0
    for number, t, t_next in _intervals(num_steps):
        half = (t_next - t) / 2
        x = x + (t_next - t) * fn(t + half, x + half * fn(t, x))
        if on_step is not None:
            on_step(number)
    return x


def heun(fn: Velocity, x0: Tensor, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """Return the end point of ``dx/dt = fn(t, x)`` with ``num_steps`` Heun steps; arguments as for :func:`euler`.

    Second order, two evaluations per step: an Euler step, then the same step again with the mean of the velocities at
    its two ends (the explicit trapezoidal rule). The last step calls ``fn`` at t = 1, where the velocity of a flow is
    well defined but which training draws almost never.
    """
    x = x0
    for number, t, t_next in _intervals(num_steps):
        step, v = t_next - t, fn(t, x)
        x = x + step / 2 * (v + fn(t_next, x + step * v))
        if on_step is not None:
            on_step(number)
    return x


def ab2(
    fn: Velocity, x0: Tensor, num_steps: int, on_step: OnStep | None = None, intervals: Sequence[Interval] = ()
) -> Tensor:
    """Return the end point of ``dx/dt = fn(t, x)`` with ``num_steps`` steps; other arguments as for :func:`euler`.

    Second-order Adams-Bashforth: a step with ``3/2`` of the velocity here less ``1/2`` of that of the step before (the
    grid is even). One evaluation per step, at the same times as :func:`euler`. The first step is one of Euler, whose
    error of second order keeps the order of the whole.

    Args:
        intervals: of time, in and out of which ``fn`` is another function: where guidance or an adapter acts. A
            velocity from the other side says nothing about this one, so the step after a switch is one of Euler too.
    """
    x, before, sides_before = x0, None, None
    for number, t, t_next in _intervals(num_steps):
        v, sides = fn(t, x), [within(t.item(), interval) for interval in intervals]
        slope = v if before is None or sides != sides_before else 1.5 * v - 0.5 * before
        x = x + (t_next - t) * slope
        before, sides_before = v, sides
        if on_step is not None:
            on_step(number)
    return x


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "ab2": ab2}
EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1}


def solve(
    fn: Velocity, x0: Tensor, config: SamplingConfig, on_step: OnStep | None = None, intervals: Sequence[Interval] = ()
) -> Tensor:
    """Return the end point of ``dx/dt = fn(t, x)`` by the solver and steps of ``config``; arguments as for :func:`ab2`.

    The solvers whose steps do not look back need not know ``intervals``.
    """
    if config.solver == "ab2":
        return ab2(fn, x0, config.num_steps, on_step, intervals)
    return SOLVERS[config.solver](fn, x0, config.num_steps, on_step)


WHOLE_INTERVAL = (0.0, 1.0)
TIME_TOLERANCE = 1e-6  # the float32 grid of times misses decimal bounds by less


def within(t: float, interval: Interval) -> bool:
    """Return True if a time of the float32 grid lies in an interval, both bounds included."""
    return interval[0] - TIME_TOLERANCE <= t <= interval[1] + TIME_TOLERANCE


def check_interval(name: str, times: Sequence[float]) -> tuple[float, float]:
    """Return two times as a tuple; settings files give lists.

    Raises:
        UserError: they are not two times 0 <= start < end <= 1; ``name`` is that of the setting.
    """
    bounds = tuple(times)
    if len(bounds) != 2 or not 0.0 <= bounds[0] < bounds[1] <= 1.0:
        raise UserError(f"{name} is {bounds}, expected two times 0 <= start < end <= 1")
    return bounds[0], bounds[1]


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling; the defaults are those of the MMAudio and SelVA demos.

    Attributes:
        num_steps: steps of the solver from noise to data.
        cfg_strength: guidance; below 1 the unconditional branch is left out.
        solver: "euler", "ab2", "midpoint" or "heun"; the latter two evaluate the network twice a step.
        cfg_interval: guidance only at times from the first to the second, both included (t = 0 is noise, t = 1 is
            data); at other times the conditional branch alone, which halves the work (arXiv:2404.07724).
    """

    num_steps: int = setting(25, "steps of the solver", group="sampling")
    cfg_strength: float = setting(4.5, "guidance: how strictly video and prompt are followed; below 1 there is none",
                                  group="sampling")
    solver: str = setting(
        "euler", "ab2 takes the time of euler, with second-order steps: 12 of them are as good as 25 of euler; "
        "midpoint and heun take twice the time per step", group="sampling", choices=tuple(EVALUATIONS_PER_STEP))
    cfg_interval: tuple[float, float] = setting(
        WHOLE_INTERVAL, "guidance only between these times; 0 is noise, 1 is sound", group="sampling", nargs=2,
        metavar=("LO", "HI"), default_text="0 1")

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"num_steps is {self.num_steps}, expected at least 1")
        if not math.isfinite(self.cfg_strength):
            raise UserError(f"cfg_strength is {self.cfg_strength}, expected a finite number")
        if self.solver not in SOLVERS:
            raise UserError(f"unknown solver {self.solver!r}, expected one of {', '.join(SOLVERS)}")
        object.__setattr__(self, "cfg_interval", check_interval("cfg_interval", self.cfg_interval))

    @property
    def num_evaluations(self) -> int:
        """Number of evaluations of the velocity; each is one network pass, of both branches where there is guidance."""
        return self.num_steps * EVALUATIONS_PER_STEP[self.solver]


def sample_times(
    batch_size: int,
    mode: str,
    rng: torch.Generator | None = None,
    *,
    sigma: float = 1.0,
    progress: float = 0.0,
    curriculum_switch: float = 0.6,
) -> Tensor:
    """Return (batch_size,) float32 training times on the CPU.

    Always float32: bfloat16 draws would take only 256 values (pitfall C3).

    Args:
        mode: "logit_normal" draws sigmoid(sigma * n), n standard normal, as the base models were trained;
            "uniform" draws from [0, 1); "curriculum" is logit_normal until ``progress`` reaches
            ``curriculum_switch`` and uniform from then on.
        progress: the fraction of the whole run that is done, from 0 to 1, whatever step a resume started at.
    """
    import torch

    if mode not in TIMESTEP_MODES:
        raise UserError(f"unknown timestep mode {mode!r}, expected one of {', '.join(TIMESTEP_MODES)}")
    uniform = mode == "uniform" or (mode == "curriculum" and progress >= curriculum_switch)
    if uniform:
        return torch.rand(batch_size, generator=rng, dtype=torch.float32)
    return torch.sigmoid(sigma * torch.randn(batch_size, generator=rng, dtype=torch.float32))
