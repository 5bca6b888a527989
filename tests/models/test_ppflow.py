import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.models import network
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params, init_params, make_apply, unstacked
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid
from tests.systems.checks import compiled

REFERENCE = Path(__file__).parents[1] / "reference"
TINY = ModelConfig(PPFLOW3, latent_size=8, channels=3, width=16, depth=2, heads=2, num_classes=5)


def imagenet(size, pyramid):
    return ModelConfig(pyramid, 32, 4, **SIZES[size], num_classes=1000)


def fresh(config, key):
    return jax.jit(lambda key: init_params(config, key))(key)


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


@pytest.mark.parametrize(
    ("size", "pyramid", "trainable"),
    [
        ("XL", SIT, 674_834_720),
        ("S", PPFLOW2, 32_940_064),
        ("S", PPFLOW3, 32_977_760),
        ("B", PPFLOW2, 130_465_696),
        ("B", PPFLOW3, 130_541_024),
        ("XL", PPFLOW2, 675_059_488),
        ("XL", PPFLOW3, 675_172_448),
    ],
)
def test_parameter_counts_are_the_public_ones(size, pyramid, trainable):
    assert count(imagenet(size, pyramid)) == trainable


def test_sit_xl_with_its_fixed_positions():
    assert count(imagenet("XL", SIT)) + 256 * 1152 == 675_129_632


def test_every_published_shape():
    published = json.loads((REFERENCE / "state_dict_shapes.json").read_text())
    assert len(published) == 12
    for name, entry in published.items():
        size = name.split("-")[1].split("/")[0] if "-" in name else name.split("_")[1]
        pyramid = SIT if "-" in name else {"2": PPFLOW2, "3": PPFLOW3}[name[-1]]
        config = dataclasses.replace(imagenet(size, pyramid), depth=1)
        zeros = jax.tree.map(lambda s: np.broadcast_to(0.0, s.shape), abstract_params(config))
        ours = {k: list(v.shape) for k, v in to_torch(config, zeros).items()}
        theirs = {k: v for k, v in entry["state_dict"].items() if not k.startswith("pos_embed")}
        assert ours == theirs, name


def test_key_table_reaches_every_parameter_once():
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(TINY))
    paths = [tuple(getattr(k, "key", None) for k in path) for path, _ in leaves]
    table = key_table(TINY)
    assert {e.path for e in table} == set(paths)
    assert len({(e.path, e.index) for e in table}) == len(table)


def test_a_fresh_model_outputs_zeros(key):
    x = jax.random.normal(key, (2, 8, 8, 3))
    out = compiled(TINY)(fresh(TINY, key), x, jnp.ones(2), jnp.zeros(2, jnp.int32), 1)
    assert out.shape == x.shape and not out.any()


