"""The training state: a plain dict tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, init_params

# {"step": int32, "params": ..., "ema": ..., "opt_state": ...}
TrainState = dict[str, Any]


def state_from(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """State of step 0; the EMA starts as the parameters."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": tx.init(params),
    }


def init_state(model: ModelConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Fresh state."""
    return state_from(init_params(model, key), tx)
