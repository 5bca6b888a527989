"""Multistep solvers as tables: every step a row of weights over values evaluated before.

    x[i+1] = keep[i] x[i] + sum_j w[i, j] u[i-j],    one evaluation a step,

u the velocity, or the clean image expected from x (`data`). Rows are made for the times of a plan,
in float64: grids may be uneven, and what a rule knows of earlier steps may cross stages, since
velocities have the shape of the latent at every patch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.flow.path import Flow, clean_from

BASES = ("velocity", "data")


class Rule(NamedTuple):
    """What the program of a step is compiled for.

    Attributes:
      basis: what u is, one of `BASES`.
      history: values of u that a row weighs.
      corrects: whether the state is made anew with the value at its own time (UniPC).
    """

    basis: str
    history: int
    corrects: bool = False


@dataclass(frozen=True)
class Rows:
    """A rule on the steps of a plan.

    Attributes:
      weights: of x[i], then of u[i], u[i-1], ...
      corrector: of x[i], x[i-1], u[i], u[i-1], ... in the corrected x[i]; None: no corrections.
    """

    rule: Rule
    weights: Float[np.ndarray, "steps columns"]
    corrector: Float[np.ndarray, "steps columns2"] | None = None

    @property
    def tables(self) -> tuple:
        """float32 arrays with a leading axis of steps."""
        return tuple(None if a is None else np.float32(a) for a in (self.weights, self.corrector))

    def part(self, first: int, last: int) -> Rows:
        """The rows of the steps from `first` to `last`, exclusive."""
        corrector = None if self.corrector is None else self.corrector[first:last]
        return Rows(self.rule, self.weights[first:last], corrector)


class Past(NamedTuple):
    """What a rule remembers: u at earlier steps, the newest first, and the state before."""

    values: tuple[Float[Array, "b h w c"], ...]
    previous: Float[Array, "b h w c"] | None

    @classmethod
    def empty(cls, x: Float[Array, "b h w c"], rule: Rule) -> Past:
        """Before the first step, whose weights of it are 0."""
        zeros = jnp.zeros_like(x)
        return cls((zeros,) * (rule.history - 1), zeros if rule.corrects else None)


def multistep(
    rule: Rule,
    flow: Flow,
    velocity: Callable[[Array, Array, int], Array],
    x: Float[Array, "b h w c"],
    t: Float[Array, ""],
    rows: tuple,
    past: Past,
) -> tuple[Float[Array, "b h w c"], Past]:
    """The state after a step from x at time t, and what is remembered."""
    weights, corrector = rows
    value = velocity(x, t, 0)
    if rule.basis == "data":
        value = clean_from(flow, value, x, jnp.full(x.shape[:1], t))
    values, previous = (value, *past.values), past.previous
    if rule.corrects:
        x = _weighted(corrector, (x, previous, *values))
        previous = x
    return _weighted(weights, (x, *values)), Past(values[: rule.history - 1], previous)


def _weighted(weights: Float[Array | np.ndarray, " n"], values: tuple[Array, ...]) -> Array:
    """In this order, so that a row of Euler's method has the bits of its step."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        total = total + weight * value
    return total


def adams_bashforth(
    order: int, times: Float[np.ndarray, " points"], restarts: tuple[int, ...] = ()
) -> Rows:
    """The integral of the polynomial through the last `order` velocities.

    Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.1 and III.5. Steps
    that have fewer before them use the lower orders.

    Args:
      restarts: steps that look at none before them.
    """
    times = np.float64(times)
    weights = np.zeros((len(times) - 1, order + 1))
    for i, count in enumerate(_known(order, len(weights), restarts)):
        h = times[i + 1] - times[i]
        nodes = (times[i - np.arange(count)] - times[i]) / h
        moments = np.vander(nodes, count, increasing=True).T
        weights[i, 1 : count + 1] = h * np.linalg.solve(moments, 1 / np.arange(1, count + 1))
    weights[:, 0] = 1
    return Rows(Rule("velocity", order), weights)


