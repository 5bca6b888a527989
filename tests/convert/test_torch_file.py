"""PyTorch files are read without running anything, and every broken one is one clear line."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ppflow_jax.convert.tensors import STORAGES, TensorRef
from ppflow_jax.convert.torch_file import open_torch_file
from ppflow_jax.convert.weights_file import read_state
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
    with pytest.raises(InputError, match=r"__torch__\.net\.Net"):
        open_torch_file(write_zip(tmp_path / "no_code.pt", value))


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


# --- what must be refused -----------------------------------------------------------------------

CANARY = "touch canary"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def cut(path: Path, by: int) -> Path:
    return written(path, path.read_bytes()[:-by])


def laughs() -> bytes:
    """Ten lists, each of ten times the one before: 10**10 values in a hundred opcodes."""
    data = b"\x80\x02]q\x00"
    for level in range(10):
        data += b"](" + b"h" + bytes([level])
        data += (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
    return data + b"."


def duplicate(path: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate"):
        return write_zip(path, tensor(), members=[("archive/data/0", SIX)])


def huge_member(path: Path) -> Path:
    """A stored member whose directory entry claims 2**31 - 1 bytes."""
    write_zip(path, tensor(store=storage(numel=80)))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<2I", *[2**31 - 1] * 2)
    return written(path, bytes(data))


def deep(opcode: bytes) -> bytes:
    return b"\x80\x02N" + opcode * 100_000 + b"."


SCRIPT = [("archive/code/x.py", b"")]
T, LEGACY = tensor, tensor(more=(None,))


def bomb(path: Path) -> Path:
    """A storage of 16 MiB in 16 KiB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(T(store=storage(numel=250))))
        archive.writestr("archive/data/0", bytes(2**24), zipfile.ZIP_DEFLATED)
    return path


def other_zip(path: Path) -> Path:
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    return path.with_suffix(".npz").rename(path)


