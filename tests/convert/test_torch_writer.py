"""What is written is read back bit for bit, by our reader and by torch."""

from __future__ import annotations

import os
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from ppflow_jax.convert.tensors import STORAGES
from ppflow_jax.convert.torch_file import open_torch_file
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.convert.weights_file import read_state
from ppflow_jax.errors import InputError


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        # random bits, NaNs with payloads among them; bools are 0 and 1
        str(dtype): rng.integers(256, size=(3, 5 * dtype.itemsize), dtype="u1").view(dtype)
        for dtype in STORAGES.values()
        if dtype.kind != "b"
    }
    made["bool"] = rng.integers(2, size=(4, 4)).astype(bool)
    made["transposed"] = np.arange(24, dtype="f4").reshape(2, 3, 4).transpose(2, 0, 1)
    made["scalar"] = np.array(1.5, "f4")
    made["empty"] = np.zeros((0, 3), "f4")
    made["column"] = np.arange(3, dtype="f4")[:, None]
    made["big_endian"] = np.arange(3, dtype=">f4")
    return made


TREE = {
    "epoch": 3,
    "big": -(2**40),
    "lr": 1e-4,
    "name": "SiT-XL/2 é",
    "flags": [True, False, None],
    "pair": (1, 2.0),
    "nothing": {},
    7: [],
}


def assert_same_bits(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert got.shape == expected.shape, name
    expected = expected.astype(expected.dtype.newbyteorder("<"))
    assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes(), name


def test_round_trip(tmp_path):
    path = tmp_path / "a.pt"
    save_torch_file(path, {"model": OrderedDict(arrays()), **TREE})
    tree = open_torch_file(path)
    model = tree.pop("model")
    assert tree == TREE and list(model) == list(arrays())
    for name, expected in arrays().items():
        assert_same_bits(model[name].read(), expected, name)
    # lazy leaves: what was read is written again, to the same bytes
    save_torch_file(tmp_path / "b.pt", {"model": model, **TREE})
    assert (tmp_path / "b.pt").read_bytes() == path.read_bytes()


def test_layout(tmp_path):
    path = tmp_path / "a.pt"
    save_torch_file(path, arrays())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("archive/byteorder") == b"little"
    starts = [ref.storage.start for ref in open_torch_file(path).values() if ref.nbytes]
    assert starts and all(start % 64 == 0 for start in starts)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_only_one_tensor_is_in_memory(tmp_path):
    def make():
        return np.ones(2**21, "f4")

    tracemalloc.start()
    save_torch_file(tmp_path / "a.pt", {str(i): make for i in range(12)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.pt").stat().st_size > 96 * 2**20 > 3 * peak


@pytest.mark.parametrize(
    ("leaf", "words"),
    {
        "object": (object(), "a.x is a object"),
        "complex": (np.zeros(2, "c8"), "dtype complex64"),
        "texts": (np.array(["a"]), "dtype <U1"),
        "long": (2**64, "more than 64 bits"),
        "key": ({(1, 2): 3}, "a key (1, 2)"),
    }.values(),
)
def test_what_cannot_be_written_leaves_no_file(leaf, words, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"older")
    with pytest.raises(InputError) as caught:
        save_torch_file(path, {"a": {"w": np.ones(3), "x": leaf}})
    assert words in str(caught.value) and str(caught.value).startswith(str(path))
    assert os.listdir(tmp_path) == ["a.pt"] and path.read_bytes() == b"older"


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file"):
        save_torch_file(tmp_path / "none" / "a.pt", {})


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path, mmap):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    save_torch_file(path, {"model": arrays(), **TREE})
    tree = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    model = tree.pop("model")
    assert tree == TREE
    for name, expected in arrays().items():
        got = model[name]
        bits = got.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        expected = expected.astype(expected.dtype.newbyteorder("<"))
        assert tuple(got.shape) == expected.shape and got.is_contiguous()
        assert str(got.dtype) == f"torch.{expected.dtype}" and bits == expected.tobytes(), name


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_we_read_what_torch_writes(tmp_path, new):
    torch = pytest.importorskip("torch")
    import argparse

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0)
    tree = {
        "model": layer.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="SiT", size=torch.Size([1, 2]), dtype=torch.bfloat16),
        "views": [base, base[3:9].view(2, 3).T, base[:1].expand(5, 4), base[7], base[:0]],
        "dtypes": [base.to(getattr(torch, str(d))) for d in STORAGES.values()],
        "parameter": torch.nn.Parameter(base),
        "unsigned": base.to(torch.uint16),
    }
    path = tmp_path / "a.pt"
    torch.save(tree, path, _use_new_zipfile_serialization=new)
    ours = open_torch_file(path)
    assert ours["args"]["size"] == (1, 2) and ours["args"]["model"] == "SiT"
    assert ours["opt"]["param_groups"][0]["lr"] == 1e-3
    state = {i: dict(s) for i, s in tree["opt"]["state"].items()}
    pairs = [
        (ours[key], tree[key]) for key in ("model", "views", "dtypes", "parameter", "unsigned")
    ]
    pairs.append((ours["opt"]["state"], state))
    count = 0
    while pairs:
        got, expected = pairs.pop()
        if isinstance(expected, torch.Tensor):
            expected = expected.detach().contiguous()
            array, count = got.read(), count + 1
            assert array.shape == tuple(expected.shape)
            assert array.tobytes() == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            keys = expected if isinstance(expected, dict) else range(len(expected))
            assert len(got) == len(expected)
            pairs += [(got[key], expected[key]) for key in keys]
    assert count > 30 and len(read_state(path)) == count
