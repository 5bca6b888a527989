"""The training step: what it is compiled to."""

import re

import jax
import jax.numpy as jnp

from ppflow_jax.devices.programs import Programs
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import SIT
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import compiled, make_train_step


def _most_operands(depth: int) -> int:
    """Of a loop over tokens in the training step as compiled on CPU, blocks one by one."""
    model = ModelConfig(SIT, 16, 4, 64, depth, 2, num_classes=3)
    tx = make_optimizer(OptimConfig(), 1)
    programs = Programs("deferred", rows=True, unrolled=True)
    apply = make_apply(model, programs=programs)
    step = make_train_step(FlowObjective(SIT, Flow(), model.null_label), apply, tx, ema=0.9)
    state = jax.eval_shape(lambda key: init_state(model, tx, key), jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *model.shape), jnp.float32)
    batch = {"x": x, "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
    text = compiled(step, programs).lower(state, batch, jax.random.key(0)).compile().as_text()
    loops = re.findall(r"= f32\[2,64,64\]\S* fusion\((.*?)\), kind=kLoop", text)
    return max(len(re.findall("%", operands)) for operands in loops)


def test_no_block_sums_up_the_gradients_of_all_blocks_after_it():
    assert _most_operands(depth=4) == _most_operands(depth=2)
