"""Whether what a pickle built is a plain tree of bounded size."""

from __future__ import annotations

import numpy as np

from ppflow_jax.convert.placeholder import Placeholder
from ppflow_jax.convert.tensors import Storage, TensorRef
from ppflow_jax.convert.torch_globals import KEYS, Constructor, StorageType, broken
from ppflow_jax.errors import InputError

_DEEPEST = 64
_MOST_NODES = 4_000_000
_LEAVES = (*KEYS, bytes, np.dtype, TensorRef, Placeholder, Constructor, StorageType, Storage)


def check_tree(tree: object) -> None:
    """InputError for cycles, bombs and what is not data.

    A few bytes can describe a tree of billions of nodes by repeating one list in the next:
    nodes are counted as a walk over the tree would meet them.
    """
    _check(tree, 0, {})


def _check(node: object, depth: int, seen: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Nodes and height of a tree that is `depth` levels down."""
    if isinstance(node, _LEAVES):
        return 1, 0
    if not isinstance(node, dict | list | tuple):
        raise broken(f"a value is a {type(node).__name__}")
    if id(node) not in seen:
        count, height = 1, 0
        for child in node.values() if isinstance(node, dict) else node:
            if depth < _DEEPEST:
                below, under = _check(child, depth + 1, seen)
                count, height = count + below, max(height, under + 1)
            else:
                height = _DEEPEST
        seen[id(node)] = count, height
    count, height = seen[id(node)]
    if depth + height > _DEEPEST:
        raise InputError(f"nested deeper than {_DEEPEST} levels or in itself; no checkpoint is")
    if count > _MOST_NODES:
        raise InputError(f"more than {_MOST_NODES} values by repetition; no checkpoint has them")
    return count, height
