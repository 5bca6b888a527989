"""REPA (arXiv 2410.06940): tokens of one block are drawn to the features of a pretrained network.

The tokens h after a block pass a projector P of three linear layers with SiLU between them. The
term is minus the cosine of P(h) and the teacher's features at the same place, mean over tokens and
over teachers. Teachers see the whole picture on one grid: for a stage of larger patches their
features are averaged over its cells before they are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.terms import View
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Output
from ppflow_jax.models.stack import Taps

LAYERS = ("fc1", "fc2", "fc3")
SMALLEST = 1e-12  # a shorter vector is divided by this
_xavier = jax.nn.initializers.xavier_uniform()


@dataclass(frozen=True)
class Repa:
    """The term.

    Attributes:
      layer: whose output is projected, counted from 1.
      dims: features of each teacher.
      hidden: width of the projector.
      fields: of the batch, one for each teacher: [b, rows, columns, dim] of any float dtype.

    Raises:
      InputError: sizes below 1, or not one field for every dim.
    """

    layer: int = 8
    dims: tuple[int, ...] = (768,)
    hidden: int = 2048
    fields: tuple[str, ...] = ("teacher",)

    name = "repa"

    def __post_init__(self):
        if min(self.layer, self.hidden, *self.dims, len(self.dims)) < 1:
            raise InputError(f"repa: layer, hidden and dims must be at least 1, got {self}")
        if len(self.dims) != len(self.fields) or len(set(self.fields)) != len(self.fields):
            raise InputError(
                f"repa: dims {self.dims} and fields {self.fields} must have one entry for each "
                "teacher"
            )

    @property
    def taps(self) -> Taps:
        return Taps(h=(self.layer,))

    def init(self, model: ModelConfig, key: Array) -> dict[str, Any]:
        """A projector of every field: Xavier-uniform kernels, biases 0; float32.

        Raises:
          InputError: the model does not have the layer.
        """
        if self.layer > model.depth:
            raise InputError(
                f"repa: layer {self.layer} of a model with {model.depth} blocks: choose 1 to "
                f"{model.depth}"
            )
        keys = jax.random.split(key, len(self.fields))
        sizes = [(model.width, self.hidden, self.hidden, dim) for dim in self.dims]
        return {field: _projector(*pair) for field, *pair in zip(self.fields, sizes, keys)}

    def __call__(self, own: Mapping[str, Any], out: Output, view: View) -> Float[Array, " b"]:
        """-1 where P(h) points where the teacher's features point, at most 1.

        Raises:
          InputError: a field of another shape.
        """
        h = out.taps[f"h/{self.layer}"]
        losses = []
        for field, dim in zip(self.fields, self.dims):
            teacher = view.batch[field]
            if teacher.ndim != 4 or teacher.shape[-1] != dim:
                raise InputError(
                    f"repa: field {field} has shape {teacher.shape[1:]} for an example, expected "
                    f"(rows, columns, {dim}): set dims to the features of the field"
                )
            losses.append(alignment(project(own[field], h), pooled(teacher, view.grid)))
        return sum(losses) / len(losses)


def _projector(sizes: tuple[int, ...], key: Array) -> dict[str, Any]:
    keys = jax.random.split(key, len(LAYERS))
    shapes = zip(sizes[:-1], sizes[1:])
    return {
        name: {"kernel": _xavier(k, shape, jnp.float32), "bias": jnp.zeros(shape[1])}
        for name, k, shape in zip(LAYERS, keys, shapes)
    }


def project(projector: Mapping[str, Any], h: Float[Array, "b n d"]) -> Float[Array, "b n z"]:
    """Linear, SiLU, linear, SiLU, linear, in float32."""
    x = h.astype(jnp.float32)
    for name in LAYERS:
        x = x @ projector[name]["kernel"] + projector[name]["bias"][None, None]
        x = jax.nn.silu(x) if name != LAYERS[-1] else x
    return x


def alignment(
    projected: Float[Array, "b n z"], teacher: Float[Array, "b n z"]
) -> Float[Array, " b"]:
    """Minus the cosine, mean over tokens; nothing flows into the teacher."""
    cosine = jnp.sum(_unit(projected) * _unit(jax.lax.stop_gradient(teacher)), axis=-1)
    return -jnp.mean(cosine, axis=-1)


def _unit(x: Array) -> Array:
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, SMALLEST**2))


def pooled(z: Float[Array, "b r c z"], grid: tuple[int, int]) -> Float[Array, "b n z"]:
    """Means over the cells of another grid (rows, columns), as tokens in float32.

    A cell takes every entry by the area of it that lies inside; so grids need not divide each
    other, and of a finer grid every cell gets the entry that it lies in.
    """
    z = z.astype(jnp.float32)
    if z.shape[1:3] != grid:
        rows, columns = (jnp.asarray(shares(*pair)) for pair in zip(grid, z.shape[1:3]))
        z = jnp.einsum("Rr,Cc,brcz->bRCz", rows, columns, z)
    return z.reshape(len(z), -1, z.shape[-1])


def shares(cells: int, size: int) -> Float[np.ndarray, "cells size"]:
    """How much of each of `cells` equal parts of an axis each of `size` equal parts covers.

    Rows sum to 1, columns to cells / size.
    """
    ends = np.arange(1, cells + 1)[:, None] * size, np.arange(1, size + 1)[None] * cells
    begins = ends[0] - size, ends[1] - cells
    overlap = np.minimum(*ends) - np.maximum(*begins)  # in parts of 1 / (cells size)
    return (np.maximum(overlap, 0) / size).astype(np.float32)
