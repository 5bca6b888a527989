"""The stack of blocks, in one pass for all stages."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import is_gather
from ppflow_jax.errors import InputError
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


class Output(NamedTuple):
    """What the network gives.

    Attributes:
      prediction: velocity, score or noise, whatever it was trained for.
      aux: what training may add to the loss, by name; empty for the blocks of DiT.
      taps: what was asked for of its inside, see `Taps`.
    """

    prediction: Float[Array, "b h w c"]
    aux: Aux
    taps: Mapping[str, Array] = {}


@dataclass(frozen=True)
class Taps:
    """What a pass gives of its inside, beside the prediction.

    In `Output.taps`, by name:
      `h/8`: float32 [b, n, d], the tokens after the first 8 blocks.
      `logits/4`: float32 [b, heads, n, n], what enters the softmax of the block with index 4,
        which is the fifth: queries times keys over the root of the head's width.
      `mixed/4`: [b, n, d], the attention branch of that block before its gate, in the dtype of the
        matrix products.

    Attributes:
      h: numbers of blocks, from 1 to the depth.
      logits, mixed: indices of blocks, from 0 to the depth - 1.
    """

    h: tuple[int, ...] = ()
    logits: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.h or self.logits or self.mixed)

    def __or__(self, other: Taps) -> Taps:
        pairs = ((self.h, other.h), (self.logits, other.logits), (self.mixed, other.mixed))
        return Taps(*(tuple(sorted({*a, *b})) for a, b in pairs))

    def inside(self, block: int) -> tuple[str, ...]:
        """What is taken inside this block."""
        return tuple(name for name in ("logits", "mixed") if block in getattr(self, name))

    def check(self, depth: int) -> None:
        """
        Raises:
          InputError: a block that there is not.
        """
        if wrong := [i for i in self.h if not 1 <= i <= depth]:
            raise InputError(f"tokens after {wrong} blocks: the model has 1 to {depth}")
        for name in ("logits", "mixed"):
            if wrong := [i for i in getattr(self, name) if not 0 <= i < depth]:
                raise InputError(f"{name} of blocks {wrong}: the model has 0 to {depth - 1}")


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
        grids: tuple[tuple[int, int], ...],
        taps: Taps = Taps(),
    ) -> tuple[tuple[Float[Array, "_ _ d"], ...], tuple[Aux, ...], tuple[dict[str, Array], ...]]:
        """Tokens of every stage, what the parts give, with a leading axis of depth, and the taps.

        Several stages pass a block side by side, each with its own token count, so that its
        weights are gathered, and their gradients summed over a mesh, once for all of them. Each of
        `cs` is already SiLU(c), each of `signals` what the blocks' wrap has for it, or None, each
        of `grids` rows and columns of its tokens.
        """

        def body(hs, layer, inside=()):
            block, signals = layer
            # Weights cross the mesh in the dtype of the matrix products, which is all they enter.
            block = jax.tree.map(lambda p: p.astype(self.run.dtype), block)
            block = self.run.layout.weights(block, "blocks/")

            def through(signal, grid, h, c):
                here = block.given(signal, grid)
                seen = {"logits": here.logits(h, c)} if "logits" in inside else {}
                h, (mixed, _), aux = here.outputs(h, c)
                seen |= {"mixed": mixed} if "mixed" in inside else {}
                return self.run.layout.batch(h), aux, seen

            hs, auxes, seen = zip(*map(through, signals, grids, hs, cs))
            return hs, (auxes, seen)

        found: tuple[dict[str, Array], ...] = tuple({} for _ in hs)
        given, runs = [], list(cuts(self.depth, taps))
        for (first, last), layers in zip(runs, self._split(signals, runs)):
            inside = taps.inside(first)
            here = functools.partial(body, inside=inside) if inside else body
            hs, (auxes, seen) = self._run(here, hs, layers)
            given.append(auxes)
            for i, h in enumerate(hs):
                if last in taps.h:
                    found[i][f"h/{last}"] = h.astype(jnp.float32)
                for name in inside:
                    taken = seen[i][name]
                    found[i].update((f"{name}/{k}", taken[k - first]) for k in range(first, last))
        if len(given) == 1:
            return hs, given[0], found
        return hs, jax.tree.map(lambda *parts: jnp.concatenate(parts), *given), found

    @property
    def depth(self) -> int:
        return len(self.layers) or self.blocks.adaln.kernel.shape[0]

    def _split(self, signals: tuple[Any, ...], runs: list[tuple[int, int]]) -> list[Any]:
        """The blocks of every run, and their signals."""
        if self.layers:
            graph = nnx.split(self.blocks)[0]
            blocks = [
                (nnx.merge(graph, layer), jax.tree.map(lambda s, i=i: s[i], signals))
                for i, layer in enumerate(self.layers)
            ]
            return [blocks[first:last] for first, last in runs]
        stacked = self.blocks, signals
        if len(runs) == 1:
            return [stacked]
        leaves, tree = jax.tree.flatten(stacked)
        # As in `unstacked`: the gradient of a split is one concatenation.
        sizes = [last - first for first, last in runs]
        return [
            tree.unflatten(run) for run in zip(*(jax.lax.split(leaf, sizes) for leaf in leaves))
        ]

    def _run(self, body, hs, layers):
        """Through blocks one after another."""
        if not self.layers:
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
            return jax.lax.scan(body, hs, layers)
        found = []
        for layer in layers:
            hs, given = body(hs, layer)
            # Without the barrier the compiler sums up all blocks again where it needs the last.
            hs = jax.lax.optimization_barrier(hs)
            found.append(given)
        return hs, jax.tree.map(lambda *each: jnp.stack(each), *found)


def cuts(depth: int, taps: Taps) -> Iterator[tuple[int, int]]:
    """Runs of blocks (first, last + 1) that the taps leave whole.

    After a block whose tokens are taken the stack is cut, and so it is around each run of blocks
    inside which the same is taken.
    """
    edges = {0, depth, *taps.h}
    for i in range(1, depth):
        if taps.inside(i) != taps.inside(i - 1):
            edges.add(i)
    ends = sorted(edges)
    return zip(ends, ends[1:])


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
