"""One training step, a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppflow_jax.devices.programs import Programs
from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.devices.zero import Whole
from ppflow_jax.flow.terms import OWN, Metrics, Objective, Scheduled, network_leaves
from ppflow_jax.models.network import Apply
from ppflow_jax.train.ema import rate
from ppflow_jax.train.posthoc import updated
from ppflow_jax.train.skip import SKIPPED, unless_finite
from ppflow_jax.train.state import TrainState, whole


def make_train_step(
    objective: Objective,
    apply: Apply,
    tx: optax.GradientTransformation,
    *,
    ema: float,
    ema_warmup: bool = False,
    accumulate: int = 1,
    weights: Mapping[str, float] = {},
    gather: Whole | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, {"x", "label", fields}, key, frozen={}) -> (state, metrics)`.

    Randomness is `fold_in(key, state["step"])` over the whole batch, so accumulating over
    `accumulate` microbatches changes only the rounding. The EMA, of the network alone, has decay
    `ema`, with `ema_warmup` less at first (see `ema.rate`). Terms without one of the `weights` stay
    as they are, and so do the network's leaves in `frozen["base"]`. What a state keeps
    beside (`state.extended`) is updated too. With `gather` the weights are gathered once, for all
    microbatches; without it that is left to the network. Metrics, float32 scalars: those of the
    objective and `grad_norm`.
    """

    def gradient(params, frozen, batch, draws):
        def loss(params):
            return objective.loss(apply, whole(params, frozen), frozen, batch, draws, weights)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return (gather.back(grads) if gather else grads), metrics

    compute = _accumulated(gradient, accumulate, len(objective.pattern))

    def step(
        state: TrainState, batch: dict[str, Any], key: jax.Array, frozen: Mapping[str, Any] = {}
    ):
        draws = objective.draw(jax.random.fold_in(key, state["step"]), batch)
        if isinstance(objective, Scheduled):
            draws = objective.at(draws, state["step"])
        seen = {name: value for name, value in batch.items() if name != "label"}
        before = state["params"]
        used, still = before, frozen
        if gather:
            used, still = gather(before), {name: gather(tree) for name, tree in frozen.items()}
        grads, metrics = compute(used, still, seen, draws)
        updates, opt_state = tx.update(grads, state["opt_state"], before)
        params = optax.apply_updates(before, updates)
        average = rate(ema, ema_warmup, state["step"])
        idle = [name for name in before.get(OWN, {}) if not weights.get(name)]
        after = updated(state, params) | {
            "step": state["step"] + 1,
            "params": _keep(before, params, idle),
            "ema": optax.incremental_update(network_leaves(params), state["ema"], average),
            "opt_state": _keep(state["opt_state"], opt_state, idle),
        }
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        return unless_finite(state, after, metrics) if SKIPPED in state else (after, metrics)

    return step


def _accumulated(gradient: Callable[..., Any], accumulate: int, period: int) -> Callable[..., Any]:
    """`gradient` as the mean over microbatches, each of which has samples of all stages."""
    if accumulate == 1:
        return gradient

    def microbatches(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(-1, accumulate, period, *leaf.shape[1:])
        return rows.swapaxes(0, 1).reshape(accumulate, -1, *leaf.shape[1:])

    def accumulated(params, frozen, *examples):
        def body(total, micro):
            part = gradient(params, frozen, *micro)
            return jax.tree.map(lambda a, b: a + b / accumulate, total, part), None

        micro = jax.tree.map(microbatches, examples)
        shapes = jax.eval_shape(gradient, params, frozen, *jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, micro)[0]

    return accumulated


def _keep(old: Any, new: Any, idle: list[str]) -> Any:
    """`new`, but the leaves of idle terms, also of their moments, as they were."""
    if not idle:
        return new
    still = tuple(f"{OWN}/{name}/" for name in idle)

    def one(path, old, new):
        return old if any(s in f"{leaf_path(path)}/" for s in still) else new

    return jax.tree_util.tree_map_with_path(one, old, new)


def compiled(
    step: Callable[..., tuple[TrainState, Metrics]], programs: Programs, **shardings: Any
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step` under `jax.jit`, in place of the state it is given; `shardings` as there.

    `programs` are those of the step's network.
    """
    return jax.jit(step, donate_argnums=0, compiler_options=programs.step_options, **shardings)
