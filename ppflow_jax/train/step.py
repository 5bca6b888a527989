"""One training step, a pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppflow_jax.devices.programs import Programs
from ppflow_jax.flow.loss import Draws, Objective, draw, loss_fn
from ppflow_jax.models.network import Apply
from ppflow_jax.train.ema import rate
from ppflow_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    objective: Objective,
    apply: Apply,
    tx: optax.GradientTransformation,
    *,
    ema: float,
    ema_warmup: bool = False,
    accumulate: int = 1,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """`step(state, {"x", "label"}, key) -> (state, metrics)`.

    Randomness is `fold_in(key, state["step"])` over the whole batch, so accumulating over
    `accumulate` microbatches changes only the rounding. The EMA's decay is `ema`, with
    `ema_warmup` less in the first steps (see `ema.rate`). Metrics, float32 scalars: those of
    `loss_fn` and `grad_norm`.
    """

    def gradient(params, x, draws):
        def loss(params):
            return loss_fn(objective, apply, params, x, draws)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics

    def microbatches(leaf: jax.Array) -> jax.Array:
        period = len(objective.pattern)
        rows = leaf.reshape(-1, accumulate, period, *leaf.shape[1:])
        return rows.swapaxes(0, 1).reshape(accumulate, -1, *leaf.shape[1:])

    def accumulated(params, x, draws: Draws):
        def body(total, micro):
            part = gradient(params, *micro)
            return jax.tree.map(lambda a, b: a + b / accumulate, total, part), None

        micro = jax.tree.map(microbatches, (x, draws))
        shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda leaf: leaf[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, micro)[0]

    def step(state: TrainState, batch: dict[str, Any], key: jax.Array):
        draws = draw(objective, jax.random.fold_in(key, state["step"]), batch["x"], batch["label"])
        compute = gradient if accumulate == 1 else accumulated
        grads, metrics = compute(state["params"], batch["x"], draws)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = rate(ema, ema_warmup, state["step"])
        return {
            "step": state["step"] + 1,
            "params": params,
            "ema": optax.incremental_update(params, state["ema"], average),
            "opt_state": opt_state,
        }, metrics | {"grad_norm": optax.tree.norm(grads)}

    return step


def compiled(
    step: Callable[..., tuple[TrainState, Metrics]], programs: Programs, **shardings: Any
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step` under `jax.jit`, in place of the state it is given; `shardings` as there.

    `programs` are those of the step's network.
    """
    return jax.jit(step, donate_argnums=0, compiler_options=programs.step_options, **shardings)
