"""What a part says of its leaves: shardings, PyTorch names, places for adapters; and its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

Leaves = dict[str, Any]
# What a part gives besides its output, by name
Aux = dict[str, Array]
# Pattern of paths such as `blocks/fc1/kernel`, and the mesh axes of such a leaf, depth first
Rule = tuple[str, P]
# Pattern of paths, and the axes of inputs and of outputs of the matrices that such a leaf holds
Matrix = tuple[str, tuple[int, ...], tuple[int, ...]]


def _same(x: np.ndarray) -> np.ndarray:
    return x


class Key(NamedTuple):
    """A tensor of the PyTorch code, and where it is in our leaves.

    Attributes:
      torch: its name.
      path: of our leaf.
      index: of its layer, and of its expert, in the leading axes of our leaf.
      ours, theirs: into our layout and back; bijections of the elements.
    """

    torch: str
    path: tuple[str | int, ...]
    index: tuple[int, ...] = ()
    ours: Callable[[np.ndarray], np.ndarray] = _same
    theirs: Callable[[np.ndarray], np.ndarray] = _same


class Site(NamedTuple):
    """A linear map of the network, beside whose kernel adapters may stand.

    Attributes:
      name: as the patterns of adapters have it, such as `blocks/fc1`.
      module: path of the module with its leaves; those below `blocks` have an axis of depth.
      inputs: width of what enters; 0 where only a scale is possible, because there is no kernel.
      outputs: shape of what leaves for one row.
      rows: of one image: `attention` and `mlp` (tokens that enter that branch) or `image` (one).
      stage: the only stage that computes it; None: all.
      prefix: of the names of its leaves.
    """

    name: str
    module: tuple[str | int, ...]
    inputs: int
    outputs: tuple[int, ...]
    rows: str
    stage: int | None = None
    prefix: str = ""


def linear_keys(torch: str, *path: str | int, index: tuple[int, ...] = ()) -> Iterator[Key]:
    """Weight and bias of a linear layer."""
    yield Key(f"{torch}.weight", (*path, "kernel"), index, np.transpose, np.transpose)
    yield Key(f"{torch}.bias", (*path, "bias"), index)


def _text(value: Any) -> str:
    return "/".join(map(_text, value)) if isinstance(value, tuple) else str(value).lower()


@dataclass(frozen=True)
class Described:
    """What configurations and checkpoints have as text: `kind:field=value,...`.

    Attributes:
      kind: its name there.
    """

    kind: ClassVar[str]

    def __str__(self) -> str:
        pairs = (f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self))
        return ":".join(filter(None, (self.kind, ",".join(pairs))))
