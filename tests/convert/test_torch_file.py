"""PyTorch and safetensors files: every tensor bit for bit, one at a time."""

from __future__ import annotations

import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from ppflow_jax.convert.tensors import STORAGES, TensorRef
from ppflow_jax.convert.torch_file import open_torch_file
from ppflow_jax.convert.weights_file import read_state
from tests.convert.pickles import (
    SIX,
    Op,
    assert_one_line,
    built,
    call,
    name,
    op,
    program,
    storage,
    tensor,
    write_legacy,
    write_zip,
)


@pytest.fixture(params=["zip", "legacy"])
def write(request, tmp_path):
    """Writes a tree with storages {key: array}, in both formats."""

    def _write(value, arrays):
        path = tmp_path / f"{request.param}.pt"
        if request.param == "zip":
            return write_zip(path, value, {k: a.tobytes() for k, a in arrays.items()})
        return write_legacy(path, value, {k: (a.size, a.tobytes()) for k, a in arrays.items()})

    return _write


# --- what must be read --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORAGES)
def test_every_dtype_bitwise(write, kind):
    dtype = STORAGES[kind]
    values = np.array([[0, 1, 1], [1, 0, 3]]).astype(dtype)
    ref = open_torch_file(write({"w": tensor(store=storage(kind))}, {"0": values}))["w"]
    got = ref.read()
    assert (ref.dtype, ref.shape, ref.nbytes) == (dtype, (2, 3), values.nbytes)
    assert got.dtype == dtype and got.flags.c_contiguous
    assert got.tobytes() == values.tobytes()


def test_views_share_a_storage(write):
    base = np.arange(24, dtype="<f4")
    store = storage(numel=24)
    tree = {
        "all": tensor((4, 6), (6, 1), 0, store),
        "transposed": tensor((6, 4), (1, 6), 0, store),
        "part": tensor((2, 3), (6, 2), 7, store),
        "expanded": tensor((3, 4), (0, 1), 20, store),
        "scalar": tensor((), (), 23, store),
        "empty": tensor((0, 5), (5, 1), 24, store),
        "one": tensor((1, 2), (999, 1), 0, store),
    }
    refs = open_torch_file(write(tree, {"0": base}))
    square = base.reshape(4, 6)
    expected = {
        "all": square,
        "transposed": square.T,
        "part": np.array([[7, 9, 11], [13, 15, 17]], "f4"),
        "expanded": np.tile(base[20:], (3, 1)),
        "scalar": np.array(23, "f4"),
        "empty": np.zeros((0, 5), "f4"),
        "one": base[None, :2],
    }
    assert len({id(ref.storage) for ref in refs.values()}) == 1
    for key, ref in refs.items():
        got = ref.read()
        assert got.shape == expected[key].shape == ref.shape, key
        np.testing.assert_array_equal(got, expected[key], err_msg=key)
        got[...] = 0  # a copy that may be written to
    np.testing.assert_array_equal(refs["all"].read(), square)


def test_empty_storage_has_no_member(write):
    tree = {"none": tensor((0,), (1,), 0, storage(numel=0))}
    assert open_torch_file(write(tree, {"0": np.zeros(0, "f4")}))["none"].read().shape == (0,)


def test_training_checkpoint(write):
    ordered = Op(call("collections", "OrderedDict") + b"(" + op("w") + op(tensor()) + b"u")
    versions = {"_metadata": Op(call("collections", "OrderedDict"))}
    value = {
        "model": Op(ordered + op(versions) + b"b"),
        "ema": {"w": call("torch._utils", "_rebuild_parameter", tensor(), True, {})},
        "opt": {"state": {0: {"step": 7, "betas": (0.9, 0.999)}}, "param_groups": [{"lr": 1e-4}]},
        "args": built("argparse", "Namespace", {"model": "SiT-XL/2", "seed": 0, "big": 2**40}),
        "size": call("torch", "Size", (2, 3)),
        "dtype": name("torch", "bfloat16"),
        "device": call("torch", "device", "cuda", 0),
        "none": None,
        "epoch": -3,
    }
    path = write(value, {"0": np.arange(6, dtype="f4")})
    tree = open_torch_file(path)
    assert tree["args"] == {"model": "SiT-XL/2", "seed": 0, "big": 2**40}
    assert tree["opt"]["state"][0] == {"step": 7, "betas": (0.9, 0.999)}
    assert tree["size"] == (2, 3) and tree["device"] == "cuda:0" and tree["epoch"] == -3
    assert tree["dtype"] == ml_dtypes.bfloat16 and tree["none"] is None
    assert list(tree["model"]) == ["w"] and isinstance(tree["ema"]["w"], TensorRef)
    assert sorted(read_state(path)) == ["ema.w", "model.w"]


