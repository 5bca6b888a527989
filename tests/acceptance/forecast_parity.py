"""Compares the forecast engine with arrays computed by the public TaylorSeer and FORA code.

    python -m tests.acceptance.forecast_parity FILE      # taylorseer.npz, compact or full

prints measured error beside bound; exit code 1 if one is over. The compact selection in
tests/reference/accelerate has the same names, fewer runs, and of those only `run/*/steps`.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.convert.load import from_torch
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.forecast import ForecastConfig
from ppflow_jax.systems.forecast_blocks import combine
from ppflow_jax.systems.forecast_schedule import full_steps, weight_table
from tests.acceptance.comparison import Row, report
from tests.acceptance.parity import max_abs, nhwc

_COMBINE = jax.jit(jax.vmap(combine))
_RUN = re.compile(r"run/((plain|taylor|fora)_K(\d+)(?:_N(\d+))?(?:_O(\d+))?(_cfg)?)/traj")


def by_step(table: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Weights of the ring's slots as weights of the steps that wrote them, [k, k]."""
    out, slots = np.zeros((len(full), len(full))), table.shape[1]
    for i in range(len(full)):
        written = np.flatnonzero(full[: i + 1])
        for n in range(max(0, len(written) - slots), len(written)):
            out[i, written[n]] = table[i, n % slots]
    return out


def sequences(ref: dict) -> Iterator[Row]:
    """Schedules, weights, and forecasts of given features, in float64 and through the engine."""
    for name in ref:
        if match := re.fullmatch(r"(seq|fora)/value_K(\d+)(?:_first(\d))?", name):
            kind, steps, first = match[1], int(match[2]), int(match[3] or 2)
            schedule, warmup = ("fora", 1) if kind == "fora" else ("taylor", first)
            suffix = f"_K{steps}{f'_first{match[3]}' if match[3] else ''}"
            values, features = ref[name], ref[f"seq/features_K{steps}"]
            values = values if kind == "seq" else values[:, None]
            worst: dict[str, float] = collections.defaultdict(float)
            for n in range(6):
                full = full_steps(schedule, steps, n + 1, warmup, 0.3)
                worst["full"] += np.sum(full != ref[f"{kind}/full{suffix}"][n])
                for order in range(values.shape[1]):
                    table = weight_table("taylor", order, full, warmup)
                    weights, expected = by_step(table, full), values[n, order]
                    worst["value"] = np.maximum(
                        worst["value"], max_abs(weights @ features, expected)
                    )
                    worst["float32"] = np.maximum(
                        worst["float32"], max_abs(_engine(table, full, features), expected)
                    )
                    if f"seq/weights{suffix}" in ref and kind == "seq":
                        given = ref[f"seq/weights{suffix}"][n, order]
                        worst["weights"] = np.maximum(worst["weights"], max_abs(weights, given))
            yield Row(f"{kind} schedule{suffix}", worst["full"], 0)
            yield Row(f"{kind} values{suffix}", worst["value"], 1e-12)
            yield Row(f"{kind} values{suffix} float32", worst["float32"], 1e-5)
            if "weights" in worst:
                yield Row(f"{kind} weights{suffix}", worst["weights"], 1e-13)


def _engine(table: np.ndarray, full: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Values used at every step, by the ring in float32."""
    slots, written = table.shape[1], np.cumsum(full)
    ring = np.full((len(full), slots, features.shape[1]), np.finfo(np.float32).max)
    for i in np.flatnonzero(full):
        ring[i:, (written[i] - 1) % slots] = features[i]
    return np.asarray(_COMBINE(jnp.asarray(ring), jnp.float32(table)))


class Runs:
    """Sampling runs of the reference network; one program for each number of slots."""

    def __init__(self, ref: dict):
        self.ref = ref
        raw = json.loads(str(ref["model_config"]))
        self.model = ModelConfig(
            SIT,
            raw["input_size"],
            raw["in_channels"],
            raw["hidden_size"],
            raw["depth"],
            raw["num_heads"],
            raw["num_classes"],
            learn_sigma=False,
        )
        state = {k.removeprefix("model/"): v for k, v in ref.items() if k.startswith("model/")}
        self.params = from_torch(self.model, state)
        self.x0, self.y = nhwc(ref["run/x0"]), jnp.asarray(ref["run/y"], jnp.int32)
        self.sampler = Sampler(
            make_apply(self.model), self.model, Flow(), SamplerConfig("euler", cfg_channels=3)
        )

    def names(self) -> list[str]:
        return [m[1] for m in map(_RUN.fullmatch, self.ref) if m]

    def plan(self, name: str):
        _, kind, steps, interval, order, guided = _RUN.fullmatch(f"run/{name}/traj").groups()
        scale = float(self.ref["run/cfg_scale"]) if guided else 1.0
        config = SamplerConfig("euler", int(steps), cfg=(scale,), cfg_channels=3)
        forecast = None
        if kind != "plain":
            forecast = ForecastConfig(
                order=int(order or 0),
                interval=(int(interval),),
                schedule="fora" if kind == "fora" else "taylor",
            )
        return accelerated(config, self.model, Flow(), AccelerateConfig(forecast=forecast))

    def rows(self, name: str) -> Iterator[Row]:
        self.sampler.segments = self.plan(name)
        trajectory = self.sampler(self.params, self.x0, self.y, trajectory=True)
        expected = self.ref[f"run/{name}/traj"]
        steps = self.ref.get(f"run/{name}/steps", np.arange(len(expected)))
        yield Row(f"{name} trajectory", max_abs(trajectory[steps], nhwc(expected)), 2e-5)
        if (full := self.sampler.segments[0].full) and f"run/{name}/full" in self.ref:
            yield Row(f"{name} schedule", np.sum(np.array(full) != self.ref[f"run/{name}/full"]), 0)
        if f"run/{name}/branches" in self.ref:
            branches = self.ref[f"run/{name}/branches"]
            at = self.ref.get(f"run/{name}/branch_steps", np.arange(len(branches)))
            ours = self.branches(trajectory)[at]
            yield Row(f"{name} branches", max_abs(ours, branches), 1e-4)

    def branches(self, trajectory) -> np.ndarray:
        """Branch values used at every step of an unguided run, [k, depth, 2, b, n, d]."""
        (segment,) = self.sampler.segments
        method, apply, used, memory = segment.method, self.sampler.apply, [], None

        @jax.jit
        def evaluate(x, t, memory, inputs):
            def call(trunk):
                return apply(self.params, x, jnp.full(len(x), t), self.y, 0, trunk=trunk)

            if memory is None:
                memory = method.memory(Evaluation(call, inputs, True))
            return method.evaluate(Evaluation(call, inputs, True), memory)[1]

        for k, full in enumerate(segment.full):
            inputs = {name: table[k] for name, table in segment.inputs.items()}
            if full:
                memory = evaluate(trajectory[k], segment.times[k], memory, inputs)
            rings = [jnp.moveaxis(ring, 1, 0) for ring in memory]
            used.append(np.stack([combine(r, jnp.asarray(inputs["weights"])) for r in rings], 1))
        return np.stack(used)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m tests.acceptance.forecast_parity FILE")
        return 2
    ref = dict(np.load(Path(argv[1])))
    runs = Runs(ref)
    with jax.default_matmul_precision("highest"):
        return report(itertools.chain(sequences(ref), *(runs.rows(name) for name in runs.names())))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
