"""Feature forecasting: most evaluations are replaced by a linear combination of earlier ones.

One engine for what differs only in schedule, weights and place: FORA (order 0), TaylorSeer,
polynomial extrapolation, Delta-DiT and DeepCache (a range of blocks), and multistep solvers
(the velocity). See `schedule` for the sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation, either
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_flops, ends_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.systems.forecast_blocks import (
    combine,
    depth_of,
    forecast_branches,
    record_branches,
    run_blocks,
    write,
)
from ppflow_jax.systems.forecast_schedule import BASES, SCHEDULES, full_steps, weight_table

PLACES = ("branch", "blocks", "velocity")
MAX_ORDER = 8


@dataclass(frozen=True)
class ForecastConfig:
    """What is forecast, when, and how.

    Attributes:
      forecast: weights, one of `schedule.BASES`: `taylor`, `hermite`, `newton`, or `adams`.
      order: degree of the forecast; 0 repeats the last full value.
      interval: steps from one full step to the next in every stage, or one for all; 1 leaves a
        stage as it is.
      warmup: full steps at the start of every stage (TaylorSeer uses 2 or 3).
      schedule: one of `schedule.SCHEDULES`.
      centre: of the `deepcache` schedule, as a share of the stage's steps.
      place: `branch` forecasts the raw output of every attention and MLP, so that on forecast
        steps only embeddings, gates and the final layer are computed; `blocks` what a range of
        blocks adds to the tokens; `velocity` the guided velocity.
      blocks: first and last (exclusive) block of the range in every stage, or one for all.
        Delta-DiT (arXiv 2406.01125): rear blocks in coarse stages, front ones in the last.
        DeepCache on a transformer: a range in the middle.

    Raises:
      InputError: a value out of its range.
    """

    forecast: str = "taylor"
    order: int = 2
    interval: tuple[int, ...] = (4,)
    warmup: int = 2
    schedule: str = "taylor"
    centre: float = 0.3
    place: str = "branch"
    blocks: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name, known in (("forecast", BASES), ("schedule", SCHEDULES), ("place", PLACES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}: one of {', '.join(known)}"
                )
        if not 0 <= self.order <= MAX_ORDER:
            raise InputError(f"forecast order {self.order} must be 0 to {MAX_ORDER}")
        if not self.interval or min(self.interval) < 1 or self.warmup < 1:
            raise InputError(
                f"forecast interval {self.interval} and warmup {self.warmup} must be at least 1"
            )
        if not 0 <= self.centre < 1:
            raise InputError(f"forecast centre {self.centre} must be in [0, 1)")
        if bool(self.blocks) != (self.place == "blocks"):
            raise InputError(
                f"forecast.place={self.place} with blocks={self.blocks or 'none'}: a range of "
                "blocks is given, e.g. forecast.blocks=4-8, with forecast.place=blocks and only "
                "then"
            )
        if self.forecast == "adams" and self.place != "velocity":
            raise InputError(
                "forecast=adams is a rule for velocities: give forecast.place=velocity"
            )


@dataclass(frozen=True)
class Forecast:
    """The method of a segment (see `flow.method.Method`).

    Its memory is a ring of the last `slots` full values, its inputs the weights of the slots and
    the slot that a full step writes.

    Attributes:
      place: of `ForecastConfig`.
      slots: of the ring.
      blocks: the range, for that place.
    """

    place: str
    slots: int
    blocks: tuple[int, int] = (0, 0)
    name: str = "forecast"

    @property
    def level(self) -> str:
        return "velocity" if self.place == "velocity" else "network"

    def memory(self, evaluation: Evaluation) -> Any:
        if self.place == "velocity":
            return self._ring(evaluation.call())

        def trunk(blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]):
            if self.place == "blocks":
                return h, self._ring(h)
            branch = self._ring(h.astype(blocks.dtype))
            return h, [jnp.stack([branch] * depth_of(blocks))] * 2

        return evaluation.call(trunk=trunk)[1]

    def evaluate(self, evaluation: Evaluation, memory: Any) -> tuple[Array, Any]:
        call, inputs, full = evaluation
        if self.place != "velocity":
            trunk = self._branches if self.place == "branch" else self._range
            return call(trunk=partial(trunk, memory, inputs, full))

        def record(memory):
            return write(memory, call(), inputs["slot"])

        # Not `either`: its loop would change nothing that the call reads, so that the compiler
        # moves the call out of it, into every step. The weights of a full step name the slot it has
        # written, except for Adams-Bashforth.
        memory = jax.lax.cond(full, record, lambda memory: memory, memory)
        return combine(memory, inputs["weights"]), memory

    def _branches(
        self,
        memory: Any,
        inputs: Any,
        full: Bool[Array, ""] | bool,
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n d"], Any]:
        """The trunk with the branches of every block recorded, or forecast; and the memory."""

        def record(h, memory):
            return record_branches(memory, inputs["slot"], blocks, h, c)

        def forecast(h, memory):
            return forecast_branches(memory, inputs["weights"], blocks, h, c)

        return either(full, record, forecast, h, memory)

    def _range(
        self,
        memory: Any,
        inputs: Any,
        full: Bool[Array, ""] | bool,
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n d"], Any]:
        """The same with what the blocks of the range add to the tokens, [b, n, d]."""
        first, last = self.blocks

        def record(h, memory):
            end = run_blocks(blocks, h, c, first, last)
            return end, write(memory, end - h, inputs["slot"])

        def forecast(h, memory):
            return h + combine(memory, inputs["weights"])

        h, memory = either(full, record, forecast, run_blocks(blocks, h, c, 0, first), memory)
        return run_blocks(blocks, h, c, last, depth_of(blocks)), memory

    def _ring(self, value: Array) -> Float[Array, "s ..."]:
        """A new ring of such values."""
        return jnp.stack([value] * self.slots)

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        """With the weighted sums, 2 FLOPs a slot and value; without the guidance."""
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        value = rows * cols * model.width
        if full:
            return model.blocks_at(stage) * block_flops(model, stage) + ends_flops(model, stage)
        if self.place == "velocity":
            return 0
        if self.place == "branch":
            gates = 12 * model.width**2
            kept = gates + 4 * self.slots * value
            return model.blocks_at(stage) * kept + ends_flops(model, stage)
        left = model.blocks_at(stage) - (self.blocks[1] - self.blocks[0])
        return left * block_flops(model, stage) + 2 * self.slots * value + ends_flops(model, stage)


def forecasted(
    segments: Iterable[Segment], model: ModelConfig, config: ForecastConfig
) -> list[Segment]:
    """The plan with forecasts in every stage whose interval (or order, for adams) asks for them.

    A stage begins with full steps, and so does a change between guided and unguided, because the
    batch rows differ. Steps that straddle two stages stay as they are.

    Raises:
      InputError: intervals or blocks that do not fit the model.
    """
    levels = len(model.pyramid)
    intervals = per_stage("interval", config.interval, levels)
    spans = per_stage("blocks", config.blocks or ((0, 0),), levels)
    for stage, (first, last) in enumerate(spans if config.blocks else ()):
        if not 0 <= first < last <= (depth := model.blocks_at(stage)):
            raise InputError(
                f"blocks={first}-{last}: give a range within the model's {depth} blocks, "
                f"e.g. forecast.blocks=1-{depth}"
            )
    out: list[Segment] = []
    for group in alike(segments):
        stages, stage = group[0].stages, group[0].stages[0]
        full = full_steps(
            config.schedule,
            sum(s.steps for s in group),
            intervals[stage],
            config.warmup,
            config.centre,
        )
        blends = config.forecast == "adams" and config.order > 0
        if len(set(stages)) > 1 or (full.all() and not blends):
            out.extend(group)
            continue
        method = Forecast(config.place, config.order + 1, spans[stage])
        weights = weight_table(config.forecast, config.order, full, config.warmup)
        out.extend(with_method(group, method, full, weights))
    return out


def alike(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Segments that may share a memory: of the same stage and rows of the batch."""
    for _, group in itertools.groupby(segments, key=lambda s: (s.stages, s.guided)):
        yield list(group)


def slots_of(full: Bool[np.ndarray, " k"], slots: int) -> np.ndarray:
    """The slot that every step of a group writes, if it is full: each in turn."""
    return np.uint32((np.cumsum(full) - 1) % slots)


def with_method(
    group: list[Segment],
    method: Forecast,
    full: Bool[np.ndarray, " k"],
    weights: Float[np.ndarray, "k s"],
) -> Iterator[Segment]:
    """Segments of a group with forecasts in the steps that are not full."""
    inputs = {"weights": np.float32(weights), "slot": slots_of(full, method.slots)}
    first = 0
    for segment in group:
        now = slice(first, first + segment.steps)
        yield replace(
            segment,
            method=method,
            full=tuple(full[now].tolist()),
            inputs={name: table[now] for name, table in inputs.items()},
            keeps=first > 0,
        )
        first += segment.steps


def per_stage(name: str, values: tuple, levels: int) -> tuple:
    """One value for every stage, from one or all.

    Raises:
      InputError: another number of values.
    """
    if len(values) not in (1, levels):
        raise InputError(
            f"{name} has {len(values)} values for a model of {levels} stage(s): give 1 or {levels}"
        )
    return values if len(values) == levels else values * levels