# What the file holds (opcodes, or plain data around them) or what writes it, and words expected.
HOSTILE = {
    # asks for something to be run
    "os_system": (call("os", "system", CANARY), "os.system"),
    "posix_system": (call("posix", "system", CANARY), "posix.system"),
    "builtins_eval": (call("builtins", "eval", "open('canary','w')"), "builtins.eval"),
    "builtins_exec_python2": (call("__builtin__", "eval", "1"), "__builtin__.eval"),
    "builtins_getattr": (call("builtins", "getattr", 1, "real"), "builtins.getattr"),
    "torch_hub_load": (call("torch.hub", "load", "evil/repo", "x"), "torch.hub.load"),
    "subprocess_popen": (
        call("subprocess", "Popen", ["touch", "canary"]),
        "subprocess.Popen",
    ),
    "nested_reduce": (
        {"model": [call("collections", "OrderedDict", [(1, call("os", "system", CANARY))])]},
        "os.system",
    ),
    "reduce_inside_a_tensor": (T(offset=call("os", "getpid")), "os.getpid"),
    "numpy_scalar_by_codecs": (
        {"loss": call("_codecs", "encode", "x", "latin1")},
        "_codecs.encode",
    ),
    "numpy_scalar": (
        call("numpy.core.multiarray", "scalar", 1),
        "numpy.core.multiarray.scalar",
    ),
    "copyreg": (call("copyreg", "_reconstructor", 1, 2, None), "copyreg._reconstructor"),
    "whole_module": (built("models", "SiT", {"training": True}), "models.SiT"),
    "script_class_without_code": (built("__torch__", "Net", {}), "__torch__.Net"),
    "script_prefix_trick": (
        lambda p: write_zip(p, built("__torch__x.os", "system", {}), members=SCRIPT),
        "__torch__x.os.system",
    ),
    "script_class_called": (
        lambda p: write_zip(p, call("__torch__.os", "system", CANARY), members=SCRIPT),
        "__torch__.os.system",
    ),
    "script_os_system": (
        lambda p: write_zip(p, call("os", "system", CANARY), members=SCRIPT),
        "os.system",
    ),
    "opcode_inst": (b"(" + op(CANARY) + b"ios\nsystem\n.", "os.system"),
    "opcode_obj": (b"(" + name("argparse", "Namespace") + b"o.", "opcode OBJ"),
    "opcode_ext1": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "opcode_ext4": (b"\x80\x02\x84\x01\0\0\0.", "opcode EXT4"),
    "opcode_newobj_ex": (
        b"\x80\x04" + name("argparse", "Namespace") + b")}\x92.",
        "NEWOBJ_EX",
    ),
    "text_persistent_id": (b"P/etc/passwd\n.", "opcode PERSID"),
    "stack_global_dotted": (
        b"\x80\x04" + op("torch") + op("_utils._rebuild_tensor_v2.__globals__") + b"\x93.",
        "__globals__",
    ),
    "stack_global_split_elsewhere": (
        b"\x80\x04" + op("torch") + op("_utils._rebuild_tensor_v2") + b"\x93.",
        "torch._utils._rebuild_tensor_v2",
    ),
    "stack_global_of_numbers": (b"\x80\x04NN\x93.", "not made of text"),
    "name_with_terminal_escapes": (
        b"\x80\x04" + op("os\n\x1b[2J") + op("system") + b"\x93.",
        r"os\n\x1b[2J.system",
    ),
    "build_class_on_ordered_dict": (
        Op(call("collections", "OrderedDict") + op({"__class__": 1}) + b"b"),
        "__class__",
    ),
    "build_attribute_on_ordered_dict": (
        Op(call("collections", "OrderedDict") + op({"items": 1}) + b"b"),
        "attribute items",
    ),
    "build_class_on_namespace": (
        built("argparse", "Namespace", {"__class__": 1}),
        "attribute __class__",
    ),
    "build_number_on_namespace": (built("argparse", "Namespace", {1: 1}), "attribute 1"),
    "build_slots_on_namespace": (
        built("argparse", "Namespace", (None, {"a": 1})),
        "attributes",
    ),
    "build_on_tensor": (Op(T() + op({"read": 1}) + b"b"), "attributes set on a TensorRef"),
    "build_on_constructor": (
        Op(name("torch._utils", "_rebuild_tensor_v2") + op({"call": 1}) + b"b"),
        "attributes set on a Constructor",
    ),
    "setstate_key": (built("argparse", "Namespace", {"__setstate__": 1}), "__setstate__"),
    "call_of_data": (Op(op({"a": 1}) + b")R"), "a call of dict"),
    "call_of_storage_type": (call("torch", "FloatStorage", 9), "a call of FloatStorage"),
    "constructor_as_value": ({"x": name("argparse", "Namespace")}, "argparse.Namespace as a"),
    "storage_as_value": ({"x": storage()}, "as a value"),
    "constructor_with_unfit_arguments": (call("torch", "Size", 1, 2, 3), "torch.Size with 3"),
    "ordered_dict_of_numbers": (call("collections", "OrderedDict", [1, 2]), "pairs"),
    "tensor_with_hooks": (
        call("torch._utils", "_rebuild_tensor_v2", storage(), 0, (1,), (1,), False, {1: 2}),
        "hooks",
    ),
    # broken pickles
    "pickle_truncated": (program(T())[:-9], "ends inside a name"),
    "pickle_empty": (b"", "ends early"),
    "pickle_stack_underflow": (b"\x80\x02\x85.", "not made"),
    "pickle_memo_missing": (b"\x80\x02h\x07.", "not made"),
    "pickle_without_mark": (b"\x80\x02t.", "not made"),
    "pickle_bad_utf8": (b"\x80\x02X\x02\0\0\0\xff\xfe.", "UTF-8"),
    "pickle_append_to_dict": (b"\x80\x02}Na.", "appended"),
    "pickle_items_on_list": (b"\x80\x02]NNs.", "not a dict"),
    "pickle_key_is_a_deep_tuple": (
        b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",
        "key of type tuple",
    ),
    "pickle_keys_that_collide": ({2**61: 1}, "key of type int"),
    "huge_binunicode8": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "ends early"),
    "huge_binbytes8": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.", "ends early"),
    "huge_long4": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "whole number"),
    "negative_long4": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x.", "whole number"),
    "huge_memo_index": (b"\x80\x02Nr\xff\xff\xff\x7fh\0.", "not made"),
    "recursion_bomb_tuples": (deep(b"\x85"), "nested deeper"),
    "recursion_bomb_lists": (b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b".", "nested deeper"),
    "list_in_itself": (b"\x80\x02]q\0h\0a.", "in itself"),
    "billion_laughs": (laughs(), "repetition"),
    "pickle_too_long": (b"\x80\x02N." + bytes(2**24), "at most"),
    # tensors that do not fit
    "storage_missing": (lambda p: write_zip(p, T(), {}), "data/0 is missing"),
    "storage_short": (lambda p: write_zip(p, T(), {"0": SIX[:-1]}), "expected 24 bytes, found 23"),
    "storage_claims_less": (T(store=storage(numel=5)), "needs 24 bytes"),
    "storage_claims_2_to_60": (T(store=storage(numel=2**60)), "claims 115292"),
    "storage_claims_negative": (T(store=storage(numel=-6)), "claims -6"),
    "member_size_lies": (huge_member, "shorter than"),
    "storage_unknown_type": (
        T(store=storage("ComplexFloatStorage")),
        "torch.ComplexFloatStorage",
    ),
    "storage_two_types": (
        [T(), T(store=storage("IntStorage"))],
        "two types or sizes",
    ),
    "storage_not_a_storage": (T(store=Op(b"K\x05")), "no storage"),
    "persistent_id_not_a_tuple": (Op(op("storage") + b"Q"), "not named as torch.save"),
    "persistent_id_a_list": (
        Op(op(["storage", name("torch", "FloatStorage"), "0", "cpu", 6]) + b"Q"),
        "storage is",
    ),
    "persistent_id_type_a_text": (
        Op(op(("storage", "FloatStorage", "0", "cpu", 6)) + b"Q"),
        "not named as torch.save",
    ),
    "persistent_id_key_a_path": (T(store=storage(key="../../secret")), "is missing"),
    "offset_negative": (T(offset=-1), "negative offset"),
    "offset_beyond": (T(offset=1), "needs 28 bytes"),
    "offset_of_empty_beyond": (T((0,), (1,), 2**62), "needs"),
    "dimension_negative": (T((-2, 3)), "negative shape"),
    "stride_negative": (T(stride=(-3, 1)), "negative stride"),
    "stride_absurd": (T(stride=(2**62, 1)), "needs"),
    "shape_absurd": (T((2**62,), (1,)), "absurd shape"),
    "shape_absurd_expanded": (T((2**40,), (0,)), "absurd shape"),
    "shape_absurd_empty": (T((0, 2**62, 2**62), (0, 0, 0)), "absurd shape"),
    "shape_of_many_dimensions": (T((1,) * 65, (1,) * 65), "65 dimensions"),
    "shape_and_stride_disagree": (T((2, 3), (1,)), "1 strides"),
    "shape_of_floats": (T((2.0, 3)), "whole numbers"),
    "shape_not_a_tuple": (T(shape=6, stride=1), "whole numbers"),
    # broken and hostile archives
    "zip_truncated": (lambda p: cut(write_zip(p, T()), 30), "cut short"),
    "zip_only_its_head": (lambda p: written(p, write_zip(p, T()).read_bytes()[:60]), "cut short"),
    "zip_path_traversal": (
        lambda p: write_zip(p, T(), members=[("archive/../../x", b"")]),
        "archive/../../x",
    ),
    "zip_absolute_path": (lambda p: write_zip(p, T(), members=[("/etc/x", b"")]), "called /etc/x"),
    "zip_backslashes": (lambda p: write_zip(p, T(), members=[("..\\x", b"")]), "called ..\\"),
    "zip_duplicate_member": (duplicate, "two members archive/data/0"),
    "zip_two_pickles": (
        lambda p: write_zip(p, T(), members=[("other/data.pkl", program(1))]),
        "2 members */data.pkl",
    ),
    "zip_bomb_pickle": (
        lambda p: write_zip(p, bytes(2**24), compression=zipfile.ZIP_DEFLATED),
        "is compressed to",
    ),
    "zip_bomb_storage": (bomb, "is compressed to"),
    "zip_of_something_else": (other_zip, "0 members */data.pkl"),
    "zip_big_endian": (
        lambda p: write_zip(p, T(), members=[("archive/byteorder", b"big")]),
        "byte order big",
    ),
    # the legacy format
    "legacy_os_system": (lambda p: write_legacy(p, call("os", "system", CANARY)), "os.system"),
    "legacy_hostile_first_pickle": (
        lambda p: written(p, program(call("os", "system", CANARY))),
        "os.system",
    ),
    "legacy_storage_longer_than_claimed": (
        lambda p: write_legacy(p, LEGACY, {"0": (2**62, SIX)}),
        "has 4611686018427387904 elements",
    ),
    "legacy_storage_negative": (
        lambda p: write_legacy(p, LEGACY, {"0": (-6, SIX)}),
        "has -6 elements",
    ),
    "legacy_truncated_storage": (
        lambda p: cut(write_legacy(p, LEGACY), 1),
        "expected 24 bytes, found 23",
    ),
    "legacy_truncated_header": (
        lambda p: cut(write_legacy(p, LEGACY), 28),
        "cut short before storage 0",
    ),
    "legacy_truncated_pickle": (lambda p: cut(write_legacy(p, LEGACY), 60), "ends inside"),
    "legacy_storage_missing": (
        lambda p: write_legacy(p, LEGACY, {}),
        "1 storages are missing",
    ),
    "legacy_storage_unknown": (
        lambda p: write_legacy(p, LEGACY, {"1": (6, SIX)}),
        "belongs to no tensor",
    ),
    "legacy_storage_twice": (
        lambda p: write_legacy(p, LEGACY, keys=["0", "0"]),
        "comes twice",
    ),
    "legacy_storage_view": (
        lambda p: write_legacy(p, T(more=(("9", 1, 2),))),
        "view of another",
    ),
    "legacy_big_endian": (lambda p: write_legacy(p, LEGACY, little=False), "big-endian"),
    "legacy_wrong_magic": (lambda p: written(p, program(1234) * 5), "not one of torch.save"),
    "plain_pickle": (lambda p: written(p, pickle.dumps({"a": [1]})), "not one of torch.save"),
    "pickle_of_an_object": (lambda p: written(p, pickle.dumps(Path("x"))), "refused"),
    # not PyTorch files
    "empty_file": (lambda p: written(p, b""), "is empty"),
    "text_file": (lambda p: written(p, b"<!DOCTYPE html>\n<html>"), "is text"),
    "wrong_magic": (lambda p: written(p, b"\x93NUMPY\x01\0" + bytes(99)), "begins with 93 4e"),
    "safetensors_named_pt": (lambda p: written(p, struct.pack("<Q", 2) + b"{}"), ".safetensors"),
    "tar_of_pytorch_0_1": (lambda p: written(p, b"x\0" + bytes(255) + b"ustar" + bytes(99)), "tar"),
    "no_such_file": (lambda p: p, "No such file"),
    "folder": (lambda p: p.mkdir() or p, "a folder"),
    "pipe": (lambda p: os.mkfifo(p) or p, "a device"),
}


