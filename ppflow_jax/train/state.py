"""The training state: a plain dict tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ppflow_jax.checkpoints.card import ALL
from ppflow_jax.flow.terms import OWN, Objective, network_leaves
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, init_params
from ppflow_jax.models.trees import join, split
from ppflow_jax.train.posthoc import POSTHOC, begin
from ppflow_jax.train.skip import SKIPPED, no_counts

# {"step": int32, "params": ..., "ema": ..., "opt_state": ...}, all but the step of what is trained;
# see `extended` for more
TrainState = dict[str, Any]


def whole(params: Params, frozen: Mapping[str, Any]) -> Params:
    """Trained leaves, and those of the network that are not trained, in `frozen["base"]`."""
    return join(params, frozen.get("base", {}))


def state_from(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """State of step 0; the EMA, which is of the network alone, starts as its parameters."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, network_leaves(params)),
        "opt_state": tx.init(params),
    }


def extended(state: TrainState, train: ConfigDict) -> TrainState:
    """What `config.train` has a state of step 0 keep beside.

    The counts of skipped steps, see skip.py, and averages, see posthoc.py.
    """
    more = {SKIPPED: no_counts()} if train.skip_nonfinite else {}
    averages = begin(state["params"], train.posthoc_ema)
    return state | more | ({POSTHOC: averages} if averages else {})


def with_terms(params: Params, objective: Objective, model: ModelConfig, key: jax.Array) -> Params:
    """The parameters of a network, and fresh leaves of the objective's terms."""
    own = objective.init(model, jax.random.fold_in(key, 1))
    return params | {OWN: own} if own else params


def init_state(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    key: jax.Array,
    objective: Objective | None = None,
    trainable: tuple[str, ...] = ALL,
) -> TrainState:
    """Fresh state of what is trained; without an objective it has no terms."""
    params, _ = split(init_params(model, key), trainable)
    return state_from(with_terms(params, objective, model, key) if objective else params, tx)
