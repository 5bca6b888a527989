import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from ppflow_jax.devices.sharding import (
    AXES,
    batch_sharding,
    fetch,
    local_rows,
    make_mesh,
    spread,
    to_global,
    tree_shardings,
)
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import init_state


def test_rows_follow_the_devices_in_any_order(monkeypatch):
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    mesh = Mesh(np.array(jax.devices())[order].reshape(4, 2, 1), AXES)
    place = batch_sharding(mesh)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    np.testing.assert_array_equal(to_global({"x": x}, place, 16)["x"], x)
    np.testing.assert_array_equal(fetch(spread(x, place)), x)

    def half(sharding, shape):  # what a process with the first four devices would see
        whole = sharding.devices_indices_map(shape)
        return {d: whole[d] for d in jax.devices()[:4]}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", half)
    assert local_rows(place, 24).tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]
    local_rows.cache_clear()


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_parameters_ema_and_moments_are_split(sizes):
    model = ModelConfig(PPFLOW2, 8, 4, width=128, depth=8, heads=4, num_classes=10)
    tx = make_optimizer(OptimConfig(), 10)
    init = lambda key: init_state(model, tx, key)
    key = jax.random.key(0)
    shardings = tree_shardings(jax.eval_shape(init, key), make_mesh(*sizes))
    state = jax.jit(init, out_shardings=shardings)(key)
    moments = state["opt_state"][0]
    for tree in (state["params"], state["ema"], moments.mu, moments.nu):
        leaves = jax.tree.leaves(tree)
        whole = sum(leaf.nbytes for leaf in leaves)
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        large = [leaf for leaf in leaves if leaf.nbytes > 0.02 * whole]
        assert len(large) >= 5
        for leaf in large:
            assert leaf.addressable_shards[0].data.nbytes * sizes[1] <= leaf.nbytes
        assert here < 1.25 * whole / sizes[1]  # biases and patch projections are whole


def test_sizes_must_cover_the_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(devices=jax.devices()[:2]).size == 2
    with pytest.raises(InputError, match="does not cover the 8 device"):
        make_mesh(3, 2, 1)
    with pytest.raises(InputError, match="at most one -1"):
        make_mesh(-1, -1, 1)