def assert_one_line(path: Path, words: str, read=open_torch_file) -> None:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert words in message and message.startswith(str(path))
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 600


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_or_broken_file_is_one_line(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    path = content(path) if callable(content) else write_zip(path, content)
    before, modules = sorted(os.listdir(tmp_path)), set(sys.modules)
    assert_one_line(path, words)
    assert sorted(os.listdir(tmp_path)) == before, "something was run"
    assert set(sys.modules) == modules, "something was imported"


def test_the_canary_would_sing(tmp_path, monkeypatch):
    """Python's own unpickler runs the program that ours refuses."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(program(call("os", "system", CANARY)))
    assert (tmp_path / "canary").exists()


def test_file_that_changes_after_it_was_opened(tmp_path):
    path = write_zip(tmp_path / "a.pt", tensor())
    ref = open_torch_file(path)
    cut(path, 1)
    assert_one_line(path, "changed", lambda _: ref.read())
    path.unlink()
    assert_one_line(path, "No such file", lambda _: ref.read())


def test_random_damage_never_gives_another_error(tmp_path):
    """Bytes of good files are changed and cut at random: InputError, or a tree that reads."""
    rng = np.random.default_rng(0)
    value = {"a": tensor(), "b": built("argparse", "Namespace", {"x": [1, "two", 3.0]})}
    legacy = {"a": tensor(more=(None,)), "b": 1.5}
    good = [write_zip(tmp_path / "z", value), write_legacy(tmp_path / "l", legacy)]
    path, refused = tmp_path / "damaged.pt", 0
    for source in [p.read_bytes() for p in good]:
        for _ in range(400):
            data = bytearray(source)
            for position in rng.integers(len(data), size=rng.integers(1, 4)):
                data[position] = rng.integers(256)
            path.write_bytes(data[: rng.integers(4, len(data))] if rng.random() < 0.1 else data)
            try:
                for ref in read_state(path).values():
                    ref.read()
            except InputError as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
    assert refused > 250
