"""A one-stage model as the start of a pyramid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import einops
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ppflow_jax.convert.keys import to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.patch import patchify, unpatchify
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid
from ppflow_jax.systems.expand import expand

REFERENCE = Path(__file__).parents[1] / "reference"
CONFIG = ModelConfig(SIT, latent_size=24, channels=4, width=64, depth=2, heads=4, num_classes=10)


@pytest.fixture(scope="module")
def sit():
    state = load_file(REFERENCE / "sit" / "model.safetensors")
    return {k: v for k, v in state.items() if k != "pos_embed"}


@pytest.mark.parametrize("levels,pyramid", [(2, PPFLOW2), (3, PPFLOW3)])
def test_bitwise_what_the_public_trainer_makes_of_sit(sit, levels, pyramid):
    config, params = expand(CONFIG, from_torch(CONFIG, sit), pyramid)
    ours = to_torch(config, params)
    assert ours.pop("level_embedder.embedding_table.weight").shape == (levels, 64)
    new = load_file(REFERENCE / "convert" / "sit_init.safetensors")
    prefix = f"l{levels}."
    expected = sit | {k.removeprefix(prefix): v for k, v in new.items() if k.startswith(prefix)}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    "text",
    [
        "4x4@0.5,4x2@0.75,2x2@1",
        "2x4@0.5,2x2@1",
        "12x12@0.2,6x6@0.4,4x6@0.6,2x2@1",
        "8x4@0.5,4x4@1",  # no stage has the patch of the source
        "4x4@1",
    ],
)
def test_coarse_stages_see_the_pooled_latent_and_give_the_upsampled_output(sit, text):
    params = from_torch(CONFIG, sit)
    config, expanded = expand(CONFIG, params, Pyramid.parse(text))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 24, 24, 4), np.float32)
    into, out = params["patchify"][0], params["unpatchify"][0]
    for k, stage in enumerate(config.pyramid.stages):
        rows, cols = config.pyramid.grid(k, 24)
        i, j = stage.patch[0] // 2, stage.patch[1] // 2
        pooled = einops.reduce(x, "b (h i) (w j) c -> b h w c", "mean", i=i, j=j)
        theirs = patchify(jnp.asarray(pooled), (2, 2)) @ into["kernel"] + into["bias"][None, None]
        mine = expanded["patchify"][k]
        ours = patchify(jnp.asarray(x), stage.patch) @ mine["kernel"] + mine["bias"][None, None]
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        hidden = jnp.asarray(rng.standard_normal((3, rows * cols, 64), np.float32))
        coarse = unpatchify(hidden @ out["kernel"] + out["bias"][None, None], (rows, cols), (2, 2))
        theirs = einops.repeat(coarse, "b h w c -> b (h i) (w j) c", i=i, j=j)
        mine = expanded["unpatchify"][k]
        ours = unpatchify(
            hidden @ mine["kernel"] + mine["bias"][None, None], (rows, cols), stage.patch
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_level_table_is_small_noise_of_the_seed(sit):
    params = from_torch(CONFIG, sit)
    pyramid = Pyramid.parse("24x24@0.2,12x12@0.4,8x8@0.6,6x6@0.7,4x4@0.8,4x2@0.9,2x2@1")
    tables = [expand(CONFIG, params, pyramid, s)[1]["level"]["embedding"] for s in (0, 0, 1)]
    assert np.array_equal(tables[0], tables[1]) and not np.array_equal(tables[0], tables[2])
    assert tables[0].dtype == np.float32
    assert np.std(tables[0]) == pytest.approx(0.02, rel=0.1) and abs(np.mean(tables[0])) < 0.003
    assert "level" not in expand(CONFIG, params, Pyramid.parse("4x4@1"))[1]


def test_the_trunk_is_shared_and_dtypes_stay(sit):
    half = from_torch(CONFIG, {k: v.astype(ml_dtypes.bfloat16) for k, v in sit.items()})
    _, expanded = expand(CONFIG, half, PPFLOW2)
    assert expanded["blocks"] is half["blocks"]
    for part in (expanded["patchify"][0], expanded["unpatchify"][0]):
        assert part["kernel"].dtype == part["bias"].dtype == ml_dtypes.bfloat16
    assert expanded["level"]["embedding"].dtype == ml_dtypes.bfloat16


def test_what_cannot_be_expanded(sit):
    params = from_torch(CONFIG, sit)
    with pytest.raises(InputError, match="no multiple of the 2x2 patch"):
        expand(CONFIG, params, Pyramid.parse("3x3@0.5,2x2@1"))
    with pytest.raises(InputError, match="not divisible by the 16x16 patch"):
        expand(CONFIG, params, Pyramid.parse("16x16@0.5,2x2@1"))
    with pytest.raises(InputError, match="only a model of one stage"):
        expand(replace(CONFIG, pyramid=PPFLOW2), params, PPFLOW3)
