"""Rows and step lengths fitted to fine trajectories.

First row by row, in closed form: ridge least squares around Adams-Bashforth, on the states that the
rows before lead to. Then all rows and lengths at once, by gradients through the sampler
(NeuralSolver, arXiv 2505.21114, fits rows this way, beginning with Euler's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.console import progress
from ppflow_jax.devices.programs import for_passes
from ppflow_jax.devices.sharding import local_mesh, replicated
from ppflow_jax.errors import RunError
from ppflow_jax.flow.evaluate import Evaluator
from ppflow_jax.flow.fitted import Fitted, changes_in
from ppflow_jax.flow.guidance import Cfg
from ppflow_jax.flow.multistep import Past, Rows, Rule, adams_bashforth, multistep
from ppflow_jax.flow.plan import FITTED, SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.tables import Facts, Networks, runs_of
from ppflow_jax.models.network import make_apply
from ppflow_jax.tune.calibrate import Trajectories

HISTORY = 4
RIDGES = (1e-4, 1e-6, 0.0)  # as a share of the mean square of a velocity
BATCH, RATE = 16, 0.01  # of the gradient refinement
_TURN = 1e-2  # where the loss of the end state turns from squares to distances
_WAY = 0.1  # weight of the states on the way against the end


class Field:
    """The guided velocity of a model, compiled once for every stage."""

    def __init__(self, model: Model, cfg_channels: int = 0):
        self.model, self.channels = model, cfg_channels
        self.guidance = Cfg(model.config.null_label, cfg_channels)
        self._compiled = jax.jit(self._velocity, static_argnames=("stage", "guided"))

    def at(
        self,
        x: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"],
        t: float,
        y: Int[np.ndarray, " n"],
        stage: int,
        scale: float,
    ) -> Float[np.ndarray, "n h w c"]:
        """Velocities of many states, some at a time."""
        call = partial(self._compiled, self.model.params, stage=stage, guided=scale != 1)
        size, out = min(64, len(x)), []
        for first in range(0, len(x), size):
            now = slice(first, first + size)
            out.append(call(jnp.asarray(x[now]), np.float32(t), y[now], np.float32(scale)))
        return np.concatenate([np.asarray(v) for v in out])

    @property
    def precision(self) -> str:
        """Of matrix products."""
        return "highest" if self.model.dtype == "float32" else "default"

    def _velocity(self, params, x, t, y, scale, *, stage, guided):
        model, facts = self.model, Facts("ode", (stage,), (guided,))
        with jax.default_matmul_precision(self.precision):
            given = self.guidance, Networks(params, None, y), facts
            of = Evaluator(model.network, None, model.card.flow, *given)
            return of.step(scale[None], ({},)).velocity(x, t, 0)


def end_states(field: Field, plan: Fitted, given: Trajectories) -> Float[np.ndarray, "n h w c"]:
    """Where a plan leads from the noises of trajectories."""
    x = jnp.asarray(given.states[0])
    past = Past.empty(x, plan.rows.rule)
    weights, corrector = plan.rows.tables
    for i, (t, stage, scale) in enumerate(zip(plan.times, plan.stages, plan.scales)):
        rows = weights[i], None if corrector is None else corrector[i]

        def velocity(x, t, _, stage=stage, scale=scale):
            return jnp.asarray(field.at(x, float(t), given.labels, stage, scale))

        flow = field.model.card.flow
        x, past = multistep(plan.rows.rule, flow, velocity, x, jnp.float32(t), rows, past)
    return np.asarray(x)


def error(field: Field, plan: Fitted, given: Trajectories) -> float:
    """Distance of the end states from the fine ones, as a share of these (root mean squares)."""
    return distance(end_states(field, plan, given), given)


def distance(ends: Float[np.ndarray, "n h w c"], given: Trajectories) -> float:
    """The same of given end states."""
    exact = given.states[-1]
    return float(np.sqrt(np.mean(np.square(ends - exact)) / np.mean(np.square(exact))))


def closed_form(
    field: Field, plan: Fitted, given: Trajectories
) -> tuple[Fitted, Float[np.ndarray, "n h w c"]]:
    """`plan` with every row fitted in turn to the state after its step, and where that leads.

    Ridge least squares around AB2; the ridge is the one of `RIDGES` that predicts one half of the
    trajectories best from the other.
    """
    times, changes = np.float64(plan.times), changes_in(plan.stages, plan.scales)
    x, targets = np.float64(given.states[0]), given.at(times)
    prior = adams_bashforth(2, times, changes).weights
    weights = np.zeros((len(plan.stages), HISTORY + 1))
    weights[:, 0] = 1
    history: list[np.ndarray] = []
    for i, (stage, scale) in enumerate(zip(plan.stages, plan.scales)):
        value = field.at(x.astype(targets.dtype), plan.times[i], given.labels, stage, scale)
        history = [np.float64(value), *history[: HISTORY - 1]]
        around = np.pad(prior[i, 1:], (0, HISTORY))[: len(history)]
        # axis 0: trajectories
        columns = np.stack([v.reshape(len(x), -1) for v in history], axis=-1)
        rest = (np.float64(targets[i + 1]) - x).reshape(len(x), -1) - columns @ around
        row = around + ridge(columns, rest)
        weights[i, 1 : len(row) + 1] = row
        x = x + (columns @ row).reshape(x.shape)
    return replace(plan, rows=Rows(Rule("velocity", HISTORY), weights)), x


def ridge(columns: Float[np.ndarray, "n d k"], wanted: Float[np.ndarray, "n d"]) -> np.ndarray:
    """Coefficients of least squares under the ridge that predicts one half best from the other."""

    def solved(rows: slice, share: float) -> np.ndarray:
        a, b = columns[rows].reshape(-1, columns.shape[-1]), wanted[rows].ravel()
        size = np.sqrt(share * np.mean(np.sum(a**2, axis=0)))
        k = columns.shape[-1]
        a, b = np.concatenate([a, size * np.eye(k)]), np.concatenate([b, np.zeros(k)])
        return np.linalg.lstsq(a, b, rcond=None)[0]

    def left(share: float) -> float:
        row = solved(slice(0, None, 2), share)
        return float(np.mean(np.square(wanted[1::2] - columns[1::2] @ row)))

    return solved(slice(None), min(RIDGES, key=left))


def refined(
    field: Field, plan: Fitted, given: Trajectories, rounds: int, scales: bool = False
) -> Fitted:
    """All rows and step lengths at once, by Adam on the end state and the states on the way.

    Lengths change within their stage, whose boundaries stay.

    Args:
      scales: fit the guidance scale of every guided step too.

    Raises:
      RunError: a loss that is not finite.
    """
    lengths = np.diff(np.float64(plan.times))
    theta = {
        "rows": jnp.float32(plan.rows.weights[:, 1:] / lengths[:, None]),
        "lengths": jnp.float32(np.log(lengths)),
    }
    if scales:
        theta["scales"] = jnp.zeros(len(lengths), jnp.float32)
    theta = jax.device_put(theta, replicated(local_mesh()))  # as the parameters: one program
    run = _Run(field, plan)
    loss = jax.jit(jax.value_and_grad(partial(_loss, run)))
    tx = optax.adam(optax.cosine_decay_schedule(RATE, rounds))
    state, params = tx.init(theta), field.model.params
    with progress(rounds, 0, "it", "fit") as bar:
        for batch in _batches(len(given.labels), rounds):
            part = np.float32(given.times), given.states[:, batch], given.labels[batch]
            with jax.default_matmul_precision(field.precision):
                value, gradient = loss(theta, params, *map(jnp.asarray, part))
            if not np.isfinite(value):
                raise RunError("the loss of the fit is not finite: give more --noises")
            changes, state = tx.update(gradient, state)
            theta = optax.apply_updates(theta, changes)
            bar.update(1)
    times, weights, guidance = jax.device_get(run.tables(theta))
    weights = np.concatenate([np.ones((len(weights), 1)), weights], axis=1)
    rows = Rows(plan.rows.rule, np.float64(weights))
    numbers = {"times": times, "scales": guidance}
    return replace(
        plan, rows=rows, **{k: tuple(np.float32(v).tolist()) for k, v in numbers.items()}
    )


class _Run:
    """The sampler of a plan, as a function of its rows and lengths."""

    def __init__(self, field: Field, plan: Fitted):
        model = field.model
        dtype = jnp.dtype(model.dtype)
        # Blocks in a scan: compiling, of a program that runs for seconds, is most of the fit.
        programs = for_passes(dtype=dtype, head=model.config.head_width)
        apply = make_apply(model.config, dtype=dtype, remat="full", programs=programs)
        config = SamplerConfig(FITTED, len(plan.stages), cfg_channels=field.channels)
        settings = model.config, model.card.flow, config
        self.sampler = Sampler(apply, *settings, segments=plan.segments)
        self.ends = np.float32([plan.times[0], *self._boundaries(plan)])
        self.scales = np.float32(plan.scales)
        self.group = np.cumsum([0, *(a != b for a, b in zip(plan.stages, plan.stages[1:]))])

    @staticmethod
    def _boundaries(plan: Fitted) -> Iterator[float]:
        for i, stage in enumerate(plan.stages):
            if i + 1 == len(plan.stages) or plan.stages[i + 1] != stage:
                yield plan.times[i + 1]

    def tables(
        self, theta: Any
    ) -> tuple[
        Float[Array, " points"], Float[Array, "steps history"], Float[np.ndarray | Array, " steps"]
    ]:
        """Times, weights of velocities, and guidance scales: 1 stays 1."""
        times = [self.ends[:1]]
        for k, (start, end) in enumerate(zip(self.ends, self.ends[1:])):
            shares = jnp.cumsum(jax.nn.softmax(theta["lengths"][self.group == k]))
            times += [start + (end - start) * shares[:-1], np.float32([end])]
        points = jnp.concatenate(times)
        scales = self.scales
        if "scales" in theta:
            scales = 1 + (scales - 1) * jnp.exp(theta["scales"])
        return points, theta["rows"] * jnp.diff(points)[:, None], scales

    def __call__(
        self, theta: Any, params: Any, x: Float[Array, "n h w c"], y: Int[Array, " n"]
    ) -> tuple[Float[Array, " points"], Float[Array, "steps n h w c"]]:
        """Times, and the states at them after the first."""
        times, weights, scales = self.tables(theta)
        weights = jnp.concatenate([jnp.ones((len(weights), 1)), weights], axis=1)
        state, states, first = self.sampler.start(x), [], 0
        for run in runs_of(self.sampler.segments):
            tables, facts = self.sampler.program(run, True)
            last = first + len(tables.scales)
            rows = weights[first:last], None
            given = times[first : last + 1], scales[first:last, None]
            tables = tables._replace(times=given[0], scales=given[1], rows=rows)
            nets = Networks(params, None, y)
            state, passed = self.sampler.run(state, nets, tables, facts, None, first, None)
            states.append(passed)
            first = last
        return times, jnp.concatenate(states)


def _loss(run: _Run, theta: Any, params: Any, at: Any, states: Any, y: Any) -> Float[Array, ""]:
    times, passed = run(theta, params, states[0], y)
    place = jnp.clip(jnp.searchsorted(at, times[1:], side="right") - 1, 0, len(at) - 2)
    share = ((times[1:] - at[place]) / (at[place + 1] - at[place]))[:, None, None, None, None]
    wanted = states[place] * (1 - share) + states[place + 1] * share
    end = jnp.mean(optax.huber_loss(passed[-1], states[-1], delta=_TURN)) / _TURN
    return end + _WAY * jnp.mean(jnp.square(passed - wanted)) / _TURN


def _batches(count: int, rounds: int) -> Iterator[Int[np.ndarray, " b"]]:
    draw = np.random.default_rng(0)
    size = min(BATCH, count)
    order = np.concatenate([draw.permutation(count) for _ in range(-(-rounds * size // count))])
    for k in range(rounds):
        yield order[k * size : (k + 1) * size]
