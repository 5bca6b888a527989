"""A SiT of another paper's reference file, its taps, and rows with the bounds of its README."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.load import from_torch
from ppflow_jax.models.conditions import split
from ppflow_jax.models.network import Output, PPFlow, make_apply
from ppflow_jax.models.patch import positions
from ppflow_jax.models.stack import Taps
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def nchw(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, -3)


def close(
    ref: Reference, name: str, ours: Any, bound: float, relative: float = np.inf
) -> Iterator[Row]:
    """Ours beside the array of that name, if it is there: `bound` times max(1, largest value).

    Nor more than `relative` times the largest value, for what is small. Whole numbers and booleans
    must be equal.
    """
    if name not in ref:
        return
    theirs, ours = ref[name], np.asarray(ours)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    text = f"{ref.name} {name}"
    if theirs.dtype.kind in "biu":
        yield Row(text, int(np.sum(ours != theirs)), 0, "differ")
        return
    error = np.max(np.abs(np.float64(ours) - np.float64(theirs)))
    largest = float(np.max(np.abs(theirs)))
    yield Row(text, float(error), min(bound * max(1.0, largest), relative * largest))


def gradient_rows(
    ref: Reference, prefix: str, tensors: dict[str, np.ndarray], bound: float
) -> Iterator[Row]:
    """Gradients by PyTorch name."""
    for name, ours in tensors.items():
        yield from close(ref, f"{prefix}/{name}", ours, bound, 1e-4)


class Sit:
    """The model of a file, read as a file of weights is; its time stays that of its authors."""

    def __init__(self, ref: Reference, heads: int, others: tuple[str, ...] = ()):
        """`others`: beginnings of the names of tensors that are not SiT's."""
        state = ref.below("model")
        self.others = {k: v for k, v in state.items() if k.startswith(others or ("\0",))}
        self.state = {k: v for k, v in state.items() if k not in self.others}
        self.config = find_config(self.state, "sit", heads=heads)
        self.params = jax.tree.map(jnp.asarray, from_torch(self.config, self.state))
        self.apply = make_apply(self.config)

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def __call__(self, params: Any, x: jax.Array, t: jax.Array, y: jax.Array, taps: Taps) -> Output:
        return self.apply(params, (x,), (t,), (y,), (0,), taps=taps)[0]

    def parts(self, x: jax.Array, t: jax.Array, y: jax.Array, h: jax.Array) -> dict[str, jax.Array]:
        """What stands around the blocks, of which the last gives h.

        `out` has the channels of variance, if there are such.
        """
        make = lambda: PPFlow(self.config, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
        graph, _ = nnx.split(nnx.eval_shape(make))
        model = self.config
        position = positions(model.pyramid, 0, model.latent_size, model.width)

        def run(params, x, t, y, h):
            network: PPFlow = nnx.merge(graph, params)
            (c,) = network.embeddings((t,), (split((), y),), (0,))
            final = network.final(h, jax.nn.silu(c), 0)
            side, rest = model.latent_size, final.shape[-1]
            p = model.pyramid.stages[0].patch[0]
            out = final.reshape(len(x), side // p, side // p, p, p, rest // p**2)
            return {
                "tokens": network.tokens(x, 0, split((), y)) - jnp.asarray(position)[None],
                "t_embed": network.time(t),
                "y_embed": network.label(y),
                "final_tokens": final,
                "out": out.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), side, side, -1),
            }

        return jax.jit(run)(self.params, x, t, y, h)


def projector(tensors: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """Leaves of our projector from the tensors `name`.0, .2 and .4."""
    return {
        f"fc{i}": {
            "kernel": jnp.asarray(tensors[f"{name}.{2 * i - 2}.weight"].T),
            "bias": jnp.asarray(tensors[f"{name}.{2 * i - 2}.bias"]),
        }
        for i in (1, 2, 3)
    }


def projector_tensors(leaves: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    """And back."""
    found = {}
    for i in (1, 2, 3):
        found[f"{name}.{2 * i - 2}.weight"] = np.asarray(leaves[f"fc{i}"]["kernel"]).T
        found[f"{name}.{2 * i - 2}.bias"] = np.asarray(leaves[f"fc{i}"]["bias"])
    return found
