import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
