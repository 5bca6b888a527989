"""The training state: a plain dict tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppflow_jax.flow.terms import OWN, Objective, network_leaves
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, init_params

# {"step": int32, "params": ..., "ema": ..., "opt_state": ...}
TrainState = dict[str, Any]


def state_from(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """State of step 0; the EMA, which is of the network alone, starts as its parameters."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, network_leaves(params)),
        "opt_state": tx.init(params),
    }


def with_terms(params: Params, objective: Objective, model: ModelConfig, key: jax.Array) -> Params:
    """The parameters of a network, and fresh leaves of the objective's terms."""
    own = objective.init(model, jax.random.fold_in(key, 1))
    return params | {OWN: own} if own else params


def init_state(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    key: jax.Array,
    objective: Objective | None = None,
) -> TrainState:
    """Fresh state; without an objective it has no terms."""
    params = init_params(model, key)
    return state_from(with_terms(params, objective, model, key) if objective else params, tx)
