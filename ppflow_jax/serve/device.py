"""Everything that runs on the devices. One thread calls it, others only look."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from ppflow_jax.api.inputs import check_unconditional, whole
from ppflow_jax.api.model import Model
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.flow.path import clean_from
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.flow.tables import scales_of
from ppflow_jax.generate.images import Generator
from ppflow_jax.generate.plan import Plan

MOST_PROGRAMS = 8


class Row(NamedTuple):
    """Image `number` of a seed."""

    label: int
    seed: int
    number: int


@dataclass(frozen=True)
class Way:
    """How images are made; those of equal keys share microbatches.

    Attributes:
      staged: stop after every stage and show what is there.
    """

    plan: Plan
    staged: bool = False

    @property
    def program(self) -> Hashable:
        """What is compiled for it."""
        return self.plan.static, self.staged

    @property
    def key(self) -> Hashable:
        return self.program, tuple(s.scales for s in self.plan.segments)


class Made(NamedTuple):
    """Some images, finished or after a stage.

    Attributes:
      stage: index; None for all stages together.
      milliseconds: of the devices, for the whole microbatch.
      clean: pictures of the clean images that the model expects from here.
      states: pictures of the latents as they are.
    """

    stage: int | None
    milliseconds: float
    clean: UInt8[np.ndarray, "b y x k"]
    states: UInt8[np.ndarray, "b y x k"]


class Device:
    """A model with the programs of the ways used last.

    Attributes:
      size: images of a full microbatch, over all devices.
      compiled: programs so far.

    Raises:
      InputError: an autoencoder that does not fit the model, no microbatch, or a model that must
        be told more than requests say.
    """

    def __init__(self, model: Model, decode: str, microbatch: int):
        check_unconditional(model.config, "the service")
        self.model, self.microbatch = model, whole("microbatch", microbatch)
        self.decoder = Decoder.parse(decode, model.card)
        self.size = self.microbatch * jax.local_device_count()
        self.compiled = 0
        self._programs: OrderedDict[Hashable, list[Generator]] = OrderedDict()
        shape = model.config.shape
        self._draw = jax.jit(lambda seeds, numbers: image_noise(seeds, numbers, shape)[0])

    def ready(self, way: Way) -> bool:
        """Whether nothing has to be compiled for it."""
        return way.program in self._programs

    @property
    def programs(self) -> int:
        return len(self._programs)

    def run(self, way: Way, rows: Sequence[Row]) -> Iterator[Made]:
        """Make at most `size` images; the same bits as `sample` gives with this microbatch.

        Raises:
          RunError: images that are not finite.
        """
        generators = self._compiled(way)
        seeds, numbers, labels = (
            np.asarray([getattr(row, name) for row in rows], kind)
            for name, kind in (("seed", np.uint32), ("number", np.int32), ("label", np.int32))
        )
        x = np.asarray(self._draw(self._padded(seeds), self._padded(numbers)))[: len(rows)]
        if way.staged:
            yield from self._by_stage(way.plan, generators, x, labels)
        else:
            _, pictures, milliseconds = self._timed(generators[0], way.plan.segments, x, labels)
            yield Made(None, milliseconds, pictures, pictures)

    def _by_stage(
        self,
        plan: Plan,
        generators: list[Generator],
        x: Float[np.ndarray, "b h w c"],
        labels: Int[np.ndarray, " b"],
    ) -> Iterator[Made]:
        last = len(generators) - 1
        for i, (generator, (stage, segments)) in enumerate(zip(generators, stages_of(plan))):
            x, _, milliseconds = self._timed(generator, segments, x, labels)
            clean = x if i == last else self._clean(x, segments[-1].times[-1], labels)
            yield Made(stage, milliseconds, self._pictures(clean), self._pictures(x))

    def _timed(
        self, generator: Generator, segments: Any, x: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Latents, their pictures, and the milliseconds they took."""
        start, ids = time.perf_counter(), np.arange(len(x), dtype=np.int32)
        (made,) = generator(self.model.params, ids, labels, x, scales=scales_of(segments))
        return made.latents, made.pictures, 1000 * (time.perf_counter() - start)

    def _clean(self, x: np.ndarray, t: float, labels: np.ndarray) -> np.ndarray:
        """Clean latents by the velocity at time t, without guidance."""
        padded = jnp.asarray(self._padded(x))
        velocity = self.model.velocity(padded, t, self._padded(labels))
        times = jnp.full(len(padded), t, jnp.float32)
        return np.asarray(clean_from(self.model.card.flow, velocity, padded, times))[: len(x)]

    def _pictures(self, latents: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return self.decoder.pictures(latents, min(16, self.microbatch))

    def _compiled(self, way: Way) -> list[Generator]:
        if way.program not in self._programs:
            while len(self._programs) >= MOST_PROGRAMS:
                self._programs.popitem(last=False)
            made, none = self._make(way), np.zeros(1, np.int32)
            # Their first call compiles them, and is not what clients are told the time of.
            x = np.zeros((1, *self.model.config.shape), np.float32)
            parts = stages_of(way.plan) if way.staged else [(None, way.plan.segments)]
            for generator, (_, segments) in zip(made, parts):
                self._timed(generator, segments, x, none)
                if way.staged:
                    self._clean(x, segments[-1].times[-1], none)
            self._programs[way.program] = made
            self.compiled += 1
        self._programs.move_to_end(way.program)
        return self._programs[way.program]

    def _make(self, way: Way) -> list[Generator]:
        plan, model = way.plan, self.model
        if not way.staged:
            samplers, decoder = [plan.sampler(model.network, model.dtype)], self.decoder
        else:  # latents are decoded outside of the time of a stage
            samplers, decoder = [], Decoder(model.card)
            for _, segments in stages_of(plan):
                settings = (plan.model, plan.flow, plan.config)
                samplers.append(Sampler(model.network, *settings, segments=segments))
        make = {"microbatch": self.microbatch, "dtype": model.dtype}
        return [Generator(sampler, decoder, **make) for sampler in samplers]

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        """Rows up to a full microbatch: one program for any number of them."""
        empty = [(0, 0)] * (rows.ndim - 1)
        return np.pad(rows, [(0, self.size - len(rows)), *empty], mode="edge")


def stages_of(plan: Plan) -> list[tuple[int, tuple]]:
    """Stages of a plan on the aligned grid, with their segments."""
    groups = itertools.groupby(plan.segments, key=lambda s: s.stages[0])
    return [(stage, tuple(segments)) for stage, segments in groups]
