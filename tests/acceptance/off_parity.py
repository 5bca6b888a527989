"""Compares every accelerator, switched off, with the plain sampler, bit by bit.

    python -m tests.acceptance.off_parity

prints how many values differ for every pyramid, solver, setting and number of (fake) devices; the
bound is none, and the exit code 1 if there are any. Some settings give the plain plan itself;
where an engine runs with nothing to save, the table says so.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.devices.sharding import batch_sharding, make_mesh
from ppflow_jax.flow.method import Method
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.forecast import Forecast
from ppflow_jax.systems.forecast_schedule import weight_table
from ppflow_jax.systems.merged_blocks import Merged, Merging
from ppflow_jax.systems.ras import Ras
from ppflow_jax.systems.routed import Routed
from tests.acceptance.comparison import Row, report
from tests.systems.checks import random_params

MODEL = ModelConfig(SIT, latent_size=8, channels=2, width=8, depth=3, heads=2, num_classes=4)
PYRAMIDS, SOLVERS = (SIT, PPFLOW2, PPFLOW3), ("euler", "heun")
SETTINGS = {
    "interval 1": "forecast.interval=1",
    "interval 1, order 0": "forecast.interval=1,forecast.order=0,forecast.schedule=fora",
    "ratio 0": "merge.ratio=0",
    "ratio 0, tome": "merge.ratio=0,merge=tome",
    "every step protected": "merge.protect=1",
    "every token computed": "ras=norm,ras.share=1",
    "ras, interval 1": "ras=norm,ras.interval=1",
    "every key seen": "rettention=1",
    "guidance in [0, 1]": "guidance=0-1",
    "exact": "exact",
}
STEPS = 5


class Case(NamedTuple):
    """A plan that changes nothing, and the settings of the plain sampler."""

    name: str
    config: SamplerConfig
    segments: tuple[Segment, ...]

    @property
    def plain(self) -> bool:
        """Whether no engine is in it."""
        return all(s.method is None for s in self.segments)


def same_plans(pyramid: Pyramid, solver: str) -> Iterator[Case]:
    """Settings that leave the plan as it is."""
    model = replace(MODEL, pyramid=pyramid)
    guided, plain = SamplerConfig(solver, STEPS, cfg=(2.0,)), SamplerConfig(solver, STEPS)
    for name, text in SETTINGS.items():
        setting = AccelerateConfig.parse(text)
        yield Case(name, guided, accelerated(guided, model, Flow(), setting))
    ones = replace(plain, cfg=(1.0, 1.0), cfg_until=(0.3, 1.0))
    yield Case("scale 1", plain, plan(ones, pyramid, Flow()))


def engines(pyramid: Pyramid, solver: str) -> Iterator[Case]:
    """The engines at work, with a full step everywhere."""
    config = SamplerConfig(solver, STEPS, cfg=(2.0,))

    def forced(make) -> tuple[Segment, ...]:
        return tuple(_full(s, *make(s)) for s in plan(config, pyramid, Flow()))

    def forecast(place: str, span: tuple[int, int] = (0, 0)):
        def make(segment):
            weights = weight_table("taylor", 0, np.ones(segment.steps, bool), 1)
            slot = np.zeros(segment.steps, np.int32)
            return Forecast(place, 1, span), {"weights": np.float32(weights), "slot": slot}

        return make

    def merge(segment):
        grid = pyramid.grid(segment.stages[0], MODEL.latent_size)
        ways = (Merging("windows", 1, grid), Merging("tokens", 2, grid))
        return Merged(ways), {"way": np.arange(segment.steps, dtype=np.int32) % 2}

    def route(segment):
        everything = ((True, True),) * MODEL.depth
        return Routed((everything,)), {"pattern": np.zeros(segment.steps, np.int32)}

    yield Case("order 0, every step full", config, forced(forecast("branch")))
    yield Case("the same for blocks 1-2", config, forced(forecast("blocks", (1, 2))))
    yield Case("the same for velocities", config, forced(forecast("velocity")))
    yield Case("merging, every step full", config, forced(merge))

    def regions(segment):
        grid = pyramid.grid(segment.stages[0], MODEL.latent_size)
        method = Ras("norm", (1, 1), 0.1, grid)
        return method, {"next": np.zeros(segment.steps, bool)}

    yield Case("every branch computed", config, forced(route))
    yield Case("regions, every step full", config, forced(regions))


def _full(segment: Segment, method: Method, inputs: dict) -> Segment:
    return replace(segment, method=method, full=(True,) * segment.steps, inputs=inputs)


class Comparison:
    """The plain samplers of a pyramid on so many devices; each program is compiled once."""

    def __init__(self, pyramid: Pyramid, devices: int):
        self.model = replace(MODEL, pyramid=pyramid)
        self.apply, self.samplers = make_apply(self.model), {}
        place = batch_sharding(make_mesh(devices=jax.devices()[:devices]))
        noise, labels = jax.random.normal(jax.random.key(3), (8, *MODEL.shape)), jnp.arange(8) % 4
        self.inputs = random_params(self.model), *jax.device_put((noise, labels), place)

    def differing(self, case: Case) -> int:
        """Values that are not those of the plain sampler."""
        if case.config not in self.samplers:
            new = Sampler(self.apply, self.model, Flow(), case.config)
            self.samplers[case.config] = new, np.asarray(new(*self.inputs))
        sampler, expected = self.samplers[case.config]
        assert np.isfinite(expected).all()
        sampler.segments = case.segments
        out = sampler(*self.inputs)
        assert out.sharding.device_set == self.inputs[1].sharding.device_set
        return int(np.sum(np.asarray(out) != expected))


def rows() -> Iterator[Row]:
    for devices, pyramid in itertools.product((1, 8), PYRAMIDS):
        jax.clear_caches()  # hundreds of programs need gigabytes
        comparison = Comparison(pyramid, devices)
        for solver in SOLVERS:
            for case in (*same_plans(pyramid, solver), *engines(pyramid, solver)):
                made = "plain" if case.plain else "engine"
                name = f"{devices} devices, {len(pyramid)} levels, {solver}, {case.name}, {made}"
                yield Row(name, comparison.differing(case), 0, "differing values")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    sys.exit(report(rows()))
