"""Accelerators in bfloat16, and with weights split over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.sharding import batch_sharding, layout, make_mesh, tree_shardings
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.routed import RoutedTables
from tests.systems.checks import random_params

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=2, width=16, depth=3, heads=4, num_classes=4)
NOISE = jax.random.normal(jax.random.key(3), (8, *MODEL.shape))
LABELS = jnp.arange(8) % 4
CONFIG = SamplerConfig("euler", 12, cfg=(1.0, 2.0))
MERGE = "merge.ratio=0.4,merge.deviation=0.2,merge.switch=0.3,merge.round_to=1"
SETTINGS = [
    "forecast.interval=3",
    "forecast.interval=3,forecast.place=blocks,forecast.blocks=1-2",
    "forecast.interval=3,forecast.place=velocity",
    f"{MERGE},forecast.interval=3/1",
    f"merge=tome,{MERGE},merge.proportional=true",
    "routed",
]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def sampler(text, apply):
    if text == "routed":
        masks = np.random.default_rng(0).random((12, 3, 2)) < 0.7
        masks[[0, 6]] = True
        segments = RoutedTables(3, masks).applied(plan(CONFIG, MODEL.pyramid, Flow()))
    else:
        segments = accelerated(CONFIG, MODEL, Flow(), AccelerateConfig.parse(text))
    assert any(s.method is not None for s in segments)
    return Sampler(apply, MODEL, Flow(), CONFIG, segments=segments)


@pytest.fixture(scope="module")
def expected(params):
    """Images of one device in float32."""
    return {t: np.asarray(sampler(t, make_apply(MODEL))(params, NOISE, LABELS)) for t in SETTINGS}


@pytest.mark.long
@pytest.mark.parametrize("text", SETTINGS)
def test_bfloat16_is_close_to_float32(text, params, expected):
    out = sampler(text, make_apply(MODEL, dtype=jnp.bfloat16))(params, NOISE, LABELS)
    assert out.dtype == jnp.float32 and np.isfinite(out).all()
    error = np.mean((out - expected[text]) ** 2) / np.mean(expected[text] ** 2)
    assert 1e-4 < np.sqrt(error) < 0.02


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "axes"),
    [(SETTINGS[0], dict(fsdp=2, tensor=2)), *((t, dict(data=1, fsdp=8)) for t in SETTINGS[1:])],
)
def test_split_weights_give_the_images_of_one_device(text, axes, params, expected):
    mesh = make_mesh(**axes)
    spread = jax.device_put(params, tree_shardings(params, mesh))
    batch = jax.device_put((NOISE, LABELS), batch_sharding(mesh))
    out = sampler(text, make_apply(MODEL, layout=layout(mesh)))(spread, *batch)
    assert out.sharding.is_equivalent_to(batch_sharding(mesh), out.ndim)
    np.testing.assert_allclose(out, expected[text], atol=1e-4)  # of values up to 9