def dpm_solver(
    flow: Flow, times: Float[np.ndarray, " points"], restarts: tuple[int, ...] = ()
) -> Rows:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) in flow time.

    With l = log(alpha / sigma) and h its change over a step, x[i+1] = sigma[i+1] / sigma[i] x[i] +
    alpha[i+1] (1 - e^-h) D, D extrapolated from the last two clean images by half a step. The first
    order is taken where h is infinite: next to pure noise, and to data.
    """
    alpha, sigma, log_snr = _signal(flow, times)
    weights = np.zeros((len(alpha) - 1, 3))
    for i, count in enumerate(_known(2, len(weights), restarts)):
        weights[i, 0] = sigma[i + 1] / sigma[i]
        ahead = 0.0
        if count == 2 and np.isfinite(log_snr[i - 1 : i + 2]).all():
            h, before = np.diff(log_snr[i - 1 : i + 2])[::-1]
            ahead = h / (2 * before)
        total = alpha[i + 1] - weights[i, 0] * alpha[i]  # alpha[i+1] (1 - e^-h)
        weights[i, 1:] = total * np.array([1 + ahead, -ahead])
    return Rows(Rule("data", 2), weights)


def unipc(flow: Flow, times: Float[np.ndarray, " points"], restarts: tuple[int, ...] = ()) -> Rows:
    """UniPC-2 for clean images with B2(h) = e^h - 1 (arXiv 2302.04867, Algorithms 1 and 2).

    Its predictor is that of DPM-Solver++(2M). The corrector makes x[i] anew with the value that was
    evaluated there, so that it costs nothing: the integral of the parabola in l through the clean
    images at i, i-1 and i-2, or half the sum of two where l is infinite.
    """
    alpha, sigma, log_snr = _signal(flow, times)
    predictor = dpm_solver(flow, times, restarts).weights
    corrector = np.zeros((len(predictor), 5))
    for i, count in enumerate(_known(3, len(predictor), restarts)):
        if count == 1:
            corrector[i, 0] = 1
            continue
        keep = sigma[i] / sigma[i - 1]
        corrector[i, 1] = keep
        if count == 3 and np.isfinite(log_snr[i - 2 : i + 1]).all():
            nodes = log_snr[[i, i - 1, i - 2]]
            corrector[i, 2:] = sigma[i] * _exponential(nodes, log_snr[i - 1], log_snr[i])
        else:
            corrector[i, 2:4] = (alpha[i] - keep * alpha[i - 1]) / 2
    return Rows(Rule("data", 3, True), np.pad(predictor, ((0, 0), (0, 1))), corrector)


# name -> (flow, times, restarts) -> rows
MULTISTEP: dict[str, Callable[..., Rows]] = {
    "ab2": lambda flow, times, restarts=(): adams_bashforth(2, times, restarts),
    "ab3": lambda flow, times, restarts=(): adams_bashforth(3, times, restarts),
    "ab4": lambda flow, times, restarts=(): adams_bashforth(4, times, restarts),
    "dpm++2m": dpm_solver,
    "unipc2": unipc,
}


def _known(most: int, steps: int, restarts: tuple[int, ...]) -> list[int]:
    """How many values each step may look at, its own included."""
    known: list[int] = []
    for i in range(steps):
        known.append(min(most, known[-1] + 1) if known and i not in restarts else 1)
    return known


def _signal(flow: Flow, times: Float[np.ndarray, " points"]) -> tuple[np.ndarray, ...]:
    """alpha, sigma and log(alpha / sigma), float64."""
    path = flow.interpolant
    alpha, sigma = (np.float64(f(np.float64(times))) for f in (path.alpha, path.sigma))
    with np.errstate(divide="ignore"):
        return alpha, sigma, np.log(alpha) - np.log(sigma)


def _exponential(nodes: Float[np.ndarray, " n"], start: float, end: float) -> np.ndarray:
    """Weights of values at `nodes` in the integral of e^l times their polynomial."""
    points, weights = np.polynomial.legendre.leggauss(32)
    at = start + (end - start) * (points + 1) / 2
    basis = [
        np.prod([(at - b) / (a - b) for k, b in enumerate(nodes) if k != j], axis=0)
        for j, a in enumerate(nodes)
    ]
    return np.stack(basis) @ (weights * np.exp(at)) * (end - start) / 2
