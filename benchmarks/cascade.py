"""A cascade of digits beside the pyramid, at equal FLOPs of sampling.

    python -m benchmarks.cascade --out=DIR [--steps=600] [--num=1000] [--width=128] [--depth=6]

Trains three models of one width and depth on as many images each (a killed command continues): a
pyramid of 4x4 and 2x2 patches, a SiT of digits shrunk to 4x4 pixels, and a SiT of 8x8 pixels that
is told those. The pyramid is sampled by so many Euler steps; the cascade's second model takes as
many as its FLOPs leave. Judged are the share of samples that are recognised as their label
and the Fréchet distance of the 64 pixels to all digits (benchmarks/pixel_distance.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ppflow_jax import cli

_OUT = flags.DEFINE_string("out", None, "Folder of the runs.")
_STEPS = flags.DEFINE_integer("steps", 600, "Of training, for each model.")
_BATCH = flags.DEFINE_integer("batch", 256, "Of training.")
_NUM = flags.DEFINE_integer("num", 1000, "Samples.")
_WIDTH = flags.DEFINE_integer("width", 128, "Of all models.")
_DEPTH = flags.DEFINE_integer("depth", 6, "Of all models.")
CFG = 2.0
PLANS = ((12, 6), (24, 12), (24, 24))  # Euler steps of the pyramid, and of the small model


def main() -> None:
    from benchmarks.pixel_distance import judged
    from ppflow_jax.data.sources import digits
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.systems.cascade import Cascade
    from ppflow_jax.systems.registry import task as task_of

    keep_scratch()
    data, out = digits(), Path(_OUT.value)
    models = {name: _trained(out, name, data) for name in ("pyramid", "low", "high")}
    pyramid, low, high = models.values()
    task = task_of(high.card.experiment["data"]["task"])
    cascade = Cascade(low.config, high.config, task)
    labels = np.arange(_NUM.value, dtype=np.int32) % 10
    rows = []
    for steps, small in PLANS:
        plan = pyramid.plan(solver="euler", steps=steps, cfg=CFG)
        images = pyramid.sample(_NUM.value, plan=plan, seed=0, labels=labels).latents
        budget = _flops(pyramid, plan)
        rows.append((f"pyramid, Euler {steps}", budget, *judged(images, labels, data.x)))
        plans = [low.plan(solver="euler", steps=small, cfg=CFG), None]
        for n in range(1, 200):
            more = high.plan(solver="euler", steps=n, cfg=CFG)
            if plans[1] and cascade.flops(plans[0].segments, more.segments) > budget:
                break
            plans[1] = more
        samplers = tuple(p.sampler() for p in plans)
        params = low.params, high.params
        made = cascade.sample(samplers, params, 0, np.arange(len(labels)), labels)[1]
        name = f"cascade, Euler {small} and {plans[1].config.steps}"
        flops = cascade.flops(*(p.segments for p in plans))
        rows.append((name, flops, *judged(np.asarray(made), labels, data.x)))
    print("| sampled by | MFLOPs an image | recognised | Fréchet distance |\n|---|---|---|---|")
    for name, flops, share, distance in rows:
        print(f"| {name} | {flops / 1e6:.4g} | {share:.1%} | {distance:.3f} |")


def _flops(model: Any, plan: Any) -> int:
    from ppflow_jax.flow.cost import sampling_flops

    return sampling_flops(model.config, plan.segments)


def _trained(out: Path, name: str, data: Any) -> Any:
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
    config.model.width, config.model.depth = _WIDTH.value, _DEPTH.value
    config.data.batch_size = _BATCH.value
    config.train.steps, config.train.save_every = _STEPS.value, _STEPS.value
    config.sample.every = 0
    train(config, str(out / name))
    return pf.load(out / name)


if __name__ == "__main__":
    cli.run(main, required=("out",))
