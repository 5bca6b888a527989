"""Any file of weights as one list of names and tensors that are read one at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ppflow_jax.convert.placeholder import Placeholder
from ppflow_jax.convert.safetensors_file import open_safetensors
from ppflow_jax.convert.shards import INDEX, read_shards
from ppflow_jax.convert.tensors import TensorRef, shown
from ppflow_jax.convert.torch_file import open_torch_file
from ppflow_jax.errors import InputError

Tensor = TensorRef | Placeholder


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
      tensors: by dotted path in the file (`ema.blocks.0.attn.qkv.weight`), unread; a path may occur
        twice, as in {"a": {"b.c": x}, "a.b": {"c": y}}. Objects that are no plain data are among
        them, as placeholders.
      arguments: of the training script, if the file has them.
    """

    tensors: list[tuple[str, Tensor]]
    arguments: dict[Any, Any] | Placeholder


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Opens a file, or all files of an index (`*.index.json`).

    A name that ends in .safetensors is read as such, every other as a PyTorch file; numbers and
    texts (epoch) are dropped. Raises InputError as `open_torch_file` and `read_shards` do, and if
    there are no tensors.
    """
    name, arguments = os.fspath(path), {}
    if name.endswith(INDEX):
        tensors = list(read_shards(name, lambda file: read_weights(file).tensors).items())
    elif name.endswith(".safetensors"):
        tensors = list(open_safetensors(name).items())
    else:
        tree = open_torch_file(name)
        if isinstance(tree, Placeholder):
            raise InputError(f"{name}: {tree.error('the file')}")
        tensors = []
        _flatten("", tree, tensors)
        found = tree.get("args") if isinstance(tree, dict) else None
        arguments = found if isinstance(found, dict | Placeholder) else {}
    if not tensors:
        raise InputError(f"{name}: has no tensors; expected a checkpoint")
    return Weights(tensors, arguments)


def read_state(path: str | os.PathLike[str]) -> dict[str, TensorRef]:
    """The tensors of a file by name.

    Raises:
      InputError: as `read_weights`, and if two tensors have the same name.
    """
    refs: dict[str, TensorRef] = {}
    for name, tensor in read_weights(path).tensors:
        if isinstance(tensor, TensorRef) and refs.setdefault(name, tensor) is not tensor:
            raise InputError(f"{path}: two tensors are called {shown(name)}; rename one")
    return refs


def _flatten(prefix: str, node: Any, tensors: list[tuple[str, Tensor]]) -> None:
    if isinstance(node, Tensor):
        tensors.append((prefix, node))
    elif isinstance(node, dict | list | tuple):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            _flatten(f"{prefix}.{key}" if prefix else str(key), child, tensors)
