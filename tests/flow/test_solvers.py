import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.flow.multistep import MULTISTEP, Past, multistep
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.solvers import ODE_SOLVERS, rk_step


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4)]
)
def test_convergence_order_on_an_analytic_field(solver, order):
    # x' = x cos t, so x(1) = x(0) exp(sin 1); in float64, or order 4 drowns in rounding
    with jax.enable_x64(True):

        def error(steps):
            times, x = jnp.linspace(0, 1, steps + 1), jnp.float64(1.0)
            for t0, t1 in zip(times, times[1:]):
                x = rk_step(ODE_SOLVERS[solver], lambda x, t, i: x * jnp.cos(t), x, t0, t1)
            return abs(float(x) - np.exp(np.sin(1)))

        measured = np.log2(error(32) / error(64))
    assert measured == pytest.approx(order, abs=0.15)


def test_a_step_back_undoes_a_step():
    t0, t1 = jnp.float32(0.2), jnp.float32(0.21)
    field = lambda x, t, i: {"a": -x["a"] * t}
    there = rk_step(ODE_SOLVERS["rk4"], field, {"a": jnp.float32(2.0)}, t0, t1)
    back = rk_step(ODE_SOLVERS["rk4"], field, there, t1, t0)
    assert float(back["a"]) == pytest.approx(2.0, abs=1e-6)


def integrated(solver, times, field, x=1.0, restarts=()):
    """The state at the last of the times, in float64."""
    rows, x = MULTISTEP[solver](Flow(), times, restarts), jnp.full((1, 1, 1, 1), x)
    past = Past.empty(x, rows.rule)
    for i, t in enumerate(times[:-1]):
        row = tuple(None if a is None else a[i] for a in (rows.weights, rows.corrector))
        x, past = multistep(rows.rule, Flow(), field, x, jnp.float64(t), row, past)
    return float(x.squeeze())


def to_a_gaussian(x, t, i):
    """The velocity of clean images from N(1, 1/4): x(t) = t + sqrt(t^2 / 4 + (1 - t)^2) x(0)."""
    clean = 1 + t / 4 / (t**2 / 4 + (1 - t) ** 2) * (x - t)
    return (clean - x) / (1 - t)


@pytest.mark.parametrize(
    ("solver", "order"), [("ab2", 2), ("ab3", 3), ("ab4", 4), ("dpm++2m", 2), ("unipc2", 3)]
)
def test_convergence_order_of_multistep_solvers(solver, order):
    """Adams on grids whose first steps are short enough for the lower orders that they have, the
    others where log(alpha / sigma) is finite: at pure noise they lose log(steps)."""
    with jax.enable_x64(True):

        def error(steps):
            times = np.linspace(0, 1, steps + 1)
            if solver.startswith("ab"):
                end = integrated(solver, times ** (order - 1), lambda x, t, i: x * jnp.cos(t))
                return abs(end - np.exp(np.sin(1)))
            start, exact = (t + np.sqrt(t**2 / 4 + (1 - t) ** 2) for t in (0.1, 0.9))
            return abs(integrated(solver, 0.1 + 0.8 * times, to_a_gaussian, start) - exact)

        measured = np.log2(error(128) / error(256))
    assert measured == pytest.approx(order, abs=0.2)


def test_a_restart_looks_at_no_step_before_it():
    times = np.linspace(0, 1, 9)
    for solver, rows_of in MULTISTEP.items():
        rows, whole = rows_of(Flow(), times, restarts=(4,)), rows_of(Flow(), times)
        first = rows_of(Flow(), times[4:])
        assert not rows.weights[4, 2:].any() and whole.weights[4, 2:].any()
        if rows.rule.basis == "velocity":
            np.testing.assert_allclose(rows.weights[4:], first.weights, atol=1e-12)
        if rows.corrector is not None:
            np.testing.assert_array_equal(rows.corrector[4], [1, 0, 0, 0, 0])
        np.testing.assert_array_equal(rows.weights[:4], whole.weights[:4], err_msg=solver)


def test_dpm_solver_takes_the_clean_image_of_half_a_step_ahead():
    """Of the line through the last two in l = log(alpha / sigma), on steps of any length."""
    times = np.array([0.1, 0.15, 0.4, 0.45, 0.8, 0.9])
    log_snr = np.log(times / (1 - times))
    weights = MULTISTEP["dpm++2m"](Flow(), times).weights
    for i in range(1, len(weights)):
        total = weights[i, 1:].sum()
        seen = weights[i, 1:] @ log_snr[[i, i - 1]] / total
        assert seen == pytest.approx((log_snr[i] + log_snr[i + 1]) / 2, abs=1e-9)


@pytest.mark.parametrize("solver", ["dpm++2m", "unipc2"])
def test_a_known_clean_image_is_reached_on_any_grid(solver):
    with jax.enable_x64(True):
        times, clean = np.array([0.0, 0.1, 0.35, 0.8, 1.0]), 3.0
        for points in (2, 3, 4, 5):
            end = integrated(solver, times[:points], lambda x, t, i: (clean - x) / (1 - t), -1.5)
            last = times[points - 1]
            assert end == pytest.approx(last * clean - (1 - last) * 1.5, abs=1e-12)
