"""A tuned plan of a pyramid against SiT's 50 guided Euler steps, in wall-clock.

    python -m benchmarks.sixteen_times --sit=runs/sit --run=runs/l3 --plan=plan.json --cfg=2 \
        [--batches=8,64] [--rounds=9]
    python -m benchmarks.sixteen_times --size=B --batches=2 [--counts=3,2,3] [--guidance=1,2,1] \
        [--students=0:0-1,2:4-5]

All are timed in turn in every round; the ratio is the median over the rounds. The first compares
errors too: the plan's on held-out noise must be no larger than that of 24 Euler steps of the same
model under the same guidance. The second has random weights and measures time alone: a model of 3
levels at 32x32x4, with so many steps of every stage, and students in the place of blocks where they
are given (docs/ppcl.md). Exit code 0 only if all ratios are at least 16, or 12 at batches below 64
of the first.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from absl import flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError

_SIT = flags.DEFINE_string("sit", None, "Run of a SiT.")
_RUN = flags.DEFINE_string("run", None, "Run of a pyramid.")
_PLAN = flags.DEFINE_string("plan", None, "Its plan, of `ppflow tune`.")
_CFG = flags.DEFINE_float("cfg", 2.0, "Guidance scale of SiT.")
_SIZE = flags.DEFINE_string("size", None, "Random weights of this size instead of runs.")
_COUNTS = flags.DEFINE_list("counts", ["3", "2", "3"], "Steps of every stage, random weights.")
_GUIDANCE = flags.DEFINE_list("guidance", ["1", "2", "1"], "Scale of every stage, random weights.")
_STUDENTS = flags.DEFINE_string("students", "none", "Of the stages, random weights.")
_BATCHES = flags.DEFINE_list("batches", ["8", "64"], "Images at once.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of the timing.")
EULER = 24


def main() -> None:
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.flow.cost import sampling_flops

    keep_scratch()
    sit, model, plan = _random() if _SIZE.value else _trained()
    slow = sit.plan(steps=50, solver="euler", cfg=_CFG.value)
    flops, fewer = (sampling_flops(way.model, way.segments) for way in (slow, plan))
    print(f"by FLOPs: {flops / fewer:.1f}x")
    good = True
    for batch in map(int, _BATCHES.value):
        ratio, seconds = _compared((sit, slow), (model, plan), batch)
        bound = 16 if _SIZE.value or batch >= 64 else 12
        good &= ratio >= bound
        print(
            f"batch {batch}: SiT {seconds[0]:.3f} s, plan {seconds[1]:.4f} s, "
            f"{ratio:.1f}x, at least {bound}",
            flush=True,
        )
    if plan.tuned is not None:
        error, euler = plan.tuned.made["held_out_errors"]["plan"], _euler_error(model, plan)
        good &= error <= euler
        print(f"error on held-out noise {error:.4f}, of {EULER} Euler steps {euler:.4f}")
    print("PASS" if good else "FAIL")
    sys.exit(int(not good))


def _trained() -> tuple[Any, Any, Any]:
    import ppflow_jax as pf

    if not (_SIT.value and _RUN.value and _PLAN.value):
        raise InputError("give --sit, --run and --plan, or --size for random weights")
    model = pf.load(_RUN.value)
    return pf.load(_SIT.value), model, model.plan(_PLAN.value)


def _random() -> tuple[Any, Any, Any]:
    from pathlib import Path

    import jax

    from ppflow_jax.api.model import Model
    from ppflow_jax.checkpoints.card import Card
    from ppflow_jax.checkpoints.weights import Weights
    from ppflow_jax.flow.path import Flow
    from ppflow_jax.flow.plan import FITTED, SamplerConfig
    from ppflow_jax.generate.plan import Plan
    from ppflow_jax.models.config import SIZES, ModelConfig
    from ppflow_jax.models.network import init_params
    from ppflow_jax.models.students import parse
    from ppflow_jax.pyramid import PPFLOW3, SIT
    from ppflow_jax.tune.allocate import start_of
    from ppflow_jax.tune.fit import Field

    models = []
    for pyramid, students in ((SIT, ()), (PPFLOW3, parse(_STUDENTS.value))):
        size = SIZES[_SIZE.value]
        config = ModelConfig(pyramid, 32, 4, **size, num_classes=1000, students=students)
        params = init_params(config, jax.random.key(0))
        card = Card(config, Flow(), "latents")
        models.append(Model(Weights(card, Path("random"), "ema", lambda params=params: params)))
    sit, fast = models
    cfg = cli.numbers("guidance", _GUIDANCE.value)
    fitted = start_of(Field(fast), cfg, tuple(map(int, _COUNTS.value)))
    segments, config = fitted.segments, SamplerConfig(FITTED, len(fitted.stages), cfg=cfg)
    return sit, fast, Plan(fast.config, fast.card.flow, config, segments)


def _compared(slow: Any, fast: Any, batch: int) -> tuple[float, tuple[float, float]]:
    """Median of the ratio over the rounds, and the median seconds of both."""
    ids, labels = np.arange(batch), np.arange(batch, dtype=np.int32) % 10

    def seconds(model: Any, plan: Any) -> float:
        start = time.perf_counter()
        for _ in model.images(ids, labels, plan=plan, microbatch=batch):
            pass
        return time.perf_counter() - start

    rounds = [(seconds(*slow), seconds(*fast)) for _ in range(1 + _ROUNDS.value)][1:]
    ratios = [a / b for a, b in rounds]
    return float(np.median(ratios)), tuple(np.median(rounds, axis=0))


def _euler_error(model: Any, plan: Any) -> float:
    """On the held-out part of the noises that the plan was made with."""
    made = plan.tuned.made
    count = made["noises"] // 2
    ids = np.arange(made["noises"], made["noises"] + count)

    from ppflow_jax.flow.sampler import image_noise

    noise, _ = image_noise(np.uint32(made["seed"]), ids, model.config.shape)
    cfg, labels = plan.tuned.cfg, ids % 10

    def ends(steps: int, solver: str) -> np.ndarray:
        way = model.plan(steps=steps, solver=solver, cfg=cfg)
        return model.trajectory(plan=way, labels=labels, noise=noise)[-1]

    exact = ends(100, "heun")
    square = np.mean(np.square(ends(EULER, "euler") - exact)) / np.mean(np.square(exact))
    return float(np.sqrt(square))


if __name__ == "__main__":
    cli.run(main)