def test_pickle_protocol_4_and_untyped_storage(tmp_path):
    data = b"\x80\x04\x95" + bytes(8) + b"}\x94\x8c\x01a\x94\x8c\x05torch\x8c\x04Size\x93"
    data += op(((5,),)) + b"Rs."
    assert open_torch_file(write_zip(tmp_path / "a.pt", data, {})) == {"a": (5,)}
    raw = Op(op(("storage", name("torch.storage", "UntypedStorage"), "0", "cpu", 24)) + b"Q")
    hooks, dtype = call("collections", "OrderedDict"), name("torch", "uint16")
    value = call("torch._utils", "_rebuild_tensor_v3", raw, 2, (5,), (2,), False, hooks, dtype)
    ref = open_torch_file(write_zip(tmp_path / "b.pt", value))
    np.testing.assert_array_equal(ref.read(), np.frombuffer(SIX, "<u2")[2:12:2])


def test_script_archive_gives_attributes_and_constants_but_no_code(tmp_path):
    layer = built("__torch__.net.___torch_mangle_3", "Layer", {"0": tensor(), "stride": 2})
    sizes = call("torch.jit._pickle", "build_intlist", [1, 7])
    value = built("__torch__.net", "Net", {"training": False, "layer": layer, "sizes": sizes})
    constants = program((tensor(store=storage(key="0")),))
    path = write_zip(
        tmp_path / "script.pt",
        value,
        members=[
            ("archive/code/__torch__/net.py", b"import os"),
            ("archive/constants.pkl", constants),
            ("archive/constants/0", SIX[::-1]),
        ],
    )
    tree = open_torch_file(path)
    assert tree["layer"]["stride"] == 2 and tree["sizes"] == [1, 7]
    np.testing.assert_array_equal(tree["layer"]["0"].read().ravel(), np.arange(6))
    assert tree["CONSTANTS"]["c0"].read().tobytes() == SIX[::-1]
    assert sorted(read_state(path)) == ["CONSTANTS.c0", "layer.0"]
    assert_one_line(write_zip(tmp_path / "no_code.pt", value), "made by __torch__.net.Net")


def test_one_tensor_of_a_large_file_needs_the_memory_of_one_tensor(tmp_path):
    numel = 2**30
    tree = {
        "small": tensor((256, 1024), (1024, 1), 7_000_001, storage(numel=numel, more=(None,))),
        "last": tensor((3,), (1,), 0, storage(key="1", numel=3, more=(None,))),
    }
    path = write_legacy(tmp_path / "sparse.pt", tree, {"0": (numel, b"")}, keys=["0", "1"])
    with open(path, "r+b") as file:
        file.seek(4 * numel, os.SEEK_END)  # a hole of 4 GiB that takes no disk
        file.write(struct.pack("<q3f", 3, 1, 2, 3))
    tracemalloc.start()
    refs = open_torch_file(path)
    assert refs["small"].read().sum() == 0
    np.testing.assert_array_equal(refs["last"].read(), [1, 2, 3])
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def test_safetensors(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a.weight": np.arange(6, dtype="f4").reshape(2, 3),
        "half": np.ones((2,), ml_dtypes.bfloat16),
        "scalar": np.array(3, "i8"),
    }
    path = tmp_path / "x.safetensors"
    numpy.save_file(arrays, path)
    refs = read_state(path)
    assert set(refs) == set(arrays)
    for key, ref in refs.items():
        assert (ref.shape, ref.dtype, ref.nbytes) == (
            *(arrays[key].shape, arrays[key].dtype, arrays[key].nbytes),
        )
        assert ref.read().tobytes() == arrays[key].tobytes()
    for broken in (path.read_bytes()[:-3], b"", b"\xff" * 40, b'\x02\0\0\0\0\0\0\0{"'):
        path.write_bytes(broken)
        assert_one_line(path, "x.safetensors", read_state)
