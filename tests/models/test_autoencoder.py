"""Both autoencoders: parity with diffusers, counts, the shared interface, chunking, rounding.

`tests/reference/vae` holds a small random AutoencoderKL of diffusers 0.42.1 (float32, CPU) with
its inputs and outputs. The trained TAESD weights are not part of the project.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from safetensors.numpy import load_file

from ppflow_jax.autoencoders import autoencoder as module
from ppflow_jax.autoencoders.autoencoder import Autoencoder, decode_chunked, encode_chunked
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig, Level
from ppflow_jax.autoencoders.taesd import TAESDConfig, TinyStage
from ppflow_jax.convert.autoencoder_keys import autoencoder_config, autoencoder_params
from ppflow_jax.data.transforms import to_uint8
from ppflow_jax.errors import InputError

REFERENCE = Path(__file__).parents[1] / "reference" / "vae"
SMALL = AutoencoderKLConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
TINY = TAESDConfig(width=8)


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def relative(ours, reference) -> float:
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


@pytest.fixture(scope="module")
def reference():
    state = load_file(REFERENCE / "diffusion_pytorch_model.safetensors")
    config = autoencoder_config("vae", state, json.loads((REFERENCE / "config.json").read_text()))
    return Autoencoder(config), autoencoder_params("vae", state, config), state


@pytest.fixture(scope="module")
def arrays():
    with np.load(REFERENCE / "vae.npz") as file:
        return {k: file[k] if k == "uint8" else nhwc(file[k]) for k in file}


@pytest.fixture(scope="module", params=[SMALL, TINY], ids=["kl", "taesd"])
def small(request):
    autoencoder = Autoencoder(request.param)
    return autoencoder, autoencoder.init(0)


def test_encoder_agrees_with_diffusers(reference, arrays):
    autoencoder, params, _ = reference
    with jax.default_matmul_precision("highest"):
        mean, std = autoencoder.encode(params, arrays["image"])
    scale = autoencoder.config.scaling_factor
    assert scale == 0.18215
    assert relative(mean, arrays["mean"] * scale) < 1e-5
    assert relative(std, arrays["std"] * scale) < 1e-5
    assert relative(mean + std * arrays["noise"], arrays["latent_scaled"]) < 1e-5


@pytest.mark.parametrize(
    ("latent", "image"), [("z", "decoded"), ("latent_scaled", "reconstructed")]
)
def test_decoder_agrees_with_diffusers(reference, arrays, latent, image):
    autoencoder, params, _ = reference
    scale = autoencoder.config.scaling_factor if latent == "z" else 1.0
    with jax.default_matmul_precision("highest"):
        decoded = autoencoder.decode(params, arrays[latent] * scale)
    expected = np.clip(arrays[image], -1, 1)
    assert (np.abs(arrays[image]) < 1).mean() > 0.3  # the clamp must not hide the comparison
    assert relative(decoded, expected) < 1e-5
    if latent == "z":
        difference = np.asarray(to_uint8(decoded), np.int32) - arrays["uint8"]
        assert np.abs(difference).max() <= 1


def test_log_variance_is_clipped(small):
    autoencoder, params = small
    if autoencoder.config is TINY:
        pytest.skip("TAESD has no variance")
    bias = jnp.asarray([0.0] * 4 + [-1e3, 1e3, 0.0, 0.0])
    quant = {"kernel": params["encoder"]["quant_conv"]["kernel"] * 0, "bias": bias}
    encoder = params["encoder"] | {"quant_conv": quant}
    _, std = autoencoder.encode({"encoder": encoder}, jnp.zeros((1, 4, 4, 3)))
    expected = 0.18215 * np.exp([-15.0, 10.0, 0.0, 0.0])
    np.testing.assert_allclose(std[0, 0, 0], expected, rtol=1e-5)


def test_parameter_counts_of_the_published_autoencoders():
    sd = Autoencoder(AutoencoderKLConfig()).abstract_params()
    assert (count(sd["encoder"]), count(sd["decoder"])) == (34_163_664, 49_490_199)
    assert count(sd) == 83_653_863
    taesd = Autoencoder(TAESDConfig()).abstract_params()
    assert (count(taesd["encoder"]), count(taesd["decoder"])) == (1_222_532, 1_222_531)


@pytest.mark.parametrize("config", [AutoencoderKLConfig(), TAESDConfig()], ids=["kl", "taesd"])
@pytest.mark.parametrize("size", [(64, 64), (256, 256), (512, 256)])
def test_published_shapes(config, size):
    autoencoder = Autoencoder(config)
    params = autoencoder.abstract_params()
    h, w = size
    images = jax.ShapeDtypeStruct((2, h, w, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((2, h // 8, w // 8, 4), jnp.float32)
    assert jax.eval_shape(autoencoder.encode, params, images) == (latents, latents)
    assert jax.eval_shape(autoencoder.decode, params, latents) == images


def test_abstract_parameters_are_those_of_init(small):
    autoencoder, params = small
    abstract = autoencoder.abstract_params()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    assert all(isinstance(key.key, str) for path, _ in paths for key in path)


def test_halves_work_alone_and_say_what_is_missing(small):
    autoencoder, params = small
    images = jnp.zeros((1, 16, 16, 3))
    mean, _ = autoencoder.encode({"encoder": params["encoder"]}, images)
    assert autoencoder.decode({"decoder": params["decoder"]}, mean).shape == images.shape
    with pytest.raises(InputError, match="no encoder"):
        autoencoder.encode({"decoder": params["decoder"]}, images)


def test_inputs_that_do_not_fit_are_refused(small):
    autoencoder, params = small
    with pytest.raises(InputError, match="divisible"):
        autoencoder.encode(params, jnp.zeros((1, 16, 15, 3)))
    with pytest.raises(InputError, match="channels"):
        autoencoder.decode(params, jnp.zeros((1, 2, 2, 3)))
    with pytest.raises(InputError, match="nothing to do"):
        decode_chunked(autoencoder, params, jnp.zeros((0, 2, 2, 4)))


def test_bfloat16_compute_keeps_float32_outputs(small):
    autoencoder, params = small
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1.0)
    mean, _ = autoencoder.encode(params, images)
    half = Autoencoder(autoencoder.config, dtype="bfloat16")
    mean16, std16 = jax.jit(half.encode)(params, images)
    assert mean16.dtype == std16.dtype == jnp.float32
    assert 0 < jnp.std(mean16 - mean) < 0.05 * jnp.std(mean)
    decoded16 = jax.jit(half.decode)(params, mean)
    assert decoded16.dtype == jnp.float32
    decoded = autoencoder.decode(params, mean)
    assert 0 < jnp.std(decoded16 - decoded) < 0.05 * jnp.std(decoded)


def test_samples_of_a_batch_are_independent(small):
    autoencoder, params = small
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    mean, _ = autoencoder.encode(params, images)
    alone, _ = autoencoder.encode(params, images[1:2])
    np.testing.assert_allclose(mean[1:2], alone, atol=1e-6)


def test_chunks_give_the_whole_with_one_compilation(small):
    autoencoder, params = small
    images = jax.random.uniform(jax.random.key(2), (7, 16, 16, 3), minval=-1.0)
    whole, whole_std = autoencoder.encode(params, images)
    whole_images = autoencoder.decode(params, whole)
    before = module._encode._cache_size(), module._decode._cache_size()
    for n in (1, 4, 7):  # padded, exact, padded in the second chunk
        mean, std = encode_chunked(autoencoder, params, np.asarray(images[:n]), chunk=4)
        decoded = decode_chunked(autoencoder, params, whole[:n], chunk=4)
        assert mean.shape[0] == std.shape[0] == decoded.shape[0] == n
        np.testing.assert_allclose(mean, whole[:n], atol=1e-5)
        np.testing.assert_allclose(std, whole_std[:n], atol=1e-5)
        np.testing.assert_allclose(decoded, whole_images[:n], atol=1e-4)
    after = module._encode._cache_size(), module._decode._cache_size()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]
    pixels = decode_chunked(autoencoder, params, whole, chunk=4, uint8=True)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(to_uint8(whole_images), int)).max() <= 1


def test_chunks_can_be_sharded(small):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices (JAX_NUM_CPU_DEVICES=2)")
    autoencoder, params = small
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    latents = jax.random.normal(jax.random.key(3), (5, 4, 4, 4))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))
    sharded = decode_chunked(autoencoder, everywhere, latents, chunk=4, sharding=rows)
    np.testing.assert_allclose(sharded, decode_chunked(autoencoder, params, latents), atol=1e-5)


def test_downsampling_pads_right_and_below_only():
    """Only the last row and column of a KL level see zeros (pad 0 before, 1 after)."""
    level = Level(SMALL, 8, 8, 0, "down", dtype="float32", rngs=nnx.Rngs(0))
    level.downsample.kernel[...] = jnp.ones((3, 3, 8, 8))
    out = level(jnp.ones((1, 6, 6, 8)))[0, :, :, 0] / 8
    np.testing.assert_allclose(out, [[9, 9, 6], [9, 9, 6], [6, 6, 4]])


def test_taesd_downsampling_pads_both_sides():
    resample = TinyStage(8, "down", dtype="float32", rngs=nnx.Rngs(0)).resample
    resample.kernel[...] = jnp.ones((3, 3, 8, 8))
    out = resample(jnp.ones((1, 6, 6, 8)))[0, :, :, 0] / 8
    np.testing.assert_allclose(out, [[4, 6, 6], [6, 9, 9], [6, 9, 9]])


def test_taesd_soft_clamp_ranges_and_zero_std():
    autoencoder = Autoencoder(TINY)
    params = autoencoder.init(0)
    _, std = autoencoder.encode(params, jnp.ones((1, 8, 8, 3)))
    assert not std.any()
    # 3 tanh(z / 3) saturates: beyond it the latent no longer matters
    far = [autoencoder.decode(params, jnp.full((1, 1, 1, 4), z)) for z in (60.0, 600.0)]
    np.testing.assert_array_equal(*far)
    # the network's output is in [0, 1]: 0.75 is 0.5 in [-1, 1]
    last = {"kernel": params["decoder"]["conv_out"]["kernel"] * 0, "bias": jnp.full(3, 0.75)}
    decoder = params["decoder"] | {"conv_out": last}
    np.testing.assert_allclose(
        autoencoder.decode({"decoder": decoder}, jnp.ones((1, 1, 1, 4))), 0.5
    )


def test_taesd_equals_a_plain_restatement():
    """The whole of TAESD once more, from the description, on the weights in PyTorch's layout."""
    from ppflow_jax.convert.autoencoder_keys import autoencoder_state

    autoencoder = Autoencoder(TINY)
    params = autoencoder.init(4)
    state = autoencoder_state("taesd", params)

    def conv(x, name, stride=1):
        out = jax.lax.conv_general_dilated(
            x, state[name + ".weight"], (stride, stride), [(1, 1), (1, 1)]
        )
        return out + state[name + ".bias"][None, :, None, None] if name + ".bias" in state else out

    def block(x, name):
        h = np.maximum(conv(x, name + ".conv.0"), 0)
        return np.maximum(x + conv(np.maximum(conv(h, name + ".conv.2"), 0), name + ".conv.4"), 0)

    images = jax.random.uniform(jax.random.key(5), (2, 24, 16, 3), minval=-1.0)
    x = block(conv((images.transpose(0, 3, 1, 2) + 1) / 2, "encoder.0"), "encoder.1")
    for i in range(2, 14):
        x = conv(x, f"encoder.{i}", 2) if i in (2, 6, 10) else block(x, f"encoder.{i}")
    latent = conv(x, "encoder.14")
    mean, _ = autoencoder.encode(params, images)
    assert relative(mean, latent.transpose(0, 2, 3, 1)) < 1e-5

    x = np.maximum(conv(np.tanh(latent / 3) * 3, "decoder.1"), 0)
    for i in range(3, 19):
        if i in (6, 11, 16):
            x = np.repeat(np.repeat(x, 2, axis=2), 2, axis=3)
        else:
            x = conv(x, f"decoder.{i}") if i in (7, 12, 17) else block(x, f"decoder.{i}")
    out = np.clip(conv(x, "decoder.19"), 0, 1).transpose(0, 2, 3, 1) * 2 - 1
    assert relative(autoencoder.decode(params, mean), out) < 1e-5


def test_config_of_diffusers():
    config = json.loads((REFERENCE / "config.json").read_text())
    ours = AutoencoderKLConfig.from_diffusers(config)
    assert (ours.block_out_channels, ours.norm_num_groups, ours.downsample) == ((16, 32), 8, 2)
    assert AutoencoderKLConfig.from_diffusers(ours.to_diffusers()) == ours
    bad = config | {"act_fn": "gelu", "shift_factor": 0.1, "down_block_types": ["AttnDown"]}
    with pytest.raises(InputError) as error:
        AutoencoderKLConfig.from_diffusers(bad)
    assert all(word in str(error.value) for word in ("gelu", "shift_factor", "AttnDown"))
    with pytest.raises(InputError, match="norm_num_groups"):
        AutoencoderKLConfig(block_out_channels=(16, 32))
