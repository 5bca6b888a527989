"""The key tables, the strict loading and the architecture that is read from names and shapes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ppflow_jax.convert.infer import find_config, find_kind
from ppflow_jax.convert.keys import key_table, position_names, to_torch
from ppflow_jax.convert.load import from_torch, load_state
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid

REFERENCE = Path(__file__).parents[1] / "reference"
PUBLIC = json.loads((REFERENCE / "state_dict_shapes.json").read_text())
SMALL = ModelConfig(SIT, latent_size=8, channels=4, width=64, depth=2, heads=4, num_classes=10)


class Shape(NamedTuple):
    """What a tensor shows before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype("f4")


def shapes_of(config: ModelConfig) -> dict[str, Shape]:
    leaves, state = abstract_params(config), {}
    for entry in key_table(config):
        leaf = leaves
        for part in entry.path:
            leaf = leaf[part]
        one = leaf.shape[len(entry.index) :]
        state[entry.torch] = Shape(entry.theirs(np.broadcast_to(np.int8(0), one)).shape)
    for stage, name in enumerate(position_names(config)):
        rows, cols = config.pyramid.grid(stage, config.latent_size)
        state[name] = Shape((1, rows * cols, config.width))
    return state


@pytest.fixture(scope="module")
def sit():
    return load_file(REFERENCE / "sit" / "model.safetensors")


@pytest.fixture(scope="module")
def ppflow2():
    return load_file(REFERENCE / "ppflow_l2" / "model.safetensors")


@pytest.mark.parametrize("name", PUBLIC)
def test_names_and_shapes_are_those_of_the_public_code(name):
    public = PUBLIC[name]
    size = re.search(r"[_-](XL|L|B|S)[_/]", name)[1]
    pyramid = SIT if name.startswith("SiT") else (PPFLOW3 if name.endswith("3") else PPFLOW2)
    config = ModelConfig(pyramid, latent_size=32, channels=4, num_classes=1000, **SIZES[size])
    ours = shapes_of(config)
    assert len(ours) == public["n_tensors"]
    assert sum(int(np.prod(ref.shape)) for ref in ours.values()) == public["parameters"]
    block0 = {k: v.shape for k, v in ours.items() if not re.match(r"blocks\.[1-9]", k)}
    assert block0 == {k: tuple(v) for k, v in public["state_dict"].items() if k in block0}
    assert block0.keys() == {k for k in public["state_dict"] if not re.match(r"blocks\.[1-9]", k)}
    # and the architecture is found again from them
    kind = "sit" if len(pyramid) == 1 else "ppflow"
    assert find_kind(ours) == kind
    assert find_config(ours, kind) == config


@pytest.mark.parametrize(
    "changes",
    [
        dict(pyramid=Pyramid.parse("4x4@0.3,2x2@1")),
        dict(pyramid=Pyramid.parse("8x8@0.25,4x4@0.5,4x2@0.75,2x2@1"), latent_size=16),
        dict(pyramid=Pyramid.parse("3x3@0.5,1x1@1"), latent_size=6, channels=1),
        dict(pyramid=Pyramid.parse("8x4@0.5,4x2@1"), learn_sigma=False),
        dict(pyramid=Pyramid.parse("8x8@0.5,4x4@1"), num_classes=7, mlp_ratio=1000 / 64),
    ],
)
def test_unusual_architectures_are_found(changes):
    config = replace(SMALL, **changes)
    state, heads = shapes_of(config), config.heads
    assert find_config(state, "ppflow", pyramid=config.pyramid, heads=heads) == config
    if config.pyramid.boundaries != (0.3,) and len(config.pyramid) != 2:
        with pytest.raises(InputError, match="--pyramid="):
            find_config(state, "ppflow", heads=heads)


@pytest.mark.parametrize(
    "width,channels,patch", [(64, 4, "4x4@0.5,2x2@1"), (64, 1, "2x2@0.5,1x1@1")]
)
def test_public_stages_scale_with_the_last_patch(width, channels, patch):
    config = replace(SMALL, pyramid=Pyramid.parse(patch), width=width, channels=channels)
    assert find_config(shapes_of(config), "ppflow", heads=4) == config


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda s: s.pop("x_embedder.proj.weight"), "x_embedder.proj.weight with 4 axes"),
        (lambda s: s.pop("pos_embed.1"), "--latent_size"),
        (lambda s: s.update({"pos_embed.1": Shape((1, 15, 64))}), "no square latent"),
        (lambda s: s.update({"final_layer.linear.weight": Shape((33, 64))}), "33 rows"),
        (lambda s: s.update({"x_embedder.proj1.weight": Shape((64, 15, 2, 2))}), "proj1"),
        (lambda s: s.update({"x_embedder.proj.weight": Shape((64, 0, 2, 2))}), "4 axes"),
        (lambda s: s.update({"x_embedder.proj7.weight": Shape((64, 8, 2, 2))}), "proj2.weight"),
        (lambda s: s.update({"y_embedder.embedding_table.weight": Shape((1, 64))}), "at least 1"),
    ],
)
def test_what_cannot_be_found_is_said(change, words):
    state = shapes_of(replace(SMALL, pyramid=PPFLOW2))
    change(state)
    with pytest.raises(InputError, match=words):
        find_config(state, "ppflow", heads=4)


def test_heads_and_a_pyramid_of_other_patches_are_refused():
    state = shapes_of(replace(SMALL, pyramid=PPFLOW2))
    with pytest.raises(InputError, match="--heads=N"):
        find_config(state, "ppflow")
    with pytest.raises(InputError, match="not that of the file, which has 2 level"):
        find_config(state, "ppflow", heads=4, pyramid=PPFLOW3)


