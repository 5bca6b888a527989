"""The Inception's names: both namings, strictness, the command."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ppflow_jax.autoencoders.decode import load_autoencoder
from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.convert.inception_keys import (
    GRAPH,
    inception_config,
    inception_params,
    inception_state,
    key_table,
)
from ppflow_jax.convert.infer import find_kind
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.metrics.inception import Inception, InceptionConfig
from ppflow_jax.metrics.networks import load_inception
from tests.convert.test_convert import convert, same
from tests.inception import REFERENCE, entries, random_state


def constant(shapes) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(0.5), shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def graph_shapes():
    return json.loads((REFERENCE / "graph_shapes.json").read_text())


@pytest.fixture(scope="module")
def fid_shapes():
    return {name: tuple(entry["shape"]) for name, entry in entries().items()}


def test_both_namings_are_complete(graph_shapes, fid_shapes):
    """Names and shapes of the two published files, and a hand-written sample of the pairs."""
    for shapes, naming in ((graph_shapes, "graph"), (fid_shapes, "pytorch_fid")):
        state = constant(shapes)
        assert find_kind(state) == "inception"
        config = inception_config(state)
        assert config == InceptionConfig(naming != "graph", naming != "graph")
        params = Inception(config).abstract_params()
        table = key_table(params)
        assert {names[naming] for names in table.values()} == set(shapes)
        inception_params(state)
    pairs = {names["graph"]: names["pytorch_fid"] for names in table.values() if "graph" in names}
    for graph, fid in {
        "conv.weight": "Conv2d_1a_3x3.conv.weight",
        "conv_4.var": "Conv2d_4a_3x3.bn.running_var",
        "mixed.tower.conv_1.weight": "Mixed_5b.branch5x5_2.conv.weight",
        "mixed_1.tower_1.conv_2.mean": "Mixed_5c.branch3x3dbl_3.bn.running_mean",
        "mixed_3.conv.weight": "Mixed_6a.branch3x3.conv.weight",
        "mixed_3.tower.conv.weight": "Mixed_6a.branch3x3dbl_1.conv.weight",
        "mixed_6.conv.beta": "Mixed_6d.branch1x1.bn.bias",
        "mixed_7.tower.conv_2.beta": "Mixed_6e.branch7x7_3.bn.bias",
        "mixed_7.tower_1.conv_4.weight": "Mixed_6e.branch7x7dbl_5.conv.weight",
        "mixed_8.tower.conv_1.weight": "Mixed_7a.branch3x3_2.conv.weight",
        "mixed_8.tower_1.conv_3.weight": "Mixed_7a.branch7x7x3_4.conv.weight",
        "mixed_9.tower_mixed_conv.weight": "Mixed_7b.branch3x3_2a.conv.weight",
        "mixed_10.tower_1_conv_1.weight": "Mixed_7c.branch3x3dbl_2.conv.weight",
        "mixed_10.tower_1_mixed_conv_1.beta": "Mixed_7c.branch3x3dbl_3b.bn.bias",
        "mixed_10.tower_2_conv.weight": "Mixed_7c.branch_pool.conv.weight",
    }.items():
        assert pairs[GRAPH + graph] == fid


def test_all_mismatches_are_reported_together(graph_shapes, fid_shapes):
    state = constant(graph_shapes)
    first, second = (f"{GRAPH}mixed_4.tower.conv_{i}.weight" for i in (1, 2))
    state[first], state[second] = state[second], state[first]  # mixed up
    del state[f"{GRAPH}conv.beta"]
    state[f"{GRAPH}mixed_8.tower.conv.var"] = -state[f"{GRAPH}mixed_8.tower.conv.var"]
    state[f"{GRAPH}mixed_9.conv.mean"] = np.full(320, np.nan, np.float32)
    state["Mixed_7b.branch1x1.bn.bias"] = np.zeros(320, np.float32)
    state[f"{GRAPH}conv_1.mean"] = np.zeros(32, np.int64)
    state[f"{GRAPH}mixed_11.conv.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as error:
        inception_params(state)
    text = str(error.value)
    assert "(8 mismatches)" in text
    for line in (
        f"{first}: shape (192, 128, 7, 1), expected (128, 128, 1, 7)",
        f"{second}: shape (128, 128, 1, 7), expected (192, 128, 7, 1)",
        f"{GRAPH}conv.beta: missing",
        f"{GRAPH}mixed_8.tower.conv.var: has negative variances",
        f"{GRAPH}mixed_9.conv.mean: has values that are not finite",
        f"given 2 times ({GRAPH}mixed_9.conv.beta, Mixed_7b.branch1x1.bn.bias)",
        f"{GRAPH}conv_1.mean: dtype int64, expected a floating-point one",
        f"{GRAPH}mixed_11.conv.weight: not expected",
    ):
        assert line in text

    imagenet = fid_shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    with pytest.raises(InputError, match=r"fc\.weight: shape \(1000, 2048\), expected \(1008"):
        inception_params(constant(imagenet | {"AuxLogits.fc.weight": (1000, 768)}))


def test_the_command_both_ways(tmp_path):
    state = random_state()
    extra = {
        f"{k.removesuffix('.weight')}.num_batches_tracked": np.int64(7).reshape(())
        for k in state
        if k.endswith("bn.weight")
    }
    save_torch_file(tmp_path / "fid.pth", state | extra)
    swapped = dict(state)
    a, b = (f"Mixed_7c.branch3x3_2{x}.conv.weight" for x in "ab")
    swapped[a], swapped[b] = state[b], state[a]
    save_file(swapped, tmp_path / "swapped.safetensors")
    results = convert(
        tmp_path,
        ["--source=~fid.pth", "--target=~fid"],
        ["--source=~fid", "--target=~back.safetensors", "--to=safetensors"],
        ["--source=~swapped.safetensors", "--target=~none"],
        ["--source=~fid.pth", "--target=~none", "--pyramid=ppflow2"],
    )
    assert [r.code for r in results] == [0, 0, 1, 1], results
    assert "23,885,392 parameters" in results[0].out
    assert "left out: num_batches_tracked (94 tensors)" in results[0].out
    assert f"{a}: shape (384, 384, 3, 1)" in results[2].err.splitlines()[-1]
    assert "for SiT models" in results[3].err
    assert not (tmp_path / "none").exists()
    assert same(tmp_path / "back.safetensors", state)

    config, params, dtype = load_inception(tmp_path / "fid")
    expected, values = inception_params(state)
    assert (config, dtype) == (expected, "float32")
    jax.tree.map(np.testing.assert_array_equal, params, values)
    assert inception_state(params).keys() == state.keys()
    with pytest.raises(InputError, match="holds an Inception network"):
        read_card(find_checkpoint(tmp_path / "fid"))
    with pytest.raises(InputError, match="is no autoencoder"):
        load_autoencoder(tmp_path / "fid")
