"""What `ppflow bench --calibrate` foretells against what this machine then takes, three models.

    python -m tests.acceptance.calibrated [--rounds=20]

Rounds of the calibration and steps of the three models take turns, so that whatever else runs on
the machine slows both. Each model trains for 200 steps or more, compiled as `ppflow train` compiles
it; none is among the programs of the calibration. The sampler of the first is timed besides.
Prints seconds of a step as foretold and as measured (the median), and exits with 1 if one of the
three is off by more than 25%.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time

import jax
import numpy as np

from ppflow_jax.cost.calibrate import Measurement, text
from ppflow_jax.cost.calibration import sampling_counts, training_counts
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import make_program
from ppflow_jax.train.state import whole

STEPS, BOUND = 200, 0.25
# Batches are a quarter of the demo's, to be done in minutes
MODELS = {
    "digits, 2 levels, width 128": ("digits", "", dict(batch=64)),
    "digits, SiT": ("digits", "sit", dict(batch=64)),
    "16x16x4, 2 levels, width 192": ("imagenette", "", dict(batch=16, width=192, depth=6, heads=6)),
}


class Model:
    """A model that trains on noise, as the command would."""

    def __init__(self, name: str, variant: str, batch: int, **sizes: int):
        config = importlib.import_module(f"configs.{name}").get_config(variant)
        config.model.update(sizes)
        config.data.batch_size, config.model.dtype = batch, "float32"
        self.experiment = Experiment.from_config(config)
        self.program = make_program(self.experiment, make_mesh(devices=jax.devices()[:1]))
        self.model, self.batch = self.experiment.card.model, batch
        leaves = jax.tree.leaves(self.program.parameters)
        self.parameters = sum(math.prod(leaf.shape) for leaf in leaves)
        self.state = self.program.init(jax.random.key(0))
        self.key, self.random = jax.random.key(1), np.random.default_rng(0)
        self.seconds: list[float] = []
        self.sampled: list[float] = []
        self.step()
        self.seconds.clear()  # the first one compiled it

    def step(self) -> None:
        x = self.random.standard_normal((self.batch, *self.model.shape), np.float32)
        label = self.random.integers(0, 10, self.batch, np.int32)
        start = time.perf_counter()
        run = self.program.step(0)
        self.state, metrics = run(self.state, {"x": x, "label": label}, self.key, {})
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - start)

    def sample(self) -> None:
        plan = make_plan(self.experiment.card, self.experiment.sampler)
        sampler = plan.sampler(self.program.apply)
        ema, labels = whole(self.state["ema"], {}), np.zeros(self.batch, np.int32)
        noise = np.zeros((self.batch, *self.model.shape), np.float32)
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(sampler(ema, noise, labels))
            self.sampled.append(time.perf_counter() - start)
        del self.sampled[0]  # compiled it
        self.segments = plan.segments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    keep_scratch()
    models = {name: Model(*facts[:2], **facts[2]) for name, facts in MODELS.items()}
    measurement = Measurement("float32")
    for _ in range(rounds):
        measurement.round()
        for model in models.values():
            for _ in range(-(-STEPS // rounds)):
                model.step()
    first = next(iter(models.values()))
    first.sample()
    measured = measurement.result()
    print(text(measured))
    failed = False
    for name, model in models.items():
        pattern = model.experiment.objective.pattern
        counts = training_counts(model.model, pattern, model.parameters, float(model.batch))
        failed |= not told(f"{name}, a step", measured.fits["train"].seconds(counts), model.seconds)
    counts = sampling_counts(first.model, first.segments, first.parameters, float(first.batch))
    name = f"{next(iter(models))}, {first.batch} samples"
    told(name, measured.fits["sample"].seconds(counts), first.sampled)  # another moment: not judged
    return int(failed)


def told(name: str, foretold: float, seconds: list[float]) -> bool:
    """Print a line; whether it is within the bound."""
    taken = statistics.median(seconds)
    quartiles = np.quantile(seconds, (0.25, 0.75))
    print(
        f"{name}: foretold {foretold:.4f} s, measured {taken:.4f} s (quartiles {quartiles[0]:.4f} "
        f"to {quartiles[1]:.4f}, {len(seconds)} runs), ratio {foretold / taken:.2f}"
    )
    return abs(foretold / taken - 1) <= BOUND


if __name__ == "__main__":
    sys.exit(main())
