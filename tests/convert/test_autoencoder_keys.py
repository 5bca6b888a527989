"""Names and layouts: every naming read, strictness, and the way back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.convert.autoencoder_keys import (
    autoencoder_config,
    autoencoder_kind,
    autoencoder_params,
    autoencoder_state,
    dropped_keys,
    key_table,
)
from ppflow_jax.errors import InputError

REFERENCE = Path(__file__).parents[1] / "reference" / "vae"
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def state():
    return load_file(REFERENCE / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def config():
    return AutoencoderKLConfig.from_diffusers(json.loads((REFERENCE / "config.json").read_text()))


@pytest.fixture(scope="module")
def taesd():
    params = Autoencoder(TAESDConfig(width=8)).init(0)
    return autoencoder_state("taesd", params)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def legacy(state):
    def rename(key):
        for new, old in LEGACY.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return key

    return {rename(key): value for key, value in state.items()}


def test_round_trip_is_bitwise(state, config):
    params = autoencoder_params("vae", state, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    equal(autoencoder_state("vae", params), state)
    equal(autoencoder_state("vae", params, "legacy"), legacy(state))


@pytest.mark.parametrize("names", ["legacy", "compvis"])
def test_other_names_give_the_same_parameters(state, config, names):
    params = autoencoder_params("vae", state, config)
    other = autoencoder_state("vae", params, names)
    assert set(other) != set(state)
    equal(autoencoder_params("vae", other, config), params)


def test_legacy_attention_as_1x1_convolution(state, config):
    old = {
        key: value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value
        for key, value in legacy(state).items()
    }
    assert sum(value.ndim == 4 for value in old.values()) > sum(v.ndim == 4 for v in state.values())
    equal(autoencoder_params("vae", old, config), autoencoder_params("vae", state, config))


def test_compvis_names():
    """A hand-written sample of the names in a latent-diffusion checkpoint with four levels."""
    table = key_table("vae", Autoencoder(AutoencoderKLConfig()).abstract_params())
    names = {row["compvis"]: row["diffusers"] for row in table.values()}
    assert len(names) == len(table) == 248
    for compvis, diffusers in {
        "encoder.down.1.block.0.nin_shortcut.weight": (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
        ),
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.mid.block_2.norm1.weight": "encoder.mid_block.resnets.1.norm1.weight",
        "decoder.mid.attn_1.norm.bias": "decoder.mid_block.attentions.0.group_norm.bias",
        "decoder.mid.attn_1.q.weight": "decoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
        # numbered from fine to coarse in CompVis, in order of use in diffusers
        "decoder.up.3.block.2.conv2.weight": "decoder.up_blocks.0.resnets.2.conv2.weight",
        "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.up.0.block.0.nin_shortcut.bias": (
            "decoder.up_blocks.3.resnets.0.conv_shortcut.bias"
        ),
        "encoder.norm_out.weight": "encoder.conv_norm_out.weight",
        "quant_conv.weight": "quant_conv.weight",
    }.items():
        assert names[compvis] == diffusers


def test_training_losses_are_dropped_by_name(state, config):
    extra = state | {"loss.logvar": np.zeros(()), "model_ema.decay": np.zeros(())}
    equal(autoencoder_params("vae", extra, config), autoencoder_params("vae", state, config))
    assert dropped_keys(extra) == ["loss.logvar", "model_ema.decay"]


def test_config_is_inferred():
    config = AutoencoderKLConfig(block_out_channels=(32, 32, 64), layers_per_block=1)
    params = Autoencoder(config).init(0)
    for names in ("diffusers", "legacy", "compvis"):
        state = autoencoder_state("vae", params, names)
        assert autoencoder_kind(state) == "vae"
        assert autoencoder_config("vae", state) == config
        equal(autoencoder_params("vae", state), jax.tree.map(np.asarray, params))


def test_groups_that_cannot_be_inferred_are_asked_for(state):
    with pytest.raises(InputError, match="norm_num_groups"):
        autoencoder_config("vae", state)


def test_all_mismatches_are_reported_together(state, config):
    broken = dict(state)
    del broken["quant_conv.bias"]
    broken["encoder.conv_in.weight"] = broken["encoder.conv_in.weight"][:, :2]
    broken["decoder.conv_out.bias"] = np.full(3, np.nan, np.float32)
    broken["something.else"] = np.zeros(3)
    query = "decoder.mid_block.attentions.0.to_q.bias"
    broken[query.replace("to_q", "query")] = broken[query]
    with pytest.raises(InputError) as error:
        autoencoder_params("vae", broken, config)
    text = str(error.value)
    assert "5 mismatches" in text
    for line in (
        "quant_conv.bias: missing",
        "encoder.conv_in.weight: shape (16, 2, 3, 3), expected (16, 3, 3, 3)",
        "decoder.conv_out.bias: has values that are not finite",
        "something.else: not expected",
        f"{query}: given 2 times",
    ):
        assert line in text


def test_a_transposed_square_matrix_is_seen(state, config):
    """Layouts of square weights cannot be told by shape, so they are pinned by value."""
    params = autoencoder_params("vae", state, config)
    attention = params["decoder"]["mid"]["attention"]
    key = "decoder.mid_block.attentions.0.to_k.weight"
    np.testing.assert_array_equal(attention["key"]["kernel"], state[key].T)
    kernel = params["encoder"]["down_0"]["downsample"]["kernel"]
    weight = state["encoder.down_blocks.0.downsamplers.0.conv.weight"]
    assert kernel[0, 2, 3, 5] == weight[5, 3, 0, 2]


@pytest.mark.parametrize(
    "state",
    [{}, {"x": np.zeros(3)}, {"quant_conv.weight": np.zeros((8, 8, 1, 1))}],
    ids=["empty", "foreign", "almost nothing"],
)
def test_foreign_files_are_refused(state):
    with pytest.raises(InputError):
        autoencoder_params(autoencoder_kind(state), state)
    for kind in ("vae", "taesd"):
        with pytest.raises(InputError):
            autoencoder_params(kind, state)


def test_taesd_round_trip_whole_and_in_halves(taesd):
    assert autoencoder_kind(taesd) == "taesd"
    params = autoencoder_params("taesd", taesd)
    equal(autoencoder_state("taesd", params), taesd)
    together = {}
    for half in ("encoder", "decoder"):
        file = {k.split(".", 1)[1]: v for k, v in taesd.items() if k.startswith(half)}
        assert autoencoder_kind(file) == "taesd"
        part = autoencoder_params("taesd", file)
        assert list(part) == [half]
        together |= part
    equal(together, params)


def test_taesd_names(taesd):
    names = {key for key in taesd if key.startswith("decoder.")}
    convolutions = {int(k.split(".")[1]) for k in names if k.count(".") == 2}
    blocks = {int(k.split(".")[1]) for k in names if ".conv." in k}
    assert convolutions == {1, 7, 12, 17, 19}
    assert blocks == {3, 4, 5, 8, 9, 10, 13, 14, 15, 18}
    encoder = {int(k.split(".")[1]) for k in taesd if k.startswith("encoder.") and ".conv." in k}
    assert encoder == {1, 3, 4, 5, 7, 8, 9, 11, 12, 13}
    assert "encoder.2.bias" not in taesd and "encoder.0.bias" in taesd


def test_taesd_in_the_names_of_diffusers(taesd):
    params = autoencoder_params("taesd", taesd)
    state = autoencoder_state("taesd", params, "diffusers")
    assert {"encoder.layers.0.weight", "decoder.layers.0.weight"} <= set(state)
    equal(autoencoder_params("taesd", state), params)


def test_bfloat16_is_widened_exactly(taesd):
    rounded = {key: value.astype(ml_dtypes.bfloat16) for key, value in taesd.items()}
    state = autoencoder_state("taesd", autoencoder_params("taesd", rounded))
    assert all(state[key].dtype == np.float32 for key in rounded)
    assert all((state[key].astype(ml_dtypes.bfloat16) == rounded[key]).all() for key in rounded)


def test_taesd_mismatch_is_reported(taesd):
    with pytest.raises(InputError, match=r"encoder\.14\.bias: missing"):
        autoencoder_params("taesd", {k: v for k, v in taesd.items() if k != "encoder.14.bias"})
    with pytest.raises(InputError, match="unknown for taesd"):
        autoencoder_state("taesd", autoencoder_params("taesd", taesd), "compvis")
