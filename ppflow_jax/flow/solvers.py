"""One step of every solver, on a field given per evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.flow.path import Flow, expand, score_coefficient, score_from, velocity_from

# (state, t scalar, index of the evaluation within the step) -> derivative of the state
Field = Callable[[Any, Float[Array, ""], int], Any]


@dataclass(frozen=True)
class Tableau:
    """Explicit Runge-Kutta method: evaluation times `nodes`, stage matrix, weights."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


ODE_SOLVERS = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun3": Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75)),
    # Kutta's 3/8 rule, which the PyTorch solvers call rk4
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}
# Stochastic solvers evaluate the drift where these methods do.
SDE_SOLVERS = {"sde-euler": ODE_SOLVERS["euler"], "sde-heun": ODE_SOLVERS["heun"]}

# A jump is Euler's step with the average velocity of its interval (MeanFlow, arXiv 2505.13447).
JUMPS = {"meanflow": ODE_SOLVERS["euler"]}

LAST_STEPS = ("none", "mean", "tweedie", "euler")

# Diffusion D(t) of the reverse SDE dx = (v + D s) dt + sqrt(2 D) dW (SiT, Sec. 2.4);
# each takes (path, t, norm).
DIFFUSIONS = {
    "constant": lambda path, t, norm: norm * jnp.ones_like(t),
    "sbdm": lambda path, t, norm: norm * score_coefficient(path, t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def rk_step(
    tableau: Tableau, field: Field, x: Any, t0: Float[Array, ""], t1: Float[Array, ""]
) -> Any:
    """One explicit Runge-Kutta step of any pytree from t0 to t1 (t1 < t0 goes backwards)."""
    dt = t1 - t0

    def advance(coefficients, slopes):
        used = [(a, k) for a, k in zip(coefficients, slopes) if a]
        return jax.tree.map(
            lambda leaf, *ks: leaf + dt * sum(a * k for (a, _), k in zip(used, ks)),
            x,
            *(k for _, k in used),
        )

    slopes = []
    for i, (node, row) in enumerate(zip(tableau.nodes, tableau.matrix)):
        at = advance(row, slopes) if row else x
        slopes.append(field(at, t0 + node * dt, i))
    return advance(tableau.weights, slopes)


class Sde(NamedTuple):
    """The reverse SDE: its flow, the form of the diffusion (one of `DIFFUSIONS`) and its factor."""

    flow: Flow
    diffusion: str
    norm: float

    def d(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Diffusion at time t."""
        return DIFFUSIONS[self.diffusion](self.flow.interpolant, t, self.norm)


def sde_step(
    solver: str,
    sde: Sde,
    field: Field,
    x: Float[Array, "b h w c"],
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    noise: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
    """One step of the reverse SDE; `field` gives the network's prediction, `noise` is N(0, 1).

    Euler-Maruyama, or Heun on the drift after the noise of the step was added (SiT, Sec. 2.4).
    """

    def drift(x, t, i):
        times = jnp.full(x.shape[:1], t)
        prediction = field(x, t, i)
        d = sde.d(times)
        velocity = velocity_from(sde.flow, prediction, x, times)
        return velocity + expand(d) * score_from(sde.flow, prediction, x, times)

    d0 = sde.d(jnp.full(x.shape[:1], t0))
    kick = expand(jnp.sqrt(2 * d0 * (t1 - t0))) * noise
    if solver == "sde-euler":
        return x + drift(x, t0, 0) * (t1 - t0) + kick
    return rk_step(SDE_SOLVERS[solver], drift, x + kick, t0, t1)


def sde_last_step(
    last_step: str,
    sde: Sde,
    prediction: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    t: Float[Array, ""],
    size: float,
) -> Float[Array, "b h w c"]:
    """Noise-free way from t over the last `size` of time (SiT, Appendix C)."""
    times, flow = jnp.full(x.shape[:1], t), sde.flow
    velocity = velocity_from(flow, prediction, x, times)
    score = score_from(flow, prediction, x, times)
    if last_step == "euler":
        return x + velocity * size
    if last_step == "mean":
        d = sde.d(times)
        return x + (velocity + expand(d) * score) * size
    alpha, sigma = flow.interpolant.alpha(times), flow.interpolant.sigma(times)
    return x / expand(alpha) + expand(sigma**2 / alpha) * score
