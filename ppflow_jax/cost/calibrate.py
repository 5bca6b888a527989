"""Times a few small programs on this machine, for `--dry_run=here`."""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.cost.calibration import (
    Calibration,
    Counts,
    Fit,
    device_name,
    sampling_counts,
    training_counts,
)
from ppflow_jax.cost.measure import Ceiling
from ppflow_jax.devices.programs import for_passes, for_training
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import state_from
from ppflow_jax.train.step import compiled, make_train_step

# (pyramid, latent size, width, depth, batch): small and unlike one another, so that every price
# weighs in some of them. Depth only multiplies: a few blocks of XL tell what 28 take.
CPU = (
    (SIT, 8, 64, 4, 64),
    (PPFLOW2, 8, 160, 3, 128),
    (SIT, 8, 320, 4, 16),
    (SIT, 16, 128, 3, 32),
    (PPFLOW2, 16, 256, 3, 32),
    (SIT, 32, 256, 2, 8),
    (PPFLOW2, 32, 384, 2, 8),
)
ACCELERATOR = (
    (SIT, 32, 384, 2, 64),
    (PPFLOW2, 32, 384, 6, 128),
    (SIT, 32, 768, 2, 64),
    (PPFLOW2, 32, 768, 4, 32),
    (SIT, 32, 1152, 2, 32),
    (PPFLOW2, 32, 1152, 4, 64),
    (SIT, 64, 768, 2, 16),
)
COPIED = 2**26  # elements of float32 of the copy that measures memory


@dataclass
class Timed:
    """One program and every time that it took."""

    kind: str
    counts: Counts
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)


class Measurement:
    """The programs, compiled and called once; then `round` after round, and `result`.

    Nothing else should run on the machine.
    """

    def __init__(self, dtype: str):
        self.dtype, self.ceiling, self.copy = dtype, Ceiling(jnp.dtype(dtype)), _copy()
        self.programs: list[Timed] = []
        for pyramid, latent, width, depth, batch in CPU if _on_cpu() else ACCELERATOR:
            shape = dict(width=width, depth=depth, heads=width // (32 if _on_cpu() else 64))
            model = ModelConfig(pyramid, latent, 4, **shape, num_classes=10)
            self.programs += [_training(model, batch, dtype), _sampling(model, batch, dtype)]
        for program in [*self.programs, self.copy]:
            program.call()

    def round(self) -> None:
        """Time everything once, so that a slow spell hits all."""
        self.ceiling.time()
        for program in [self.copy, *self.programs]:
            program.time()

    def result(self) -> Calibration:
        """Prices that fit the medians of the rounds."""
        fits = {}
        for kind in ("train", "sample"):
            those = [p for p in self.programs if p.kind == kind]
            fits[kind] = Fit.of([p.counts for p in those], [_median(p) for p in those])
        return Calibration(
            device_name(),
            jax.__version__,
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            self.dtype,
            self.ceiling.rate,
            2 * 4 * COPIED / _median(self.copy),
            fits,
        )


def calibrate(dtype: str, rounds: int) -> Calibration:
    """Measure this machine in so many interleaved rounds."""
    measurement = Measurement(dtype)
    for _ in range(rounds):
        measurement.round()
    return measurement.result()


def text(measured: Calibration) -> str:
    """What was measured, as a person reads it."""
    products, copies = measured.ceiling / 1e9, measured.memory_rate / 1e9
    lines = [
        f"{measured.device}, {measured.dtype}: plain products {products:,.0f} GFLOP/s, copies "
        f"{copies:,.1f} GB/s"
    ]
    for kind, fit in measured.fits.items():
        dense = fit.prices[0]  # 0: the fit gave all to other counts
        share = f"dense products at {1 / dense / measured.ceiling:.0%} of that, " if dense else ""
        lines.append(f"{kind}: {share}within {fit.spread:.0%} of every program that was timed")
    return "\n".join(lines)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _median(program: Timed) -> float:
    return statistics.median(program.seconds)


def _copy() -> Timed:
    x = jnp.zeros(COPIED)
    add = jax.jit(lambda x: x + 1)
    return Timed("copy", np.zeros(0), lambda: add(x).block_until_ready())


def _parameters(model: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))


def _random(model: ModelConfig) -> Params:
    leaves, tree = jax.tree.flatten(abstract_params(model))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [0.02 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return tree.unflatten(made)


def _training(model: ModelConfig, batch: int, dtype: str) -> Timed:
    """A step with AdamW and EMA, which goes on from the state that it left."""
    programs = for_training("auto", jnp.dtype(dtype), head=model.head_width)
    apply = make_apply(model, dtype=jnp.dtype(dtype), remat="none", programs=programs)
    tx = make_optimizer(OptimConfig(), 1)
    objective = FlowObjective(model.pyramid, Flow(), model.null_label)
    objective.check_batch(batch, 1)
    step = compiled(make_train_step(objective, apply, tx, ema=0.9999), programs)
    state = state_from(_random(model), tx)
    data = {"x": jnp.zeros((batch, *model.shape)), "label": jnp.zeros(batch, jnp.int32)}
    key = jax.random.key(0)

    def call():
        nonlocal state
        state, metrics = step(state, data, key)
        jax.block_until_ready((state, metrics))

    counts = training_counts(model, objective.pattern, _parameters(model), float(batch))
    return Timed("train", counts, call)


def _sampling(model: ModelConfig, batch: int, dtype: str) -> Timed:
    """Two Euler steps a stage, guided."""
    programs = for_passes("auto", jnp.dtype(dtype), head=model.head_width)
    apply = make_apply(model, dtype=jnp.dtype(dtype), programs=programs)
    plan = make_plan(Card(model, Flow(), "latents"), SamplerConfig("euler", 4, cfg=(1.5,)))
    sampler, params = plan.sampler(apply), _random(model)
    noise = jax.random.normal(jax.random.key(1), (batch, *model.shape))
    label = jnp.zeros(batch, jnp.int32)
    counts = sampling_counts(model, plan.segments, _parameters(model), float(batch))
    return Timed("sample", counts, lambda: sampler(params, noise, label).block_until_ready())
