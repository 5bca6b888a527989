"""What the pickle of a PyTorch file names, and the inert things those names stand for.

Nothing here is looked up in or imported from the file: a (module, name) pair is a key of a table,
and what is not in the table becomes a placeholder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppflow_jax.convert.placeholder import Placeholder, made_by, unreadable
from ppflow_jax.convert.tensors import (
    BFLOAT16,
    FLOAT8,
    STORAGES,
    UNUSUAL_STORAGES,
    TensorRef,
    shown,
    tensor_ref,
)
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
    """A name that is known; `call` takes the arguments, `holder` is what NEWOBJ makes."""

    name: str
    call: Callable[..., Any] | None = None
    holder: type[dict] | None = None


def broken(what: str) -> InputError:
    return InputError(f"the pickle inside is broken: {what}; download or save the file again")


def _view(storage, offset, size, stride, dtype=None) -> TensorRef | Placeholder:
    """A tensor, or what stands for it where a part of it is a placeholder."""
    if isinstance(storage, Placeholder):
        return unreadable(storage.what)
    numbers = (
        offset,
        *(part for group in (size, stride) if type(group) is tuple for part in group),
    )
    if foreign := [number for number in numbers if isinstance(number, Placeholder)]:
        return unreadable(f"a tensor with a shape {foreign[0].what}")
    return tensor_ref(storage, offset, size, stride, dtype)


def _tensor(storage, offset, size, stride) -> TensorRef | Placeholder:
    return _view(storage, offset, size, stride)


def _tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None):
    del requires_grad
    ref = _view(storage, offset, size, stride)
    return unreadable("a tensor with hooks or conjugate bits") if hooks or metadata else ref


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    del requires_grad
    if hooks or metadata:
        return unreadable("a tensor with hooks or conjugate bits")
    if not isinstance(dtype, np.dtype):
        return unreadable(
            f"a tensor of dtype {getattr(dtype, 'what', '').removeprefix('made by ')}"
        )
    return _view(storage, offset, size, stride, dtype)


def _parameter(data, requires_grad=True, hooks=(), state=None) -> TensorRef | Placeholder:
    """A parameter; the attributes in `state` are dropped."""
    del requires_grad, state
    if not isinstance(data, TensorRef | Placeholder):
        raise broken("a parameter is not made of a tensor")
    return unreadable("a parameter with hooks") if hooks else data


def _typed(function, kind, arguments, state) -> Any:
    """A tensor with attributes, which are dropped, or one of a subclass, which is not read."""
    del state
    if getattr(kind, "name", "") not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        name = getattr(kind, "what", type(kind).__name__).removeprefix("made by ")
        return unreadable(f"a tensor of the class {name}")
    if type(function) is not Constructor or function.call is None or type(arguments) is not tuple:
        return unreadable("a tensor of an unknown kind")
    return function.call(*arguments)


def _from_cpu(data, dtype, device, requires_grad) -> TensorRef | Placeholder:
    """A tensor of an accelerator that torch saves as its copy on the CPU."""
    del device, requires_grad
    same = isinstance(data, TensorRef) and data.dtype == dtype
    return data if same else unreadable("a tensor of another kind of device")


def _ordered(items=()) -> Ordered:
    made = Ordered()
    if isinstance(items, dict):
        made.update(items)
    elif type(items) not in (list, tuple) or any(
        type(item) not in (list, tuple) or len(item) != 2 for item in items
    ):
        raise TypeError("no pairs")
    else:
        fill(made, [part for item in items for part in item])
    return made


def _default(factory=None, items=()) -> Ordered:
    del factory
    return _ordered(items)


def _namespace() -> Attributes:
    return Attributes()


def _size(sizes=()) -> tuple:
    if type(sizes) is not tuple or any(type(n) is not int for n in sizes):
        raise TypeError("no whole numbers")
    return sizes


def _device(*parts) -> str:
    return ":".join(shown(part) for part in parts if type(part) in (str, int))


def _list(items) -> list:
    if type(items) is not list:
        raise TypeError("no list")
    return items


def _untagged(value, tag) -> Any:
    del tag
    return value


def fill(target: object, flat: list) -> None:
    """Sets [key, value, key, value, ...] in a dict; in a placeholder, nothing.

    A key that is no short text or number is replaced by a text such as <tuple 3>: hashing it
    could recurse, and long whole numbers can be made to collide in the hash table.
    """
    if isinstance(target, Placeholder):
        return
    if not isinstance(target, dict) or len(flat) % 2:
        raise broken("items are set on something that is not a dict")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        plain = type(key) in KEYS and not (type(key) is int and key.bit_length() > 60)
        target[key if plain else f"<{type(key).__name__} {len(target)}>"] = value


def make(made: object, arguments: object) -> Any:
    """What calling `made` gives: plain data, a tensor, or a placeholder; nothing is run.

    Raises:
      InputError: data is called, or a tensor does not lie in its storage.
    """
    if isinstance(made, Placeholder):
        return made
    if not isinstance(made, Constructor | StorageType):
        raise broken(f"a call of {type(made).__name__}")
    if isinstance(made, StorageType) or made.call is None or type(arguments) is not tuple:
        return made_by(made.name)
    try:
        return made.call(*arguments)
    except TypeError:
        return made_by(f"{made.name} with unfit arguments")


def _table(*constructors: Constructor) -> dict[tuple[str, str], Any]:
    return {tuple(made.name.rsplit(".", 1)): made for made in constructors}


_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (module, name): StorageType(name, dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in (STORAGES | UNUSUAL_STORAGES).items()
    },
    **{
        (m, "UntypedStorage"): StorageType("UntypedStorage", np.dtype("u1"))
        for m in ("torch", "torch.storage")
    },
    **{
        ("torch", name): np.dtype(name)
        for name in (
            *("float16", "float32", "float64", "complex64", "complex128"),
            *("int8", "int16", "int32", "int64", "uint8"),
        )
    },
    **{("torch", name): dtype for name, dtype in FLOAT8.items()},
    **{("torch", f"uint{bits}"): np.dtype(f"uint{bits}") for bits in (16, 32, 64)},
    ("torch", "bfloat16"): BFLOAT16,
    ("torch", "bool"): np.dtype("?"),
    **_table(
        Constructor("torch._utils._rebuild_tensor", _tensor),
        Constructor("torch._utils._rebuild_tensor_v2", _tensor_v2),
        Constructor("torch._utils._rebuild_tensor_v3", _tensor_v3),
        Constructor("torch._utils._rebuild_parameter", _parameter),
        Constructor("torch._utils._rebuild_parameter_with_state", _parameter),
        Constructor("torch._utils._rebuild_device_tensor_from_cpu_tensor", _from_cpu),
        Constructor("torch.nn.parameter.Parameter", _parameter),
        Constructor("torch._tensor._rebuild_from_type_v2", _typed),
        Constructor("torch.Tensor"),
        Constructor("torch.Size", _size),
        Constructor("torch.device", _device),
        Constructor("collections.OrderedDict", _ordered, Ordered),
        Constructor("collections.Counter", _ordered, Ordered),
        Constructor("collections.defaultdict", _default, Ordered),
        Constructor("builtins.dict", _ordered, Ordered),
        Constructor("argparse.Namespace", _namespace, Attributes),
        Constructor("types.SimpleNamespace", _namespace, Attributes),
    ),
}
# Tensors that are not dense arrays of numbers; everything else that is not in the table is an
# object of a class that nothing here knows.
_UNREADABLE = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (of the meta device)",
    "_rebuild_device_tensor_from_numpy": "a tensor of another kind of device",
    "_rebuild_wrapper_subclass": "a tensor of a wrapping class",
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
    """What `module.name` stands for; a placeholder if that is not in the table."""
    if not type(module) is type(name) is str:
        raise broken("a name is not made of text")
    found = _ALLOWED.get((module, name))
    if found is None and script:
        found = _SCRIPT_ALLOWED.get((module, name))
        if found is None and module.split(".")[0] == "__torch__":
            found = Constructor(shown(f"{module}.{name}"), holder=Attributes)
    if found is not None:
        return found
    if module == "torch._utils" and name in _UNREADABLE:
        return unreadable(_UNREADABLE[name])
    return made_by(f"{module}.{name}")
