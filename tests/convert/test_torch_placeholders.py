"""Objects and tensors that are not read: nothing runs, and only what is needed is an error."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from ppflow_jax.convert.placeholder import Placeholder
from ppflow_jax.convert.tensors import FLOAT8, TensorRef
from ppflow_jax.convert.torch_file import open_torch_file
from ppflow_jax.convert.weights_file import read_weights
from tests.convert.pickles import (
    CANARY,
    SIX,
    Op,
    assert_one_line,
    built,
    call,
    name,
    nothing_runs,
    op,
    program,
    storage,
    tensor,
    write_legacy,
    write_zip,
)

for codec in ("raw-unicode-escape", "cp437"):  # Python imports a codec when it is used first
    "".encode(codec)
LAYOUT = call("torch.serialization", "_get_layout", "torch.sparse_coo")
HOOKS = call("collections", "OrderedDict")
V2, V3 = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")


def newobj(module: str, attribute: str, *arguments, state=None) -> Op:
    made = name(module, attribute) + op(arguments) + b"\x81"
    return Op(made + (op(state) + b"b" if state is not None else b""))


# An object of the file, and what stands for it.
OBJECTS = {
    "os_system": (call("os", "system", CANARY), "os.system"),
    "posix_system": (call("posix", "system", CANARY), "posix.system"),
    "eval": (call("builtins", "eval", "open('canary','w')"), "builtins.eval"),
    "eval_of_python2": (call("__builtin__", "eval", "1"), "__builtin__.eval"),
    "getattr": (call("builtins", "getattr", 1, "real"), "builtins.getattr"),
    "torch_hub": (call("torch.hub", "load", "evil/repo", "x"), "torch.hub.load"),
    "popen": (call("subprocess", "Popen", ["touch", "canary"]), "subprocess.Popen"),
    "new_object_of_a_function": (newobj("os", "system", CANARY), "os.system"),
    "inst": (Op(b"(" + op(CANARY) + b"ios\nsystem\n"), "os.system"),
    "obj": (Op(b"(" + name("os", "system") + op(CANARY) + b"o"), "os.system"),
    "newobj_ex": (
        Op(name("os", "system") + op((CANARY,)) + op({"a": 1}) + b"\x92"),
        "os.system",
    ),
    "extension": (Op(b"\x82\x01"), "extension 1"),
    "extension_of_4_bytes": (Op(b"\x84\x01\0\0\0"), "extension 1"),
    "dotted": (
        Op(op("torch") + op("_utils._rebuild_tensor_v2.__globals__") + b"\x93)R"),
        "__globals__",
    ),
    "split_elsewhere": (
        Op(op("torch") + op("_utils._rebuild_tensor_v2") + b"\x93)R"),
        "torch._utils._rebuild_tensor_v2",
    ),
    "terminal_escapes": (Op(op("os\n\x1b[2J") + op("system") + b"\x93)R"), r"os\n\x1b[2J.system"),
    "whole_module": (built("models", "SiT", {"_modules": {"w": tensor()}}), "models.SiT"),
    "script_class_without_code": (built("__torch__", "Net", {"w": tensor()}), "__torch__.Net"),
    "numpy_scalar": (
        call(
            *("numpy.core.multiarray", "scalar", call("numpy", "dtype", "f8", 0, 1)),
            call("_codecs", "encode", "x", "latin1"),
        ),
        "numpy.core.multiarray.scalar",
    ),
    "numpy_array": (
        Op(
            call("numpy._core.multiarray", "_reconstruct", name("numpy", "ndarray"), (0,), b"b"[0])
            + op((1, (3,), call("numpy", "dtype", "f8", 0, 1), False, "bytes"))
            + b"b"
        ),
        "_reconstruct",
    ),
    "path": (call("pathlib", "PosixPath", "/", "data"), "pathlib.PosixPath"),
    "datetime": (call("datetime", "datetime", "\x07\xea"), "datetime.datetime"),
    "decimal": (call("decimal", "Decimal", "1.5"), "decimal.Decimal"),
    "partial": (
        Op(call("functools", "partial", name("torch", "Size")) + op((None, (), {}, None)) + b"b"),
        "functools.partial",
    ),
    "enum": (call("train", "Mode", 1), "train.Mode"),
    "omegaconf": (
        newobj("omegaconf.dictconfig", "DictConfig", state={"_content": {"lr": 1}}),
        "omegaconf.dictconfig.DictConfig",
    ),
    "config_dict": (
        newobj("ml_collections.config_dict", "ConfigDict", state={"_fields": {}}),
        "ConfigDict",
    ),
    "dict_with_items": (Op(newobj("addict", "Dict") + b"(" + op("a") + op(1) + b"u"), "addict"),
    "one_item": (Op(newobj("addict", "Dict") + op("a") + op(1) + b"s"), "addict.Dict"),
    "list_with_items": (Op(newobj("my", "List") + b"(" + op(1) + op(2) + b"e"), "my.List"),
    "set": (Op(b"\x8f(" + op(1) + op("a") + b"\x90"), "builtins.set"),
    "set_of_protocol_2": (call("builtins", "set", [1, 2]), "builtins.set"),
    "frozenset": (Op(b"(" + op(1) + op((2,)) + b"\x91"), "builtins.frozenset"),
    "complex_number": (call("builtins", "complex", 1.0, 2.0), "builtins.complex"),
    "storage_called": (call("torch", "FloatStorage", 9), "made by FloatStorage"),
    "unfit_arguments": (call("torch", "Size", 1, 2, 3), "torch.Size with unfit"),
    "ordered_dict_of_numbers": (call("collections", "OrderedDict", [1, 2]), "OrderedDict with"),
    "size_of_numpy_numbers": (call("torch", "Size", (call("numpy", "int64", 1),)), "torch.Size"),
}
# A tensor that is none of dense real numbers, and what the error calls it.
TENSORS = {
    "sparse": (
        call("torch._utils", "_rebuild_sparse_tensor", LAYOUT, (tensor(), tensor(), (9,), True)),
        "a sparse tensor",
    ),
    "quantized": (
        call(
            *("torch._utils", "_rebuild_qtensor", storage("QInt8Storage", "9", 0), 0, (0,), (1,)),
            *((name("torch", "per_tensor_affine"), 0.1, 0), False, HOOKS),
        ),
        "a quantized tensor",
    ),
    "meta": (
        call(
            *("torch._utils", "_rebuild_meta_tensor_no_storage", name("torch", "float32")),
            *((6,), (1,), False),
        ),
        "without data",
    ),
    "meta_storage": (
        tensor(
            store=Op(
                op(("storage", name("torch", "FloatStorage"), "9", "meta", 6)) + b"Q",
            )
        ),
        "without data",
    ),
    "hooks": (call(*V2, storage(), 0, (1,), (1,), False, {1: 2}), "hooks"),
    "conjugate": (call(*V2, storage(), 0, (1,), (1,), False, HOOKS, {"conj": True}), "conjugate"),
    "negative_bit": (call(*V2, storage(), 0, (1,), (1,), False, HOOKS, {"neg": True}), "bits"),
    "complex32": (
        call(*V3, storage(), 0, (1,), (1,), False, HOOKS, name("torch", "complex32")),
        "dtype torch.complex32",
    ),
    "scale_float8": (
        call(*V3, storage(), 0, (1,), (1,), False, HOOKS, name("torch", "float8_e8m0fnu")),
        "dtype torch.float8_e8m0fnu",
    ),
    "subclass": (
        call(
            *("torch._tensor", "_rebuild_from_type_v2", name(*V2), name("my", "Tensor")),
            *((storage(), 0, (1,), (1,), False, HOOKS), {}),
        ),
        "of the class my.Tensor",
    ),
    "unknown_storage": (tensor(store=storage("NewStorage", key="9")), "torch.NewStorage"),
    "offset_that_is_called": (tensor(offset=call("os", "getpid")), "os.getpid"),
    "shape_of_numpy_numbers": (tensor((call("numpy", "int64", 6),), (1,)), "numpy.int64"),
    "parameter_with_hooks": (
        call("torch._utils", "_rebuild_parameter", tensor(), True, {1: 2}),
        "hooks",
    ),
}
# Plain data that an older or stricter reader does not know.
DATA = {
    "constructor_as_value": name("argparse", "Namespace"),
    "storage_as_value": storage(),
    "attribute_on_ordered_dict": Op(HOOKS + op({"items": 1, "__class__": 2}) + b"b"),
    "attributes_of_a_namespace": built("argparse", "Namespace", {"__class__": 1, 1: 1}),
    "slots_of_a_namespace": built("argparse", "Namespace", (None, {"a": 1})),
    "simple_namespace": built("types", "SimpleNamespace", {"lr": 1}),
    "default_dict": call("collections", "defaultdict", name("builtins", "list")),
    "counter": call("collections", "Counter", {"a": 1}),
    "key_is_a_deep_tuple": Op(b"}N" + b"\x85" * 50 + b"Ns"),
    "key_is_an_enum": Op(b"}" + call("train", "Mode", 1) + b"Ns"),
    "keys_that_collide": {2**61 - 1 + (2**61 - 1) * k: k for k in range(1, 9)},
    "byte_array": Op(b"\x96" + (3).to_bytes(8, "little") + b"abc"),
    "state_of_a_generator": {"state": 2**127 + 1, "inc": -(2**130)},
    "numbers_as_text": Op(b"(I01\nI-7\nL12L\nF1.5\nVtext\nt"),
    "dict_opcode": Op(b"(" + op("a") + op(1) + b"d"),
    "dropped_values": Op(b"N20(NN10" + op(1)),
    "bytes_of_python2": Op(b"U\x02\xff\xfe"),
    "lone_surrogate": Op(b"X\x03\0\0\0\xed\xa0\x80"),
}


@pytest.fixture(params=["zip", "legacy"])
def read(request, tmp_path, monkeypatch):
    """Reads {"w": a plain tensor, "x": value}, and sees to it that nothing runs."""
    monkeypatch.chdir(tmp_path)

    def _read(value):
        path, tree = tmp_path / "a.pt", {"w": tensor(more=(None,)), "x": value}
        write_zip(path, tree) if request.param == "zip" else write_legacy(path, tree)
        with nothing_runs(tmp_path):
            found = open_torch_file(path)
        assert found["w"].read().tobytes() == SIX
        assert dict(read_weights(path).tensors)["w"].read().tobytes() == SIX
        return found["x"]

    return _read


@pytest.mark.parametrize(("value", "what"), OBJECTS.values(), ids=OBJECTS)
def test_object_is_inert(value, what, read, tmp_path):
    found = read(value)
    assert isinstance(found, Placeholder) and what in found.what and not found.tensor
    assert_one_line(write_zip(tmp_path / "root.pt", value), what)


@pytest.mark.parametrize(("value", "what"), TENSORS.values(), ids=TENSORS)
def test_tensor_is_an_error_only_where_it_is_needed(value, what, read):
    found = read(value)
    assert isinstance(found, Placeholder) and found.tensor
    message = str(found.error("blocks.0.mlp.fc1.bias"))
    assert message.startswith("blocks.0.mlp.fc1.bias is ") and what in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("value", DATA.values(), ids=DATA)
def test_data_is_read(value, read):
    assert not isinstance(read(value), Placeholder)


def test_values_of_data(read):
    found = read([DATA["numbers_as_text"], DATA["state_of_a_generator"], DATA["counter"]])
    assert found[0] == (True, -7, 12, 1.5, "text")
    assert found[1] == {"state": 2**127 + 1, "inc": -(2**130)} and found[2] == {"a": 1}


def test_view_of_a_storage_of_the_oldest_files(tmp_path):
    """The storage is skipped where it lies, so that those after it are found."""
    tree = {"x": tensor(store=storage(more=(("9", 1, 2),))), "w": tensor(store=storage(key="1"))}
    tree = {k: Op(bytes(v).replace(b"\x8a\x01\x06t", b"\x8a\x01\x06Nt")) for k, v in tree.items()}
    storages = {"0": (6, bytes(24)), "1": (6, SIX)}
    found = open_torch_file(write_legacy(tmp_path / "a.pt", tree, storages))
    assert found["x"].what == "a tensor on a view of a storage"
    assert found["w"].read().tobytes() == SIX


def test_whole_module_of_the_legacy_format(tmp_path):
    """torch.save kept its class with the source code, as a persistent id."""
    kind = Op(op(("module", name("models", "SiT"), "models.py", "import os")) + b"Q")
    path = write_legacy(tmp_path / "a.pt", {"m": Op(kind + b")\x81}b"), "w": tensor(more=(None,))})
    assert open_torch_file(path)["m"].what == "made by models.SiT"


@pytest.mark.parametrize("attribute", ["_rebuild_parameter_with_state", "_rebuild_from_type_v2"])
def test_parameter_with_attributes(attribute, read):
    if attribute == "_rebuild_parameter_with_state":
        value = call("torch._utils", attribute, tensor(more=(None,)), True, HOOKS, {"tag": 1})
    else:
        parts = (storage(more=(None,)), 0, (2, 3), (3, 1), False, HOOKS)
        value = call("torch._tensor", attribute, name(*V2), name("torch", "Tensor"), parts, {})
    found = read(value)
    assert isinstance(found, TensorRef) and found.read().tobytes() == SIX


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_bitwise(dtype, tmp_path):
    raw = Op(op(("storage", name("torch.storage", "UntypedStorage"), "0", "cpu", 24)) + b"Q")
    value = call(*V3, raw, 4, (2, 5), (5, 1), False, HOOKS, name("torch", dtype))
    ref = open_torch_file(write_zip(tmp_path / "a.pt", {"w": value}))["w"]
    assert ref.dtype == FLOAT8[dtype] and ref.read().tobytes() == SIX[4:14]


def test_complex_numbers_have_their_dtype(read):
    raw = call(*V3, storage(more=(None,)), 0, (3,), (1,), False, HOOKS, name("torch", "complex64"))
    np.testing.assert_array_equal(read(raw).read(), np.frombuffer(SIX, "c8"))


def test_what_a_placeholder_is_given_is_not_kept(tmp_path):
    """A thousand objects with a state of ten thousand bytes each are one placeholder."""
    state = b"B" + struct.pack("<I", 10_000) + bytes(10_000)
    many = name("my", "Class") + b"q\0" + b"0](" + (b"h\0)\x81" + state + b"b") * 1000 + b"e"
    path = write_zip(tmp_path / "a.pt", program(Op(many)))
    tracemalloc.start()
    found = open_torch_file(path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(found) == 1000 and len(set(map(id, found))) == 1 and kept < 2**20
