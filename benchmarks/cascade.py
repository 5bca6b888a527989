"""A cascade of digits beside the pyramid, at equal FLOPs of sampling.

    python -m benchmarks.cascade --out=DIR --features=FEATURES [--seeds=3] [--steps=600] \
        [--batch=64] [--num=1000]

Trains three models of the width and depth of configs/digits.py on as many images each (a killed
command continues): a pyramid of 4x4 and 2x2 patches, a SiT of digits shrunk to 4x4 pixels, and a
SiT of 8x8 pixels that is told those. The pyramid is sampled by so many Euler steps, and by plans
that `tune` fits to it; the cascade's second model takes as many Euler steps as the FLOPs of the
pyramid's leave. Judged are the share of samples that are recognised as their label (see
benchmarks/digits_consistency.py) and the FID in FEATURES (as of `evaluate`); means and ranges over
the training seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.settings import tuned_plan
from ppflow_jax import cli
from ppflow_jax.errors import InputError

_OUT = flags.DEFINE_string("out", None, "Folder of the runs.")
_FEATURES = flags.DEFINE_string("features", None, "Of `evaluate --train_features`.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds 0, 1, ...")
_STEPS = flags.DEFINE_integer("steps", 600, "Of training, for each model.")
_BATCH = flags.DEFINE_integer("batch", 64, "Of training.")
_NUM = flags.DEFINE_integer("num", 1000, "Samples.")
CFG = 2.0
TUNED = (5, 8)  # evaluations of plans fitted to the pyramid
PLANS = {12: (6,), 24: (12, 24)}  # Euler steps of the pyramid, and of the small model


def main() -> None:
    from benchmarks.judged_digits import HEAD, judge, line
    from ppflow_jax.data.sources import digits
    from ppflow_jax.devices.host_memory import keep_scratch

    if _SEEDS.value < 1:
        raise InputError("--seeds must be at least 1")
    keep_scratch()
    judged, data = judge(_FEATURES.value), digits()
    labels = np.arange(_NUM.value, dtype=np.int32) % 10
    found: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(_SEEDS.value):
        out = Path(_OUT.value) / str(seed)
        models = {name: _trained(out, name, data, seed) for name in ("pyramid", "low", "high")}
        for name, flops, images in _sampled(out, models, labels):
            figures = (flops, *judged(images, labels))
            print(f"seed {seed}, {name}: {figures}", flush=True)
            found.setdefault(name, []).append(figures)
    print("\n".join((HEAD, *(line(name, figures) for name, figures in found.items()))))


def _sampled(
    out: Path, models: dict[str, Any], labels: np.ndarray
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Every way, its FLOPs an image and its samples [N, 8, 8, 1] of the same noise."""
    from ppflow_jax.flow.cost import sampling_flops
    from ppflow_jax.systems.cascade import Cascade
    from ppflow_jax.systems.registry import task

    pyramid, low, high = models.values()
    cascade = Cascade(low.config, high.config, task(high.card.experiment["data"]["task"]))

    def alone(plan: Any) -> tuple[int, np.ndarray]:
        images = pyramid.sample(len(labels), plan=plan, seed=0, labels=labels).latents
        return sampling_flops(pyramid.config, plan.segments), images

    for count in TUNED:
        plan = tuned_plan(pyramid, out / f"tuned{count}.json", (CFG,), count)
        yield f"pyramid, tuned plan of {count}", *alone(plan)
    for steps, fewer in PLANS.items():
        budget, images = alone(pyramid.plan(solver="euler", steps=steps, cfg=CFG))
        yield f"pyramid, Euler {steps}", budget, images
        for small in fewer:
            first = low.plan(solver="euler", steps=small, cfg=CFG)
            plans = first, _affordable(cascade, first, high, budget)
            samplers = tuple(plan.sampler() for plan in plans)
            params, numbers = (low.params, high.params), np.arange(len(labels))
            images = np.asarray(cascade.sample(samplers, params, 0, numbers, labels)[1])
            flops = cascade.flops(*(plan.segments for plan in plans))
            yield f"cascade, Euler {small} and {plans[1].config.steps}", flops, images


def _affordable(cascade: Any, first: Any, high: Any, budget: int) -> Any:
    """The plan of the most Euler steps of the second model under the budget."""
    plans = [high.plan(solver="euler", steps=n, cfg=CFG) for n in range(1, 50)]
    return [p for p in plans if cascade.flops(first.segments, p.segments) <= budget][-1]


def _trained(out: Path, name: str, data: Any, seed: int) -> Any:
    import ppflow_jax as pf
    from configs import digits, digits_tasks
    from ppflow_jax.systems.cascade import Upsampling
    from ppflow_jax.train.loop import train

    config = digits.get_config("" if name == "pyramid" else "sit")
    if name == "low":
        folder = out / "digits4"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "latents.npy", np.asarray(Upsampling().shrunk(data.x)))
        np.save(folder / "labels.npy", data.labels)
        config.data.source, config.data.path = "arrays", str(folder)
        config.model.latent_size = 4
    elif name == "high":
        config.data.task = digits_tasks.TASKS["cascade"]
    config.seed, config.data.batch_size = seed, _BATCH.value
    config.train.steps = config.train.save_every = _STEPS.value
    config.sample.every = 0
    train(config, str(out / name))
    return pf.load(out / name)


if __name__ == "__main__":
    cli.run(main, required=("out", "features"))
