"""What blocks and FFNs of a stage make, as moments, and the students that may stand for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.api.model import Model
from ppflow_jax.devices.sharding import batch_sharding, local_mesh
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.evaluate.probing import Examples, batches
from ppflow_jax.flow.path import interpolate
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import Params
from ppflow_jax.models.student_blocks import fresh
from ppflow_jax.models.students import Student, blocks_of, ffns_of
from ppflow_jax.systems.linear_probes import (
    Moments,
    Probes,
    Spans,
    chains,
    intervals,
    least_loss,
    losses,
    probes_of,
    products_of,
)
from ppflow_jax.systems.ppcl import ffn_pair


@dataclass(frozen=True)
class Stage:
    """What was found in one stage.

    Attributes:
      number: of the stage.
      times: on which it was looked at.
      tokens: that were looked at.
      probes: of its blocks.
      ffns: of every block the linear map of its FFN: kernel, bias and relative error.
      similarity: see `linear_probes.chains`.
    """

    number: int
    times: tuple[float, float]
    tokens: int
    probes: Probes
    ffns: Probes
    similarity: Float[np.ndarray, "depth depth"]

    @property
    def losses(self) -> Float[np.ndarray, "depth depth"]:
        return losses(self.similarity)

    def spans(self, count: int | None, shortest: int, longest: int) -> Spans:
        """Blocks that students may stand for; with `count` those that remove so many.

        Raises:
          InputError: there are none that do.
        """
        if count is None:
            return intervals(self.losses, shortest, longest)
        found = least_loss(1 - self.similarity, count, shortest, longest)
        if found is None:
            raise InputError(
                f"no intervals of {shortest} to {longest or 'any number of'} blocks remove {count} "
                f"of the {len(self.similarity)} of stage {self.number}: change --remove, "
                "--shortest or --longest"
            )
        return found

    def linear(self, count: int, spans: Spans) -> tuple[int, ...]:
        """The blocks outside of `spans` whose FFNs are nearest to linear.

        Raises:
          InputError: there are not so many.
        """
        inside = {block for first, last in spans for block in range(first, last + 1)}
        free = [b for b in range(len(self.similarity)) if b not in inside]
        if count > len(free):
            raise InputError(
                f"stage {self.number} has {len(free)} blocks without a student: --ffns={count} is "
                "more than these"
            )
        return tuple(sorted(sorted(free, key=lambda b: self.ffns.residual[b])[:count]))


def check_prunable(model: ModelConfig) -> None:
    """
    Raises:
      InputError: a model that students cannot stand in.
    """
    if model.students:
        raise InputError("the model has students already: give the one that they were made from")
    if model.block.wrap is not None:
        raise InputError(f"students do not stand in blocks with {model.block.wrap}")
    if model.adapters:
        raise InputError("the model has adapters: merge them first, ppflow convert --merge")


def look(model: Model, examples: Examples, stage: int, *, batch: int, seed: int) -> Stage:
    """One stage of a model, by the examples at times spread over the stage, with their labels.

    Raises:
      RunError: tokens that are not finite.
    """
    config, flow = model.config, model.card.flow
    low, high = config.pyramid.intervals[stage]
    first, last = flow.train_interval()
    low, high = max(low, first), min(high, last)
    spread = (np.random.default_rng(seed).permutation(len(examples)) + 0.5) / len(examples)
    times = np.float32(low + (high - low) * spread)
    program, place = jax.jit(_program(model, stage)), batch_sharding(local_mesh())
    found: list[Moments] = []
    with jax.default_matmul_precision("highest" if model.dtype == "float32" else "default"):
        for rows, some in batches(np.arange(len(examples)), batch):
            noise, _ = image_noise(np.uint32(seed), examples.ids[some], config.shape)
            seen = np.arange(len(some)) < rows
            given = examples.x[some], np.asarray(noise), times[some], examples.labels[some], seen
            given = jax.device_put(given, place)
            if not found:
                zeros = _zeros(config)
                means = [sums / count for count, sums, _ in program(model.params, *given, zeros)]
                found = [Moments.empty(np.asarray(mean)) for mean in means]
            shifts = [jnp.float32(moments.shift) for moments in found]
            for moments, (count, *sums) in zip(found, program(model.params, *given, shifts)):
                moments.add(int(count), *sums)
    if not all(np.isfinite(moments.products).all() for moments in found):
        raise RunError(f"tokens of stage {stage} are not finite: nothing can be fitted to them")
    blocks, ffns = found[0], [probes_of(moments) for moments in found[1:]]
    probes = probes_of(blocks)
    wide = Probes(*(np.concatenate([getattr(p, n) for p in ffns]) for n in _FIELDS))
    return Stage(stage, (low, high), blocks.count, probes, wide, chains(blocks, probes))


_FIELDS = ("kernel", "bias", "residual")


def _zeros(config: ModelConfig) -> list[Float[Array, "points d"]]:
    """The shifts of blocks, and of every FFN."""
    points = (config.depth + 1, *[2] * config.depth)
    return [jnp.zeros((n, config.width)) for n in points]


def _program(model: Model, stage: int) -> Callable[..., list[tuple[Array, Array, Array]]]:
    """Tokens counted, their sums and products: around blocks, and around every FFN."""
    apply, path = model.network, model.card.flow.interpolant

    def run(params: Params, x: Any, noise: Any, t: Any, y: Any, seen: Any, shifts: Any) -> Any:
        xt, _ = interpolate(path, noise, x, t)
        h, into, out = apply(params, xt, t, y, stage, trunk=_tokens)[1]
        weight = seen[None, :, None, None]
        pairs = [h, *(jnp.stack(pair) for pair in zip(into, out))]
        count = jnp.sum(seen) * h.shape[2]

        def moments(tokens: Array, shift: Array) -> tuple[Array, Array, Array]:
            less = jnp.where(weight, tokens.astype(jnp.float32) - shift[:, None, None], 0)
            return count, *products_of(less.reshape(len(less), -1, less.shape[-1]), jnp)

        return [moments(*pair) for pair in zip(pairs, shifts)]

    return run


def _tokens(blocks: Block, h: Array, c: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """A trunk that keeps what enters and leaves blocks, and what enters and leaves their FFNs."""

    def body(h: Array, block: Block) -> tuple[Array, tuple[Array, Array, Array]]:
        into, out = ffn_pair(block, h, c)
        return block(h, c), (h, into, out)

    last, (hs, into, out) = jax.lax.scan(body, h, blocks)
    return last, (jnp.concatenate([hs, last[None]]), into, out)


def students_of(stages: list[Stage], spans: list[Spans], ffns: list[int]) -> tuple[Student, ...]:
    """Of these intervals, and of the FFNs that are nearest to linear.

    Raises:
      InputError: see `Stage.linear`.
    """
    found = []
    for stage, own, count in zip(stages, spans, ffns):
        found += [Student(stage.number, *span) for span in own]
        found += [Student(stage.number, b, b, ffn=True) for b in stage.linear(count, own)]
    return tuple(sorted(found))


def first_leaves(
    students: tuple[Student, ...], blocks: Params, stages: list[Stage]
) -> dict[str, Any]:
    """Leaves that students begin with, float32: the middle block, and least squares.

    Args:
      blocks: of the model, with an axis of depth.
      stages: by their numbers.
    """
    made: dict[str, Any] = {}
    if deep := blocks_of(students):
        made |= fresh(tuple(deep), blocks)
    if wide := ffns_of(students):
        rows = [(stages[s.stage].ffns, s.first) for s in wide]
        made["residual"] = {
            name: np.float32([getattr(ffns, name)[block] for ffns, block in rows])
            for name in ("kernel", "bias")
        }
    return jax.tree.map(np.asarray, made)
