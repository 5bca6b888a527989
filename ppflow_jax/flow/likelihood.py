"""Log-likelihood of given images under the probability flow ODE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ppflow_jax.flow.grids import reference_grid
from ppflow_jax.flow.path import Flow, velocity_from
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.solvers import ODE_SOLVERS, rk_step
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params


def log_likelihood(
    apply: Apply,
    model: ModelConfig,
    flow: Flow,
    config: SamplerConfig,
    params: Params,
    x: Float[Array, "b h w c"],
    labels: Cond,
    probes: Key[Array, ""] | Float[Array, "e b h w c"],
) -> tuple[Float[Array, " b"], Float[Array, "b h w c"]]:
    """Integrate data back to noise, and with it the divergence of the velocity.

    log p(x) = log N(z; 0, 1) - integral of div v (instantaneous change of variables), the
    divergence estimated at every evaluation by e.J e with a fresh Rademacher e (Hutchinson;
    FFJORD, arXiv 1810.01367). Guidance does not apply: it has no density.

    Args:
      config: a fixed-grid ODE solver and its grid, walked backwards.
      probes: key to draw e from, or the ±1 probes of all evaluations in order.

    Returns:
      log p in nats per image, float32, and the noise z that the images came from.
    """
    tableau = ODE_SOLVERS[config.solver]
    slots = len(tableau.nodes)
    unguided = SamplerConfig(solver=config.solver, steps=config.steps, grid=config.grid)
    segments = plan_backwards(unguided, model, flow)

    def run(params, state, times, first, stages):
        def step(state, inputs):
            t0, t1, index = inputs

            def field(state, t, i):
                e = _probe(probes, index * slots + i, x.shape)
                ts = jnp.full(x.shape[:1], t)

                def velocity(x):
                    return velocity_from(flow, apply(params, x, ts, labels, stages[i]), x, ts)

                v, pullback = jax.vjp(velocity, state[0])
                return v, -jnp.sum(pullback(e)[0] * e, axis=(1, 2, 3))

            return rk_step(tableau, field, state, t0, t1), None

        indices = first + jnp.arange(times.shape[0] - 1)
        return jax.lax.scan(step, state, (times[:-1], times[1:], indices))[0]

    run = jax.jit(run, static_argnames="stages")
    state, first = (x, jnp.zeros(x.shape[:1])), 0
    for stages, times in segments:
        state = run(params, state, np.float32(times), first, stages=stages)
        first += len(times) - 1
    z, gained = state
    size = np.prod(x.shape[1:])
    prior = -0.5 * (size * np.log(2 * np.pi) + jnp.sum(jnp.square(z), axis=(1, 2, 3)))
    return prior - gained, z


def _probe(probes, count, shape):
    if jnp.issubdtype(probes.dtype, jax.dtypes.prng_key):
        return jax.random.rademacher(jax.random.fold_in(probes, count), shape, jnp.float32)
    return probes[count]


def plan_backwards(
    config: SamplerConfig, model: ModelConfig, flow: Flow
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """(stage of every evaluation, times) of the plan's steps from t = 1 down to 0."""
    if config.grid == "aligned":
        return [(s.stages, s.times[::-1]) for s in reversed(plan(config, model.pyramid, flow))]
    lo, hi = flow.sample_interval()
    times = (np.float32(1) - reference_grid(1 - hi, 1 - lo, config.steps)).tolist()
    nodes = ODE_SOLVERS[config.solver].nodes
    steps = []
    for a, b in zip(times, times[1:]):
        at = [np.float32(a) + np.float32(node) * np.float32(b - a) for node in nodes]
        steps.append((tuple(model.pyramid.stage_at(t) for t in at), (a, b)))
    return steps
