"""How DyDiT is sampled: slices of the weights in the place of masks, and the MLP of some tokens.

All images of a step have one time, and the time alone decides on heads and groups of hidden units.
What no evaluation of a step needs is therefore left out of the products:

    qkv[:, on], out[on, :], fc1[:, on], fc2[on, :]

for the heads or units `on` of each block. A stage has at most so many different widths, each
compiled once: steps that follow one another share the union of theirs, inside which masks hold, so
that the result is the same whatever the number. Tokens that skip the MLP are left out by gathering
a fixed number of them; where more are on, those with the smallest logits skip it too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.plan import Segment
from ppflow_jax.flow.solvers import JUMPS, ODE_SOLVERS, SDE_SOLVERS
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.layers import Block, Signal
from ppflow_jax.models.network import Params, PPFlow
from ppflow_jax.models.stack import Stack
from ppflow_jax.systems.dydit import DyDiT
from ppflow_jax.systems.forecast import per_stage

MARGIN = 0.05  # logits so near below 0 count as on: in bfloat16 they may be
_NODES = {name: rule.nodes for name, rule in (ODE_SOLVERS | SDE_SOLVERS | JUMPS).items()}

# Of every layer, the numbers of what is computed
Chosen = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class WidthConfig:
    """How many programs, and how many tokens.

    Attributes:
      width: the most different widths of a stage.
      capacity: share of the tokens that may pass the MLP, for all stages or one for each.
      width_stages: the stages with slices, 0 the coarsest; by default all.

    Raises:
      InputError: a value out of its range.
    """

    width: int = 1
    width_capacity: tuple[float, ...] = (1.0,)
    width_stages: tuple[int, ...] = ()

    def __post_init__(self):
        if self.width < 1 or not all(0 < share <= 1 for share in self.width_capacity):
            shares = "/".join(f"{share:g}" for share in self.width_capacity)
            raise InputError(
                f"width {self.width} must be at least 1, its capacity {shares} in (0, 1]"
            )


@dataclass(frozen=True)
class Sliced:
    """The method of a segment (see `flow.method.Method`); it keeps nothing.

    Attributes:
      heads, hidden: what is computed, the others being off in all of its evaluations.
      capacity: the most tokens that pass the MLP, by the number of tokens.
    """

    heads: Chosen
    hidden: Chosen
    capacity: tuple[tuple[int, int], ...]
    name: str = "sliced"
    level: str = "network"

    def memory(self, evaluation: Evaluation) -> dict:
        return {}

    def evaluate(self, evaluation: Evaluation, memory: dict) -> tuple[Array, dict]:
        return evaluation.call(trunk=self.trunk)[0], memory

    def trunk(
        self, blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b n d"], None]:
        """The blocks, one scan for every run of them with the same slices."""
        part, first = blocks.spec.wrap, 0
        capacity = dict(self.capacity)[h.shape[1]]

        def body(h, block):
            return part.outputs(block, h, c, capacity)[0], None

        for chosen, run in itertools.groupby(zip(self.heads, self.hidden)):
            last = first + len(list(run))
            h, _ = jax.lax.scan(body, h, sliced(blocks, first, last, *chosen))
            first = last
        return h, None

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        n, block = rows * cols, model.block
        attention = block.mixer.flops(model, stage, n)
        mlp, some = (block.ffn.flops(model, m) for m in (n, dict(self.capacity)[n]))
        heads, hidden = (sum(map(len, each)) for each in (self.heads, self.hidden))
        whole = forward_flops(model, stage) - model.depth * (attention + mlp)
        return whole + (attention * heads + some * hidden) // model.heads


def sliced(
    blocks: Block, first: int, last: int, heads: tuple[int, ...], hidden: tuple[int, ...]
) -> Block:
    """Blocks first to last - 1 with these heads and groups of hidden units alone.

    Adapters beside the kernels are sliced with them.
    """
    blocks = jax.tree.map(lambda leaf: leaf[first:last], blocks)
    attention, masks = blocks.attention, blocks.signal.get_value()
    *_, count, width = attention.qkv_kernel.shape
    units = blocks.fc1.kernel.shape[-1] // masks["hidden"].shape[-1]
    if len(heads) < count:
        own = ("qkv_kernel", "qkv_bias", "qkv_gamma", "qkv_beta", "qkv_lora_b")
        _take(attention, own, heads, -2)
        _take(attention.out, ("kernel", "lora_a"), _spread(heads, width), -2)
    if len(hidden) < masks["hidden"].shape[-1]:
        own = ("kernel", "bias", "gamma", "beta", "lora_b")
        _take(blocks.fc1, own, _spread(hidden, units), -1)
        _take(blocks.fc2, ("kernel", "lora_a"), _spread(hidden, units), -2)
    chosen = {"heads": np.int32(heads), "hidden": np.int32(hidden)}
    blocks.signal = Signal({name: masks[name][..., where] for name, where in chosen.items()})
    return blocks


def _spread(groups: tuple[int, ...], size: int) -> Int[np.ndarray, " units"]:
    """The members of groups of consecutive ones."""
    return np.add.outer(np.int32(groups) * size, np.arange(size, dtype=np.int32)).reshape(-1)


def _take(module: nnx.Module, names: tuple[str, ...], where: Any, axis: int) -> None:
    for name in names:
        if (leaf := getattr(module, name, None)) is not None:
            setattr(module, name, nnx.Param(jnp.take(leaf[...], np.int32(where), axis=axis)))


def routed_on(
    model: ModelConfig, params: Params, times: Float[np.ndarray, " k"]
) -> Bool[np.ndarray, "k depth branch group"]:
    """What the routers switch on at these times: heads, then groups of hidden units."""
    make = lambda: PPFlow(model, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
    graph, _ = nnx.split(nnx.eval_shape(make))

    @jax.jit
    def logits(params, t):
        network = nnx.merge(graph, params)
        part = model.block.wrap
        leaves = Stack(network.blocks, (), network.run, "none").leaves(part.kind)
        found = part.logits(leaves, network.time(t))
        return jnp.stack([found["heads"], found["hidden"]], axis=1)

    with jax.default_matmul_precision("highest"):
        found = np.asarray(logits(params, jnp.float32(times)))  # [depth, branch, k, group - 1]
    on = np.moveaxis(found, 2, 0) > -MARGIN
    return np.concatenate([np.ones((*on.shape[:-1], 1), bool), on], axis=-1)


def narrowed(
    segments: Iterable[Segment],
    model: ModelConfig,
    config: WidthConfig,
    solver: str,
    params: Params | None,
) -> list[Segment]:
    """The plan with slices in its steps.

    Args:
      solver: of the plan, which says at which times of a step the network is evaluated.
      params: of the network; their routers decide.

    Raises:
      InputError: a model without routers, no weights, a stage that the model does not have, or that
        has another method.
    """
    if not isinstance(model.block.wrap, DyDiT):
        raise InputError(
            f"width is for models trained with config.model.wrap={DyDiT.kind}: leave it out of "
            "--accelerate"
        )
    if params is None:
        raise InputError("width is decided by the weights: make the plan with those of the model")
    levels = len(model.pyramid)
    chosen = config.width_stages or tuple(range(levels))
    if wrong := [s for s in chosen if not 0 <= s < levels]:
        raise InputError(
            f"width.stages has {wrong[0]}: the model has {levels} stage(s), 0 to {levels - 1}"
        )
    capacity = _capacities(model, per_stage("width.capacity", config.width_capacity, levels))
    out: list[Segment] = []
    for (stages, kind), group in itertools.groupby(segments, key=lambda s: (s.stages, s.kind)):
        parts = list(group)
        if not set(stages) <= set(chosen) or kind == "last":
            out.extend(parts)
            continue
        if method := next((s.method for s in parts if s.method is not None), None):
            raise InputError(
                f"stage {stages[0]} cannot have both {method.name} and width steps: choose one"
                + (", or another stage for width.stages" if levels > 1 else "")
            )
        on = _by_step(model, params, parts, solver)
        out.extend(_cut(parts, shared(on, config.width), capacity))
    return out


def _capacities(model: ModelConfig, shares: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """The most tokens that pass the MLP, by how many there are in a stage."""
    found: dict[int, int] = {}
    for stage, share in enumerate(shares):
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        n = rows * cols
        found[n] = max(found.get(n, 1), int(np.ceil(share * n)))
    return tuple(found.items())


def _by_step(
    model: ModelConfig, params: Params, segments: list[Segment], solver: str
) -> Bool[np.ndarray, "steps depth branch group"]:
    """What is on in any evaluation of each step."""
    points, nodes = [], _NODES.get(solver, (0.0,))
    for segment in segments:
        pairs = zip(segment.times, segment.times[1:])
        points += [[a + node * (b - a) for node in nodes] for a, b in pairs]
    sizes = [len(times) for times in points]
    on = routed_on(model, params, np.float32([t for times in points for t in times]))
    return np.stack([part.any(axis=0) for part in np.split(on, np.cumsum(sizes)[:-1])])


def shared(on: Bool[np.ndarray, "steps ..."], most: int) -> list[tuple[int, np.ndarray]]:
    """Runs of steps and what they compute, at most so many: (steps, union of what is on).

    Neighbours are united while there are more, those first that add least to what is computed.
    """
    runs: list[tuple[int, np.ndarray]] = []
    for each in on:
        if runs and (runs[-1][1] == each).all():
            runs[-1] = runs[-1][0] + 1, each
        else:
            runs.append((1, each))
    while len(runs) > most:
        added = []
        for (m, a), (n, b) in itertools.pairwise(runs):
            added.append(m * (b & ~a).sum() + n * (a & ~b).sum())
        i = int(np.argmin(added))
        (m, a), (n, b) = runs[i : i + 2]
        runs[i : i + 2] = [(m + n, a | b)]
    return runs


def _cut(
    segments: list[Segment],
    runs: list[tuple[int, Bool[np.ndarray, "depth branch group"]]],
    capacity: tuple[tuple[int, int], ...],
) -> Iterator[Segment]:
    """Segments of one stage, cut where the width changes."""
    methods: list[Sliced] = []
    for steps, on in runs:
        numbers = lambda branch: tuple(tuple(np.flatnonzero(row).tolist()) for row in branch)
        heads, hidden = map(numbers, on.swapaxes(0, 1))
        methods += [Sliced(heads, hidden, capacity)] * steps
    for segment in segments:
        begin = 0
        for method, run in itertools.groupby(methods[: segment.steps]):
            end = begin + len(list(run))
            yield _steps(segment, begin, end, method)
            begin = end
        methods = methods[segment.steps :]


def _steps(segment: Segment, begin: int, end: int, method: Sliced) -> Segment:
    """Steps begin to end - 1 of a segment, by this method."""
    if (rows := segment.rows) is not None:
        more = None if rows.corrector is None else rows.corrector[begin:end]
        rows = replace(rows, weights=rows.weights[begin:end], corrector=more)
    return replace(
        segment,
        times=segment.times[begin : end + 1],
        rows=rows,
        method=method,
        full=(False,) * (end - begin),
        inputs={},
        keeps=True,  # there is no memory, and segments of other scales share a program
    )
