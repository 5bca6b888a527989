"""What of a file is converted: strict where it is needed, and nothing left out unsaid."""

from __future__ import annotations

import itertools
import json
import random

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.convert.autoencoder_keys import autoencoder_params, autoencoder_state
from ppflow_jax.convert.names import Wanted
from ppflow_jax.convert.shards import find_weights
from ppflow_jax.convert.source import open_source
from ppflow_jax.convert.tensors import FLOAT8
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.errors import InputError
from tests.acceptance.weight_files import (
    QKV,
    Maker,
    inside,
    make_index,
    model_state,
    under,
)
from tests.convert.pickles import built, call, state_of, write_zip
from tests.convert.test_names import WRAPPERS

SIT = model_state()


def same(source, expected=SIT) -> bool:
    return source.state.keys() == expected.keys() and all(
        (ref := source.state[name]).dtype == value.dtype and ref.read().tobytes() == value.tobytes()
        for name, value in expected.items()
    )


def refused(path, words, wanted=None):
    with pytest.raises(InputError) as caught:
        open_source(str(path), wanted)
    message = str(caught.value)
    assert words in message and message.startswith(str(path)) and len(message.splitlines()) == 1


def test_files_with_wrappers_convert_to_the_plain_one(tmp_path):
    """Whole files and the command; every sequence of wrappers is in test_names."""
    make = Maker(tmp_path)
    triples = random.Random(0).sample(list(itertools.product(WRAPPERS, repeat=3)), 12)
    for k, wrappers in enumerate(triples):
        state = inside(".".join(wrappers[1:]), make.sit) if k % 3 else make.sit
        if k % 2:
            path = make.safetensors(f"f{k}", under(".".join(wrappers), state))
        else:
            path = make.torch(f"f{k}", {"ema": under(".".join(wrappers), state), "epoch": 1})
        make.good(f"wrapped by {wrappers}", path, says="removed from names")
    assert len(make.cases) == 12
    for case in make.cases:
        assert case.problem() is None, case.name


def test_a_name_given_twice(tmp_path):
    path = tmp_path / "a.safetensors"
    twice = {**SIT, **under("module", {QKV: SIT[QKV] + 1})}
    save_file(twice, path)
    refused(path, f"{QKV} and module.{QKV} would both be {QKV}: say which with --entry or --prefix")
    save_torch_file(tmp_path / "b.pt", {"a": {"b.pos": np.ones(3)}, "a.b": {"pos": 1}, "m": SIT})
    assert same(open_source(str(tmp_path / "b.pt")))


def test_one_tensor_under_two_names_is_no_conflict(tmp_path):
    tree, storages = state_of(SIT)
    path = write_zip(tmp_path / "a.pt", {**tree, f"module.{QKV}": tree[QKV]}, storages)
    assert same(open_source(str(path)))


def test_what_is_left_out_is_counted(tmp_path):
    tree, storages = state_of(SIT)
    tree = {
        "ema": {**tree, "n_averaged": tree["pos_embed"], "projectors.0.weight": tree[QKV]},
        "model": tree,
        "when": call("datetime", "datetime", "now"),
        "args": built("argparse", "Namespace", {"path_type": "GVP", "lr": 1}),
    }
    source = open_source(str(write_zip(tmp_path / "a.pt", tree, storages)))
    assert same(source) and source.entry == "ema"
    assert source.left_out == {
        "ema.n_averaged": 1,
        "ema.projectors": 1,
        "model": len(SIT),
        "when: made by datetime.datetime": 0,
    }
    assert source.argument("path_type") == "gvp" and source.argument("lr") is None


