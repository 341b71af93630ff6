"""Flow matching against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from selva import flow


@pytest.mark.parametrize("num_steps", [1, 7, 25])
def test_euler_is_exact_on_a_constant_field(num_steps):
    x0, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(flow.euler(lambda t, x: v, x0, num_steps), x0 + v)


def test_euler_visits_left_end_points_and_reports_steps():
    times, done = [], []
    flow.euler(lambda t, x: (times.append(t.item()), x)[1], torch.ones(1, 1, 1), 4, done.append)
    assert times == [0.0, 0.25, 0.5, 0.75] and done == [1, 2, 3, 4]


def test_euler_approaches_the_exponential():
    x = flow.euler(lambda t, x: x, torch.ones(1, 1, 1, dtype=torch.float64), 1000)
    torch.testing.assert_close(x.item(), (1 + 1 / 1000) ** 1000, rtol=1e-4, atol=0)


def decay_error(solver: str, num_steps: int) -> float:
    """Error at t = 1 of dx/dt = -x + t, x(0) = 1, whose solution is 2 exp(-t) + t - 1; in float64."""
    x = flow.SOLVERS[solver](lambda t, x: -x + t.double(), torch.ones(1, 1, 1, dtype=torch.float64), num_steps)
    assert x.dtype == torch.float64
    return abs(x.item() - 2 * math.exp(-1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 2)])
def test_order_of_convergence(solver, order):
    """Half the step, half the error for first order, a quarter for second; the grid itself is float32."""
    errors = [decay_error(solver, num_steps) for num_steps in (16, 32, 64, 128)]
    found = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(f - order) < 0.15 for f in found), found


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_second_order_is_exact_where_velocity_is_linear_in_time(solver):
    x = flow.SOLVERS[solver](lambda t, x: 3 + 2 * t.double(), torch.zeros(1, 1, 1, dtype=torch.float64), 7)
    assert x.item() == pytest.approx(4, abs=1e-6)
    assert abs(flow.euler(lambda t, x: 3 + 2 * t.double(), torch.zeros(1, 1, 1), 7).item() - 4) > 0.1


def test_where_solvers_evaluate():
    """One evaluation per step of Euler and AB2, two for the others; only Heun looks at t = 1."""
    visited = {}
    for solver in flow.SOLVERS:
        times, done = [], []
        flow.SOLVERS[solver](lambda t, x, ts=times: (ts.append(t.item()), x)[1], torch.ones(1, 1, 1), 2, done.append)
        assert done == [1, 2] and len(times) == 2 * flow.EVALUATIONS_PER_STEP[solver]
        visited[solver] = times
    assert visited == {"euler": [0, 0.5], "midpoint": [0, 0.25, 0.5, 0.75], "heun": [0, 0.5, 0.5, 1], "ab2": [0, 0.5]}


def switched_error(num_steps: int, intervals: list[tuple[float, float]]) -> float:
    """Error at t = 1 of dx/dt = -x + t up to t = 1/2 and -2 x after it, x(0) = 1; in float64."""
    def velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -x + t.double() if flow.within(t.item(), intervals[0] if intervals else (0.0, 0.499)) else -2 * x

    x = flow.ab2(velocity, torch.ones(1, 1, 1, dtype=torch.float64), num_steps, intervals=intervals)
    return abs(x.item() - (2 * math.exp(-0.5) - 0.5) * math.exp(-1))


def test_ab2_begins_anew_where_the_velocity_is_another_one():
    """A velocity of before the switch would cost an order of convergence."""
    errors = [switched_error(num_steps, [(0.0, 0.499)]) for num_steps in (32, 64, 128)]
    found = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(f - 2) < 0.15 for f in found), found
    assert switched_error(128, []) > 20 * errors[-1]  # it has to be told


def test_solve_takes_the_solver_of_the_settings_and_tells_ab2_of_switches():
    x0 = torch.ones(1, 1, 1)
    for solver in flow.SOLVERS:
        found = flow.solve(lambda t, x: -x, x0, flow.SamplingConfig(3, solver=solver), intervals=[(0.0, 0.5)])
        plain = flow.SOLVERS[solver](lambda t, x: -x, x0, 3)
        assert torch.equal(found, plain) == (solver != "ab2")  # two steps of Euler more


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_no_solver_takes_no_steps(solver):
    with pytest.raises(ValueError, match="num_steps is 0"):
        flow.SOLVERS[solver](lambda t, x: x, torch.ones(1, 1, 1), 0)


def test_the_path_starts_at_noise_ends_at_data_and_moves_with_the_target_velocity():
    x0, x1, t = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.tensor([0.0, 1.0, 0.4])
    xt = flow.interpolate(x0, x1, t)
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[1], x1[1])
    step = (flow.interpolate(x0, x1, t + 0.01) - xt) / 0.01
    torch.testing.assert_close(step, x1 - x0, rtol=1e-3, atol=1e-3)
    assert torch.equal(flow.loss(x1 - x0, x0, x1), torch.zeros(3))


def test_loss_is_computed_in_float32_per_sample():
    x0, x1 = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    velocity = torch.stack((torch.full((4, 3), 2.0), torch.full((4, 3), 3.0))).to(torch.bfloat16)
    result = flow.loss(velocity, x0, x1)
    assert result.dtype == torch.float32 and result.tolist() == [4.0, 9.0]


def test_guidance():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(flow.guided(a, b, 1.0), a)
    torch.testing.assert_close(flow.guided(a, b, 4.5), b + 4.5 * (a - b))


def test_times_are_drawn_in_float32():
    """Pitfall C3: bfloat16 draws take 256 values."""
    t = flow.sample_times(4096, "uniform", torch.Generator().manual_seed(1))
    assert t.dtype == torch.float32 and t.unique().numel() > 4000
    assert abs(t.mean().item() - 0.5) < 0.02 and t.min() >= 0 and t.max() < 1


def test_logit_normal_times_follow_their_distribution():
    """Pitfall C2: the base models were trained with sigmoid(normal)."""
    t = flow.sample_times(20_000, "logit_normal", torch.Generator().manual_seed(1), sigma=0.5)
    z = torch.logit(t)
    assert abs(z.mean().item()) < 0.02 and abs(z.std().item() - 0.5) < 0.02


def test_curriculum_switches_at_a_fraction_of_the_whole_run():
    """Pitfall F6: the switch depends on the absolute progress only."""

    def draw(mode, progress=0.0):
        return flow.sample_times(
            64, mode, torch.Generator().manual_seed(5), progress=progress, curriculum_switch=0.6
        )

    assert torch.equal(draw("curriculum", 0.59), draw("logit_normal"))
    assert torch.equal(draw("curriculum", 0.6), draw("uniform"))


def test_unknown_mode_lists_the_known_ones():
    with pytest.raises(ValueError, match="logit_normal, uniform, curriculum"):
        flow.sample_times(1, "log_normal")
