"""The leaves of students, and the blocks of a stage with students among them (see students.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.layers import Block, Execution, linear
from ppflow_jax.models.parts import Aux, BlockSpec, Ffn
from ppflow_jax.models.stack import Params, Stack, Taps
from ppflow_jax.models.students import Step, Student, blocks_of, ffns_of, steps

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig
    from ppflow_jax.models.network import PPFlow


@dataclass(frozen=True)
class Residual(Ffn):
    """x W + b + x in the place of an FFN; its leaves are students."""

    kind = "residual"

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Aux]:
        def residual(x):
            return block.residual(x) + x.astype(block.residual.dtype)

        return block.per_token(residual, x), {}

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """2 N D^2."""
        return 2 * tokens * model.width**2

    def hidden(self, model: ModelConfig) -> float:
        return 0.0


def chosen(
    config: ModelConfig,
    *,
    parts: Callable[[BlockSpec], BlockSpec] | None = None,
    on: tuple[Student, ...] | None = None,
    **drawn: Sequence[Any],
) -> tuple[BlockSpec, tuple[Student, ...], tuple[Any, ...]]:
    """The parts of a call's blocks, its students, and what is drawn for the wrap of its blocks.

    See `network.make_apply`.
    """
    wrap = config.block.wrap
    own = tuple(drawn.pop(wrap.kind, ())) if wrap else ()
    if drawn:
        raise TypeError(f"{', '.join(drawn)}: no argument of a network with {config.block}")
    spec = config.block if parts is None else parts(config.block)
    return spec, config.students if on is None else on, own


def make(model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> nnx.Dict:
    """Their leaves: `blocks`, with those of blocks, and `residual`, each with an axis of them."""
    made: dict[str, Any] = {}
    if count := len(blocks_of(model.students)):
        block = nnx.vmap(lambda r: Block(model, run, rngs=r), in_axes=0, out_axes=0)
        made["blocks"] = block(rngs.split(count))
    if count := len(ffns_of(model.students)):
        width, zeros = model.width, nnx.initializers.zeros
        one = nnx.vmap(
            lambda r: linear(width, width, r, dtype=run.dtype, init=zeros), in_axes=0, out_axes=0
        )
        made["residual"] = one(rngs.split(count))
    return nnx.Dict(made)


def fresh(students: tuple[Student, ...], blocks: Any) -> dict[str, Any]:
    """Leaves of students that are blocks: those of the block in the middle of what it replaces.

    Args:
      blocks: leaves with an axis of depth.

    Raises:
      InputError: students of FFNs, which begin by least squares.
    """
    if wide := ffns_of(students):
        raise InputError(
            f"student {wide[0]} begins by least squares on data: make it by ppflow prune --target"
        )
    rows = jnp.array([s.start for s in blocks_of(students)])
    return {"blocks": jax.tree.map(lambda leaf: leaf[rows], blocks)}


def passed(network: PPFlow, stack: Stack, stage: int) -> list[tuple[Stack, list[Step]]]:
    """The stacks that the tokens of a stage pass one after another, with the steps of each.

    Students that are blocks stand in one stack with the others; linear maps, which have other
    leaves, begin a new one.
    """
    if not network.on:
        return [(stack, [])]
    own, found = network.students, steps(network.config, stage, network.on)
    made = []
    for wide, group in itertools.groupby(found, key=lambda step: step.residual is not None):
        here = list(group)
        one = _layers(stack, own, here) if stack.layers else _selected(stack, own, here)
        if wide:
            rows = jnp.array([step.residual for step in here])
            one.blocks.residual = jax.tree.map(lambda leaf, r=rows: leaf[r], own["residual"])
            one.blocks.spec = replace(one.blocks.spec, ffn=Residual())
        made.append((one, here))
    return made


def _selected(stack: Stack, own: nnx.Dict, here: list[Step]) -> Stack:
    """With an axis of depth: runs of rows, put together in the order of the steps."""
    ours, tree = jax.tree.flatten(stack.blocks)
    theirs = jax.tree.leaves(own["blocks"]) if "blocks" in own else ours
    cuts: list[tuple[bool, int, int]] = []
    for student, row in ((step.block is None, step.row) for step in here):
        if cuts and cuts[-1][0] == student and cuts[-1][2] == row:
            cuts[-1] = (student, cuts[-1][1], row + 1)
        else:
            cuts.append((student, row, row + 1))

    def put(a: Array, b: Array) -> Array:
        parts = [(b if student else a)[first:last] for student, first, last in cuts]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    return replace(stack, blocks=tree.unflatten(map(put, ours, theirs)))


def _layers(stack: Stack, own: nnx.Dict, here: list[Step]) -> Stack:
    """With the parameters of every block apart."""
    leaves = {name: nnx.to_pure_dict(nnx.state(module)) for name, module in own.items()}

    def of(name: str, row: int) -> Params:
        return jax.tree.map(lambda leaf: leaf[row], leaves[name])

    layers = []
    for step in here:
        one = of("blocks", step.row) if step.block is None else stack.layers[step.row]
        if step.residual is not None:
            one = one | {"residual": of("residual", step.residual)}
        layers.append(one)
    values, tree = jax.tree.flatten(stack.blocks)
    own_module = tree.unflatten(values)  # which may be changed
    return replace(stack, blocks=own_module, layers=tuple(layers))


def walk(
    network: PPFlow,
    stack: Stack,
    stage: int,
    h: Float[Array, "b n d"],
    c: Float[Array, "b d"],
    taps: Taps,
) -> tuple[Float[Array, "b n d"], Aux, dict[str, Array]]:
    """Tokens of one stage, what the parts give, and the taps, counted as without students."""
    given, taken, deep = [], {}, blocks_of(network.config.students)
    for one, here in passed(network, stack, stage):
        after = {i + 1: _after(step, deep) for i, step in enumerate(here)}
        blocks = {i: step.block for i, step in enumerate(here) if step.block is not None}
        now = Taps(
            tuple(i for i, end in after.items() if end in taps.h),
            *(tuple(i for i, b in blocks.items() if b in at) for at in (taps.logits, taps.mixed)),
        )
        (h,), _, (aux,), (found,) = one((h,), (c,), (None,), (network.grid(stage),), now)
        given.append(aux)
        for name, value in found.items():
            kind, number = name.split("/")
            taken[f"{kind}/{(after if kind == 'h' else blocks)[int(number)]}"] = value
    return h, jax.tree.map(lambda *parts: jnp.concatenate(parts), *given), taken


def _after(step: Step, deep: list[Student]) -> int:
    """Blocks that are passed after a step, as without students."""
    return (deep[step.row].last if step.block is None else step.block) + 1
