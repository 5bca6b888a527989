"""What of a file of weights is converted: the tensors of one model by the names of its code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppflow_jax.convert.known import NO_WEIGHTS, OWNERS, WRAPPERS, is_ema
from ppflow_jax.convert.names import Choice, NoModel, Wanted, choose
from ppflow_jax.convert.placeholder import Placeholder
from ppflow_jax.convert.tensors import FLOAT8, TensorRef, shown
from ppflow_jax.convert.weights_file import Tensor, read_weights
from ppflow_jax.errors import InputError

_SCALES = re.compile(
    r"(.*\.)?(scale_weight|weight_scale(_inv)?|scale_input|input_scale|scaled_fp8)"
)
_ENTRIES = OWNERS | WRAPPERS | {"state_dict", "model_state_dict", "params"}
_EXTRA = "_extra_state"  # what modules keep for themselves, as objects


@dataclass(frozen=True)
class Source:
    """The tensors to convert, unread, and what else the file has.

    Attributes:
      state: by PyTorch name, without prefixes and wrappers.
      family: sit (and PPFlow), vae, taesd or inception.
      entry: prefix of the names in the file; "" for a bare state dict.
      left_out: what is not converted, with the number of tensors; 0 for an object.
      removed: wrappers that were removed from names.
      widened: tensors of 8-bit floating-point numbers, which become float32.
      arguments: of the training script, if the file has them.
    """

    path: str
    state: Mapping[str, Any]
    family: str
    entry: str
    left_out: Mapping[str, int]
    removed: list[str]
    widened: int
    arguments: Mapping[Any, Any] | Placeholder

    def argument(self, name: str) -> str | None:
        """An argument of the training script in lower case; None where it is not known."""
        value = self.arguments.get(name) if isinstance(self.arguments, Mapping) else None
        return value.lower() if isinstance(value, str) and value else None


@dataclass(frozen=True)
class Float32:
    """A tensor of 8-bit floating-point numbers that is read as float32, which holds them all."""

    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("f4")

    def read(self) -> np.ndarray:
        """See `TensorRef.read`."""
        return self.ref.read().astype(np.float32)


def open_source(path: str, wanted: Wanted | None = None) -> Source:
    """Opens a file and finds the model that is wanted (default: the only one, or the EMA).

    Raises:
      InputError: not readable, no model or several, two tensors of one name, a tensor of the model
        that cannot be read.
    """
    wanted = wanted or Wanted()
    weights = read_weights(path)
    tensors = weights.tensors
    try:
        choice = choose([name for name, _ in tensors], wanted)
    except NoModel as error:
        raise InputError(f"{path}: {_hiding(tensors, wanted) or error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        state = _state(tensors, choice)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    widened = sum(isinstance(ref, Float32) for ref in state.values())
    return Source(
        path,
        state,
        choice.family,
        choice.prefix,
        _left_out(tensors, choice),
        choice.removed,
        widened,
        weights.arguments,
    )


def _hiding(tensors: list[tuple[str, Tensor]], wanted: Wanted) -> InputError | None:
    """What to say where the model that is not found may be in an object that is not read."""
    path = wanted.path
    objects = {
        tuple(name.split(".")): tensor
        for name, tensor in tensors
        if isinstance(tensor, Placeholder) and not tensor.tensor
    }
    if wanted.weights == "ema":
        found = [parts for parts in objects if is_ema(parts)]
    elif path:
        found = [parts for parts in objects if path[: len(parts)] == parts or parts[:-1] == path]
    elif any(isinstance(t, TensorRef) and n.split(".")[0] not in NO_WEIGHTS for n, t in tensors):
        found = []
    else:  # no weights at all: whole modules were saved
        found = sorted(objects, key=lambda parts: not (is_ema(parts) or parts[-1] in _ENTRIES))
    return objects[found[0]].error(".".join(found[0])) if found else None


def _state(tensors: list[tuple[str, Tensor]], choice: Choice) -> dict[str, TensorRef | Float32]:
    """The tensors of the model by name, every one of which can be read."""
    state: dict[str, TensorRef] = {}
    origin: dict[str, str] = {}
    for index, name in choice.names:
        theirs, tensor = tensors[index]
        if _SCALES.fullmatch(name):
            raise InputError(
                f"{shown(theirs)} is a scale: scaled float8 is not supported; multiply every "
                "weight by its scale and save it as float16, bfloat16 or float32"
            )
        if isinstance(tensor, Placeholder):
            if name.endswith(_EXTRA):
                continue
            raise tensor.error(theirs)
        if name in state and not _same(state[name], tensor):
            raise InputError(
                f"{shown(origin[name])} and {shown(theirs)} would both be {shown(name)}: say which "
                "with --entry or --prefix"
            )
        state[name], origin[name] = tensor, theirs
    float8 = FLOAT8.values()
    return {name: Float32(ref) if ref.dtype in float8 else ref for name, ref in state.items()}


def _same(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors are one view of one storage, as tied weights are."""
    return (a.storage, a.dtype, a.shape, a.stride, a.offset) == (
        *(b.storage, b.dtype, b.shape, b.stride, b.offset),
    )


def _left_out(tensors: list[tuple[str, Tensor]], choice: Choice) -> dict[str, int]:
    """How many tensors there are under each name that is left out; 0 for one object."""
    objects = {
        name: shown(f"{name}: {tensor.what}")
        for name, tensor in tensors
        if isinstance(tensor, Placeholder)
    }
    found = Counter()
    for name, count in choice.left_out.items():
        found[objects.get(name, name)] = 0 if name in objects else count
    return dict(found)