def test_fresh_parameters_follow_the_public_initialisation(key):
    params = fresh(dataclasses.replace(TINY, width=128), key)
    qkv = params["blocks"]["attention"]["qkv_kernel"]
    bound = np.sqrt(6 / (128 + 3 * 128))
    assert 0.99 * bound < np.abs(qkv).max() <= bound
    assert np.std(params["label"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    assert not np.asarray(params["blocks"]["adaln"]["kernel"]).any()
    first, second = np.asarray(params["blocks"]["fc1"]["kernel"])
    assert np.abs(first - second).max() > 0.01  # layers are drawn apart


def noisy(config, key):
    """Parameters under which every part of the network shows in the output."""
    leaves, tree = jax.tree.flatten(fresh(config, key))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.mark.parametrize("remat, unrolled", [("full", False), ("dots", False), ("none", True)])
def test_remat_and_unrolling_change_memory_not_numbers(remat, unrolled, key):
    params = noisy(TINY, key)
    x, y = jax.random.normal(key, (2, 8, 8, 3)), jnp.array([1, 5])

    def grad(**options):
        apply = make_apply(TINY, **options)
        loss = lambda p: jnp.sum(apply(p, x, jnp.full(2, 0.3), y, 0) ** 2)
        return jax.jit(jax.grad(loss))

    program = grad(remat=remat, programs=Programs(unrolled=unrolled))
    text = str(program.trace(params).jaxpr)
    assert ("remat" in text) == ("scan" in text) == (not unrolled)
    plain, other = (jax.tree.leaves(f(params)) for f in (grad(), program))
    scale = max(float(jnp.abs(leaf).max()) for leaf in plain)
    for a, b in zip(plain, other):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4)


def test_blocks_one_by_one_are_the_scanned_ones(key):
    params, apply = noisy(TINY, key), compiled(TINY)
    x, y = jax.random.normal(key, (2, 8, 8, 3)), jnp.array([1, 5])
    for stage in range(3):
        args = (x, jnp.full(2, 0.3), y, stage)
        np.testing.assert_allclose(apply(unstacked(params), *args), apply(params, *args), atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_returns_float32(key):
    params = noisy(TINY, key)
    args = (params, jax.random.normal(key, (2, 8, 8, 3)), jnp.full(2, 0.3), jnp.array([1, 5]), 0)
    low, high = (compiled(TINY, dtype=d)(*args) for d in (jnp.bfloat16, jnp.float32))
    assert low.dtype == jnp.float32
    error = float(jnp.linalg.norm(low - high) / jnp.linalg.norm(high))
    assert 1e-4 < error < 3e-2


def test_samples_do_not_see_each_other(key):
    params, apply = noisy(TINY, key), compiled(TINY)
    x, t, y = jax.random.normal(key, (4, 8, 8, 3)), jnp.full(4, 0.2), jnp.arange(4)
    for stage in range(3):
        out = apply(params, x, t, y, stage)
        changed = apply(params, x.at[1].add(1.0), t, y, stage)
        np.testing.assert_allclose(np.delete(out, 1, 0), np.delete(changed, 1, 0), atol=1e-6)
        assert float(jnp.abs(out[1] - changed[1]).max()) > 1e-2


@pytest.mark.parametrize("pyramid", ["8x8@1", "1x1@1", "8x8@0.2,2x4@0.4,4x2@0.8,1x1@1"])
def test_any_pyramid_runs(pyramid, key):
    config = dataclasses.replace(TINY, pyramid=Pyramid.parse(pyramid))
    params, apply = noisy(config, key), compiled(config)
    x = jax.random.normal(key, (2, 8, 8, 3))
    for stage in range(len(config.pyramid)):
        out = apply(params, x, jnp.full(2, 0.5), jnp.array([0, 5]), stage)
        assert out.shape == x.shape and float(jnp.abs(out).max()) > 0


def test_without_level_embedding_only_the_table_is_gone(key):
    bare = dataclasses.replace(TINY, level_embedding=False)
    params = noisy(TINY, key)
    without = {name: part for name, part in params.items() if name != "level"}
    assert jax.tree.structure(abstract_params(bare)) == jax.tree.structure(without)
    zero = params | {"level": jax.tree.map(jnp.zeros_like, params["level"])}
    inputs = jax.random.normal(key, (2, 8, 8, 3)), jnp.full(2, 0.5), jnp.array([0, 5])
    ours, theirs = compiled(bare)(without, *inputs, 1), compiled(TINY)(zero, *inputs, 1)
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(InputError, match="PyTorch layout"):
        key_table(bare)


def test_config_round_trips_through_json():
    assert ModelConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    with pytest.raises(InputError, match="unknown keys"):
        ModelConfig.from_json(TINY.to_json() | {"windows": 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(latent_size=10), "not divisible by the 4x4 patch"),
        (dict(heads=3), "divisible by heads"),
        (dict(width=18), "divisible by heads"),
        (dict(depth=0), "at least 1"),
    ],
)
def test_impossible_sizes_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(TINY, **change)


def test_unknown_remat_policy_is_refused():
    with pytest.raises(InputError, match="none, full, dots"):
        make_apply(TINY, remat="all")
    with pytest.raises(InputError, match="remat 'full' is for blocks that are scanned"):
        make_apply(TINY, remat="full", programs=Programs(unrolled=True))


def test_a_network_is_traced_once_and_its_shapes_are_the_callers_own(monkeypatch):
    model, other = (dataclasses.replace(TINY, num_classes=n) for n in (17, 18))
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(model))
    make_apply(model)

    def refuse(*args, **options):
        raise AssertionError("traced again")

    monkeypatch.setattr(network, "_module", refuse)
    abstract_params(model)["blocks"].clear()
    assert jax.tree.map(lambda leaf: leaf.shape, abstract_params(model)) == shapes
    make_apply(model)
    for own in (dict(config=other), dict(config=model, remat="full")):
        with pytest.raises(AssertionError, match="traced again"):
            make_apply(**own)
