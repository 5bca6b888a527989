"""What the pickle of a PyTorch file may name, and the inert things those names stand for.

Nothing here is looked up in or imported from the file: a (module, name) pair is a key of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppflow_jax.convert.tensors import BFLOAT16, STORAGES, TensorRef, shown, tensor_ref
from ppflow_jax.errors import InputError

KEYS = (str, int, float, bool, type(None))  # their hashes cannot recurse


class Attributes(dict):
    """What an object of the file had as attributes; the object itself is never made."""


class Ordered(dict):
    """A collections.OrderedDict; the `_metadata` attribute of a state dict is dropped."""


@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and its like; untyped bytes are uint8."""

    name: str
    dtype: np.dtype


@dataclass(frozen=True)
class Constructor:
    """A name the file may use; `call` takes the arguments, `holder` is what NEWOBJ makes."""

    name: str
    call: Callable[..., Any] | None = None
    holder: type[dict] | None = None


def refused(what: str) -> InputError:
    return InputError(
        f"refused: the file asks for {what}, which is no tensor, plain container or "
        "argparse.Namespace, and nothing from a file is run; expected a checkpoint of state dicts: "
        "where you trust the file, save only those again with torch.save"
    )


def broken(what: str) -> InputError:
    return InputError(f"the pickle inside is broken: {what}; download or save the file again")


def _tensor(storage, offset, size, stride) -> TensorRef:
    return tensor_ref(storage, offset, size, stride)


def _tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> TensorRef:
    del requires_grad
    if hooks or metadata:
        raise InputError("a tensor carries hooks or conjugate/negative bits; save plain tensors")
    return tensor_ref(storage, offset, size, stride)


def _tensor_v3(
    storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None
) -> TensorRef:
    del requires_grad
    if hooks or metadata or not isinstance(dtype, np.dtype):
        raise InputError("a tensor carries hooks, bits or no dtype; save plain tensors")
    return tensor_ref(storage, offset, size, stride, dtype)


def _parameter(data, requires_grad, hooks) -> TensorRef:
    del requires_grad
    if hooks or not isinstance(data, TensorRef):
        raise InputError("a parameter is not a plain tensor; save a state dict of tensors")
    return data


def _ordered(items=()) -> Ordered:
    made = Ordered()
    if type(items) not in (list, tuple) or any(
        type(item) not in (list, tuple) or len(item) != 2 for item in items
    ):
        raise broken("an OrderedDict is not made of pairs")
    fill(made, [part for item in items for part in item])
    return made


def _size(sizes=()) -> tuple:
    if type(sizes) is not tuple or any(type(n) is not int for n in sizes):
        raise broken("a torch.Size is not made of whole numbers")
    return sizes


def _device(*parts) -> str:
    return ":".join(shown(part) for part in parts if type(part) in (str, int))


def _list(items) -> list:
    if type(items) is not list:
        raise broken("a typed list is not a list")
    return items


def _untagged(value, tag) -> Any:
    del tag
    return value


def fill(target: object, flat: list) -> None:
    """Sets [key, value, key, value, ...] in a dict; InputError for keys that no state dict has."""
    if not isinstance(target, dict) or len(flat) % 2:
        raise broken("items are set on something that is not a dict")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        # Longer whole numbers can be made to collide in the hash table by the million.
        if type(key) not in KEYS or (type(key) is int and key.bit_length() > 60):
            raise InputError(
                f"a dict has a key of type {type(key).__name__}; expected strings or small "
                "numbers: save only the state dicts again with torch.save"
            )
        target[key] = value


def _table(*constructors: Constructor) -> dict[tuple[str, str], Any]:
    return {tuple(made.name.rsplit(".", 1)): made for made in constructors}


_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch", name): StorageType(name, dtype) for name, dtype in STORAGES.items()},
    **{
        (m, "UntypedStorage"): StorageType("UntypedStorage", np.dtype("u1"))
        for m in ("torch", "torch.storage")
    },
    **{
        ("torch", name): np.dtype(name)
        for name in "float16 float32 float64 int8 int16 int32 int64 uint8".split()
    },
    **{("torch", f"uint{bits}"): np.dtype(f"uint{bits}") for bits in (16, 32, 64)},
    ("torch", "bfloat16"): BFLOAT16,
    ("torch", "bool"): np.dtype("?"),
    **_table(
        Constructor("torch._utils._rebuild_tensor", _tensor),
        Constructor("torch._utils._rebuild_tensor_v2", _tensor_v2),
        Constructor("torch._utils._rebuild_tensor_v3", _tensor_v3),
        Constructor("torch._utils._rebuild_parameter", _parameter),
        Constructor("torch.Size", _size),
        Constructor("torch.device", _device),
        Constructor("collections.OrderedDict", _ordered, Ordered),
        Constructor("argparse.Namespace", Attributes, Attributes),
    ),
}
# Only in a TorchScript archive; its classes (`__torch__...`) become Attributes as well.
_SCRIPT_ALLOWED = _table(
    *(
        Constructor(f"torch.jit._pickle.build_{kind}list", _list)
        for kind in ("int", "double", "bool", "tensor")
    ),
    Constructor("torch.jit._pickle.restore_type_tag", _untagged),
)


def find_global(module: object, name: object, script: bool) -> Any:
    """What `module.name` stands for; InputError with its full name if it is not allowed."""
    if not type(module) is type(name) is str:
        raise broken("a name is not made of text")
    found = _ALLOWED.get((module, name))
    if found is None and script:
        found = _SCRIPT_ALLOWED.get((module, name))
        if found is None and module.split(".")[0] == "__torch__":
            found = Constructor(shown(f"{module}.{name}"), holder=Attributes)
    if found is None:
        raise refused(shown(f"{module}.{name}"))
    return found
