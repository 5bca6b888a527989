"""The stack of blocks, in one pass for all stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import is_gather
from ppflow_jax.models.layers import Block
from ppflow_jax.models.parts import Aux, Execution

Params = dict[str, Any]

REMAT_POLICIES = {
    # All but the weights gathered by `Layout.weights`: kept for the backward pass, they would be
    # the whole network on every device.
    "none": lambda operation, *inputs, **params: not is_gather(operation, *inputs, **params),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class Stack:
    """Blocks one after another.

    Attributes:
      blocks: one Block whose leaves have a leading axis of depth.
      layers: the parameters of every block instead, from `unstacked`; else empty.
    """

    blocks: Block
    layers: tuple[Params, ...]
    run: Execution
    remat: str

    def leaves(self, name: str) -> Params:
        """Those of one module of the blocks, with an axis of depth."""
        if self.layers:
            return jax.tree.map(lambda *each: jnp.stack(each), *(p[name] for p in self.layers))
        return nnx.to_pure_dict(nnx.state(getattr(self.blocks, name)))

    def __call__(
        self,
        hs: tuple[Float[Array, "_ _ d"], ...],
        cs: tuple[Float[Array, "_ d"], ...],
        signals: tuple[Any, ...],
    ) -> tuple[tuple[Float[Array, "_ _ d"], ...], tuple[Aux, ...]]:
        """Tokens of every stage, and what the parts give, with a leading axis of depth.

        Several stages pass a block side by side, each with its own token count, so that its
        weights are gathered, and their gradients summed over a mesh, once for all of them. Each of
        `cs` is already SiLU(c), each of `signals` what the blocks' wrap has for it, or None.
        """

        def body(hs, layer):
            block, signals = layer
            # Weights cross the mesh in the dtype of the matrix products, which is all they enter.
            block = jax.tree.map(lambda p: p.astype(self.run.dtype), block)
            block = self.run.layout.weights(block, "blocks/")
            outputs = (block.given(s).outputs(h, c) for h, c, s in zip(hs, cs, signals))
            hs, auxes = zip(*((self.run.layout.batch(h), aux) for h, _, aux in outputs))
            return hs, auxes

        if not self.layers:
            policy = REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
            return jax.lax.scan(body, hs, (self.blocks, signals))
        block, found = nnx.split(self.blocks)[0], []
        for i, layer in enumerate(self.layers):
            here = jax.tree.map(lambda s, i=i: s[i], signals)
            hs, aux = body(hs, (nnx.merge(block, layer), here))
            # Without the barrier the compiler sums up all blocks again where it needs the last.
            hs = jax.lax.optimization_barrier(hs)
            found.append(aux)
        return hs, jax.tree.map(lambda *each: jnp.stack(each), *found)


def unstacked(params: Params) -> Params:
    """The same parameters with a tuple of blocks in the place of their stack, for `make_apply`.

    A scan copies the weights of every block out of the stack and, in training, what the backward
    pass needs into one. Without it compiling takes longer with depth. For passes without a trunk of
    one's own and without remat.
    """
    stack, tree = jax.tree.flatten(params["blocks"])
    # The gradient of a split is one concatenation; that of slices would be a sum of padded ones.
    parts = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in stack]
    layers = (tree.unflatten([part[0] for part in layer]) for layer in zip(*parts))
    return params | {"blocks": tuple(layers)}
