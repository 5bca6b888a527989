"""Every broken or hostile PyTorch file is one clear line, and nothing in it is run."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ppflow_jax.convert.torch_file import open_torch_file
from ppflow_jax.convert.weights_file import read_state
from ppflow_jax.errors import InputError
from tests.convert.pickles import (
    CANARY,
    SIX,
    Op,
    assert_one_line,
    built,
    call,
    cut,
    name,
    nothing_runs,
    op,
    program,
    storage,
    tensor,
    write_legacy,
    write_zip,
    written,
)


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
    "text_persistent_id": (b"P/etc/passwd\n.", "opcode PERSID"),
    "stack_global_of_numbers": (b"\x80\x04NN\x93.", "not made of text"),
    "build_on_tensor": (Op(T() + op({"read": 1}) + b"b"), "attributes are set on a TensorRef"),
    "build_on_constructor": (
        Op(name("torch._utils", "_rebuild_tensor_v2") + op({"call": 1}) + b"b"),
        "attributes are set on a Constructor",
    ),
    "call_of_data": (Op(op({"a": 1}) + b")R"), "a call of dict"),
    # broken pickles
    "pickle_truncated": (program(T())[:-9], "ends inside a name"),
    "pickle_empty": (b"", "ends early"),
    "pickle_stack_underflow": (b"\x80\x02\x85.", "not made"),
    "pickle_memo_missing": (b"\x80\x02h\x07.", "not made"),
    "pickle_without_mark": (b"\x80\x02t.", "not made"),
    "pickle_bad_utf8": (b"\x80\x02X\x02\0\0\0\xff\xfe.", "UTF-8"),
    "pickle_append_to_dict": (b"\x80\x02}Na.", "appended"),
    "pickle_items_on_list": (b"\x80\x02]NNs.", "not a dict"),
    "huge_binunicode8": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "ends early"),
    "huge_binbytes8": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.", "ends early"),
    "huge_long4": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "whole number"),
    "negative_long4": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x.", "whole number"),
    "huge_memo_index": (b"\x80\x02Nr\xff\xff\xff\x7fh\0.", "not made"),
    "recursion_bomb_tuples": (deep(b"\x85"), "nested deeper"),
    "recursion_bomb_lists": (b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b".", "nested deeper"),
    "list_in_itself": (b"\x80\x02]q\0h\0a.", "in itself"),
    "billion_laughs": (laughs(), "repetition"),
    # tensors that do not fit
    "storage_missing": (lambda p: write_zip(p, T(), {}), "data/0 is missing"),
    "storage_short": (lambda p: write_zip(p, T(), {"0": SIX[:-1]}), "expected 24 bytes, found 23"),
    "storage_claims_less": (T(store=storage(numel=5)), "needs 24 bytes"),
    "storage_claims_2_to_60": (T(store=storage(numel=2**60)), "claims 115292"),
    "storage_claims_negative": (T(store=storage(numel=-6)), "claims -6"),
    "member_size_lies": (huge_member, "shorter than"),
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
    "legacy_hostile_first_pickle": (
        lambda p: written(p, program(call("os", "system", CANARY))),
        "not one of torch.save",
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
    "legacy_big_endian": (lambda p: write_legacy(p, LEGACY, little=False), "big-endian"),
    "legacy_wrong_magic": (lambda p: written(p, program(1234) * 5), "not one of torch.save"),
    "plain_pickle": (lambda p: written(p, pickle.dumps({"a": [1]})), "not one of torch.save"),
    "pickle_of_an_object": (
        lambda p: written(p, pickle.dumps(Path("x"))),
        "not one of torch.save",
    ),
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


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_or_broken_file_is_one_line(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    path = content(path) if callable(content) else write_zip(path, content)
    with nothing_runs(tmp_path):
        assert_one_line(path, words)


@pytest.mark.parametrize(
    ("limit", "content", "words"),
    [
        ("torch_pickle._MOST_OPCODES", b"\x80\x02" + b"N0" * 200 + b"N.", "more than 100 opcodes"),
        ("torch_file._LONGEST_PICKLE", b"\x80\x02N." + bytes(97), "expected at most 100"),
    ],
)
def test_pickle_beyond_a_limit(limit, content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(f"ppflow_jax.convert.{limit}", 100)
    assert_one_line(write_zip(tmp_path / "a.pt", content), words)


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
