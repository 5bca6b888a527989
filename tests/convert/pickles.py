"""Pickles opcode by opcode, and the files that hold them, good and bad."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ppflow_jax.convert.tensors import contiguous
from ppflow_jax.convert.weights_file import read_weights
from ppflow_jax.errors import InputError

# --- pickles, opcode by opcode ------------------------------------------------------------------


class Op(bytes):
    """Opcodes that leave one object on the stack."""


def op(value) -> bytes:
    """The opcodes of plain data; Op as it is."""
    match value:
        case Op():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            number = pickle.encode_long(value)
            return b"\x8a" + bytes([len(number)]) + number
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(op, value)) + b"t"
        case list():
            return b"](" + b"".join(map(op, value)) + b"e"
        case dict():
            return b"}(" + b"".join(op(k) + op(v) for k, v in value.items()) + b"u"
    raise TypeError(value)


def name(module: str, attribute: str) -> Op:
    return Op(f"c{module}\n{attribute}\n".encode())


def call(module: str, attribute: str, *arguments) -> Op:
    return Op(name(module, attribute) + op(arguments) + b"R")


def built(module: str, attribute: str, state) -> Op:
    return Op(name(module, attribute) + b")\x81" + op(state) + b"b")


def storage(kind="FloatStorage", key="0", numel=6, more=()) -> Op:
    return Op(op(("storage", name("torch", kind), key, "cpu", numel, *more)) + b"Q")


def tensor(shape=(2, 3), stride=(3, 1), offset=0, store=None, more=()) -> Op:
    hooks = call("collections", "OrderedDict")
    return call(
        *("torch._utils", "_rebuild_tensor_v2", store or storage(more=more), offset),
        *(shape, stride, False, hooks),
    )


def program(value) -> bytes:
    return b"\x80\x02" + op(value) + b"."


def state_of(arrays, kinds=None) -> tuple[dict[str, Op], dict[str, bytes]]:
    """The opcodes of tensors and the storages they need, for `write_zip`.

    Args:
      arrays: by name, in C order.
      kinds: names of storages by dtype, beside those of torch.save; None for float32 only.
    """
    kinds = {"float32": "FloatStorage", **(kinds or {})}
    tree, storages = {}, {}
    for number, (key, array) in enumerate(arrays.items()):
        storages[str(number)] = array.tobytes()
        if array.dtype.itemsize == 1:  # 8-bit floats have no typed storage
            raw = ("storage", name("torch.storage", "UntypedStorage"), str(number), "cpu")
            parts = (Op(op((*raw, array.size)) + b"Q"), 0, array.shape, contiguous(array.shape))
            more = (False, call("collections", "OrderedDict"), name("torch", str(array.dtype)))
            tree[key] = call("torch._utils", "_rebuild_tensor_v3", *parts, *more)
        else:
            store = storage(kinds[str(array.dtype)], str(number), array.size)
            tree[key] = tensor(array.shape, contiguous(array.shape), 0, store)
    return tree, storages


# --- files --------------------------------------------------------------------------------------

SIX = np.arange(6, dtype="<f4").tobytes()


def write_zip(path: Path, value, storages=None, members=(), compression=zipfile.ZIP_STORED) -> Path:
    content = value if isinstance(value, bytes) and not isinstance(value, Op) else program(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in ({"0": SIX} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", data)
        for member, data in members:
            archive.writestr(member, data)
    return path


def write_legacy(path: Path, value, storages=None, keys=None, little=True) -> Path:
    """storages: key -> (numel, bytes)."""
    storages = {"0": (6, SIX)} if storages is None else storages
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, system, value, list(keys or storages)]
    data = b"".join(map(program, parts))
    data += b"".join(struct.pack("<q", numel) + raw for numel, raw in storages.values())
    path.write_bytes(data)
    return path


CANARY = "touch canary"


@contextlib.contextmanager
def nothing_runs(folder: Path) -> Iterator[None]:
    """The files of a folder and the modules of Python stay as they are."""
    before, modules = sorted(os.listdir(folder)), set(sys.modules)
    yield
    assert sorted(os.listdir(folder)) == before, "something was run"
    assert set(sys.modules) == modules, "something was imported"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def cut(path: Path, by: int) -> Path:
    return written(path, path.read_bytes()[:-by])


def assert_one_line(path: Path, words: str, read=read_weights) -> None:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert words in message and message.startswith(str(path))
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 600