def test_placeholders_where_they_are_needed(tmp_path):
    tree, storages = state_of(SIT)
    sparse = call("torch._utils", "_rebuild_sparse_tensor", 1)
    ema = built("torch_ema", "EMA", {"shadow": 1})

    def write(value):
        return write_zip(tmp_path / "a.pt", value, storages)

    refused(write({"ema": {**tree, QKV: sparse}}), f"ema.{QKV} is a sparse tensor")
    refused(write({"ema": {**tree, QKV: ema}}), f"ema.{QKV} is made by torch_ema.EMA")
    refused(write({"ema": {**tree, "head.weight": sparse}}), "ema.head.weight is a sparse tensor")
    refused(write({"ema": ema, "epoch": 3}), "ema is made by torch_ema.EMA")
    refused(write(ema), "the file is made by torch_ema.EMA")
    date = call("datetime", "datetime", "now")
    whole = {"date": date, "model": built("models", "SiT", {}), "opt": {"x": tree[QKV]}}
    refused(write(whole), "model is made by models.SiT")
    refused(write({"date": date, "bert": tree["pos_embed"]}), "is none of SiT")
    refused(write({"date": date, "a": tree, "b": tree}), "--entry=a or --entry=b")
    path = write({"ema": ema, "model": {**tree, "blocks.0._extra_state": ema}})
    refused(path, "ema is made by torch_ema.EMA", Wanted(weights="ema"))
    refused(path, "ema is made by torch_ema.EMA", Wanted(entry="ema"))
    assert same(open_source(str(path)))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_every_float8_number_is_kept_exactly(dtype, format, tmp_path):
    """All 256 bit patterns, as the definition of the format decodes them."""
    kind = FLOAT8[dtype]
    bits = np.resize(np.arange(256, dtype="u1"), SIT[QKV].shape).view(kind)
    path = tmp_path / f"a.{'pt' if format == 'torch' else 'safetensors'}"
    state = SIT | {QKV: bits}
    if format == "torch":
        tree, storages = state_of(state)
        write_zip(path, {"model": tree}, storages)
    else:
        save_file(state, path)
    source = open_source(str(path))
    found = source.state[QKV]
    assert found.dtype == np.float32 and found.shape == bits.shape and source.widened == 1
    expected = bits.astype(np.float32)
    np.testing.assert_array_equal(found.read(), expected)
    back = found.read().astype(kind).view("u1")
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(back[finite], bits.view("u1")[finite])
    assert finite.mean() > 0.9


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_scaled_float8_is_refused(suffix, tmp_path):
    state = {**SIT, QKV: SIT[QKV].astype(ml_dtypes.float8_e4m3fn)}
    state[QKV.replace("weight", suffix)] = np.ones(1, "f4")
    save_file(under("model", state), tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "scaled float8 is not supported; multiply")


def test_unusual_dtypes_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {
        "x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        "y": {"dtype": "C64", "shape": [1], "data_offsets": [4, 12]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    refused(path, "is none of SiT")
    save_file({**under("m", SIT), "y": np.ones(2, "c8")}, path)
    assert open_source(str(path)).left_out == {"y": 1}


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_one_file(ending, tmp_path):
    index = make_index(tmp_path / "s", "model", ending, under("module", SIT), [f"module.{QKV}"])
    assert same(open_source(str(index)))
    assert find_weights(tmp_path / "s") == index
    assert len(list(index.parent.iterdir())) == 3


def damaged(folder, change):
    index = make_index(folder, "model", ".safetensors", SIT, [QKV])
    content = json.loads(index.read_text())
    text = change(folder, content["weight_map"])
    index.write_text(text or json.dumps(content))
    return index


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "missing": (lambda f, m: (f / "model-2.safetensors").unlink(), "1 of 2 files are missing"),
        "twice": (lambda f, m: save_file(SIT, f / "model-2.safetensors"), "expected every tensor"),
        "absent": (lambda f, m: m.update(x="model-1.safetensors"), "x is not in model-1"),
        "elsewhere": (lambda f, m: m.update({QKV: "model-1.safetensors"}), "where the index says"),
        "unlisted": (lambda f, m: m.pop("pos_embed") and None, "pos_embed is in model-1"),
        "outside": (lambda f, m: m.update(x="../x.safetensors"), "expected a file beside it"),
        "number": (lambda f, m: m.update(x=3), "x is in 3; expected a file beside it"),
        "empty": (lambda f, m: m.clear(), "expected a weight_map"),
        "page": (lambda f, m: "<html>", "is no index of weights"),
        "listed twice": (lambda f, m: '{"weight_map": {"a": "x", "a": "y"}}', "a is listed twice"),
    }.values(),
)
def test_shards_that_do_not_fit(change, words, tmp_path):
    refused(damaged(tmp_path / "s", change), words)


def test_folders(tmp_path):
    assert find_weights(tmp_path) is None
    save_torch_file(tmp_path / "a.bin", SIT)
    assert find_weights(tmp_path).name == "a.bin"
    save_file(SIT, tmp_path / "a.safetensors")
    assert find_weights(tmp_path).name == "a.safetensors"
    save_file(SIT, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"give one of a\.safetensors, b\.safetensors"):
        find_weights(tmp_path)


def test_an_autoencoder_without_quant_conv_is_named():
    config = AutoencoderKLConfig(block_out_channels=(32, 64), layers_per_block=1)
    state = autoencoder_state("vae", Autoencoder(config).init(0))
    state = {k: v for k, v in state.items() if "quant_conv" not in k}
    with pytest.raises(InputError, match="without quant_conv is of the SD3/FLUX kind"):
        autoencoder_params("vae", state)