def test_foreign_names():
    with pytest.raises(InputError, match=r"bert\.q\.w"):
        find_kind({"bert.q.w": Shape((1,))})


def test_round_trip_is_bitwise_with_every_name(ppflow2):
    config = replace(SMALL, pyramid=PPFLOW2)
    loaded = load_state(config, ppflow2)
    assert not loaded.positions and loaded.drift == 0
    back = to_torch(config, loaded.params)
    assert back.keys() | {"pos_embed.0", "pos_embed.1"} == ppflow2.keys()
    for name, value in back.items():
        assert value.dtype == np.float32 and value.tobytes() == ppflow2[name].tobytes(), name


def test_all_mismatches_are_said_together(ppflow2):
    config = replace(SMALL, pyramid=PPFLOW2, depth=3)
    state = dict(ppflow2)
    state["blocks.1.mlp.fc1.bias"] = state["blocks.1.mlp.fc1.bias"].copy()
    state["blocks.1.mlp.fc1.bias"][3] = np.nan
    state["t_embedder.mlp.0.bias"] = np.full(64, np.inf, np.float32)
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T
    state["y_embedder.embedding_table.weight"] = np.zeros((11, 64), np.int32)
    state["pos_embed.0"] = state["pos_embed.0"][:, ::-1]
    state["pos_embed.1"] = state["pos_embed.1"][:, :4]
    state["head.weight"] = np.zeros(3, np.float32)
    del state["final_layer.linear1.bias"]
    with pytest.raises(InputError) as error:
        load_state(config, state)
    text = str(error.value)
    assert "\n" not in text and text.endswith("nothing was written")
    for part in (
        "18 tensors do not fit",
        "blocks.1.mlp.fc1.bias: has values that are NaN or infinite",
        "t_embedder.mlp.0.bias: has values that are NaN",
        "blocks.0.attn.qkv.weight: shape (64, 192), expected (192, 64)",
        "y_embedder.embedding_table.weight: dtype int32",
        "pos_embed.0: differs by",
        "pos_embed.1: shape (1, 4, 64), expected (1, 16, 64)",
        "head.weight: not expected",
        "final_layer.linear1.bias: missing",
        "blocks.2.adaLN_modulation.1.weight: missing",
    ):
        assert part in text


def test_the_same_fault_of_many_blocks_is_said_once(sit):
    with pytest.raises(InputError) as error:
        load_state(replace(SMALL, mlp_ratio=2.0), sit)
    assert str(error.value).count("mlp.fc1.weight") == 1
    assert "blocks.{0..1}.mlp.fc1.weight: shape (256, 64), expected (128, 64)" in str(error.value)


@pytest.mark.parametrize("a,b", [("blocks.0", "blocks.5"), ("mlp.fc1", "mlp.fc2")])
def test_mixed_up_names(sit, a, b):
    swap = {a: b, b: a}
    state = {re.sub(f"{a}|{b}", lambda m: swap[m[0]], k): v for k, v in sit.items()}
    with pytest.raises(InputError, match="do not fit"):
        load_state(SMALL, state)


def test_a_tensor_is_never_used_twice(monkeypatch, sit):
    from ppflow_jax.convert import load

    table = key_table(SMALL)
    for wrong in ((*table, table[0]), table[:-1]):
        monkeypatch.setattr(load, "key_table", lambda _, wrong=wrong: wrong)
        with pytest.raises(AssertionError):
            from_torch(SMALL, sit)


def test_positions_that_an_ema_let_drift_are_kept_but_not_used(sit):
    state = dict(sit)
    ours = state["pos_embed"]
    state["pos_embed"] = ours + np.float32(1.6e-4)
    loaded = load_state(SMALL, state)
    assert loaded.positions[0].tobytes() == state["pos_embed"].tobytes()
    assert loaded.drift == pytest.approx(1.6e-4, rel=1e-2)
    state["pos_embed"] = ours + np.float32(2e-3)
    with pytest.raises(InputError, match=r"pos_embed: differs by 0\.002"):
        load_state(SMALL, state)
    state["pos_embed"] = ours.astype(ml_dtypes.bfloat16)
    assert load_state(SMALL, state).drift == 0


def test_dtypes_are_kept_or_cast(sit):
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in sit.items()}
    params = load_state(SMALL, half).params
    assert params["blocks"]["fc1"]["kernel"].dtype == ml_dtypes.bfloat16
    assert load_state(SMALL, half, dtype=np.dtype("f4")).params["time"]["fc1"]["bias"].dtype == "f4"
    mixed = sit | {"blocks.1.mlp.fc1.bias": half["blocks.1.mlp.fc1.bias"]}
    with pytest.raises(InputError, match=r"dtypes bfloat16 and float32: give --dtype=float32"):
        load_state(SMALL, mixed)
    load_state(SMALL, mixed, dtype=np.dtype("f4"))
    huge = sit | {"t_embedder.mlp.0.bias": np.full(64, 1e300)}
    with pytest.raises(InputError, match="too large for float32"):
        load_state(SMALL, huge, dtype=np.dtype("f4"))


def test_a_pyramid_without_pytorch_layout():
    config = replace(SMALL, pyramid=Pyramid.parse("3x3@0.5,2x2@1"), latent_size=6)
    with pytest.raises(InputError, match="no PyTorch layout"):
        key_table(config)
