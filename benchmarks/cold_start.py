"""Time from the start of a process to the first image, without and with a compilation cache.

    python -m benchmarks.cold_start                   # XL, 3 levels, one guided image of 4 steps

Starts the same process twice with one empty folder as JAX_COMPILATION_CACHE_DIR. `start` is what a
start adds: all the time to the first image, less that of a second image.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_SIZE = flags.DEFINE_string("size", "XL", "Model size.")
_STEPS = flags.DEFINE_integer("steps", 4, "Euler steps of the aligned grid.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_CHILD = flags.DEFINE_float("child", 0.0, "Used by itself: when the process was started.")


def main(_) -> None:
    if _CHILD.value:
        print(json.dumps(_first_image(_CHILD.value)))
        return
    with tempfile.TemporaryDirectory() as cache:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        runs = {name: _child(settings) for name in ("empty cache", "full cache")}
    names = list(runs["empty cache"])
    print(f"{'seconds':14}" + "".join(f"{name:>14}" for name in names))
    for run, values in runs.items():
        print(f"{run:14}" + "".join(f"{values[name]:14.2f}" for name in names))
    first, second = runs.values()
    for name in ("first image", "compile", "start"):
        print(f"{name}: the second time {second[name] / first[name]:.0%} of the first")


def _child(settings: dict[str, str]) -> dict[str, float]:
    own = [f"--{f}={flags.FLAGS[f].value}" for f in ("size", "steps", "dtype")]
    command = [sys.executable, "-m", "benchmarks.cold_start", f"--child={time.time()}", *own]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _first_image(started: float) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.flow.path import Flow
    from ppflow_jax.flow.plan import SamplerConfig
    from ppflow_jax.flow.sampler import Sampler
    from ppflow_jax.models.config import SIZES, ModelConfig
    from ppflow_jax.models.network import abstract_params, make_apply
    from ppflow_jax.pyramid import PPFLOW3

    keep_scratch()
    times = {"imports": time.time() - started}
    model = ModelConfig(PPFLOW3, 32, 4, **SIZES[_SIZE.value], num_classes=1000)
    params = jax.tree.map(
        lambda s: np.broadcast_to(np.float32(0.01), s.shape), abstract_params(model)
    )
    params = jax.block_until_ready(jax.device_put(params))
    times["weights"] = time.time() - started - times["imports"]
    apply = make_apply(model, dtype=jnp.dtype(_DTYPE.value))
    sampler = Sampler(apply, model, Flow(), SamplerConfig("euler", _STEPS.value, cfg=(1.5,)))
    noise, labels = np.ones((1, *model.shape), np.float32), np.zeros(1, np.int32)

    def image() -> float:
        start = time.time()
        sampler(params, noise, labels).block_until_ready()
        return time.time() - start

    first = image()
    times["first image"] = time.time() - started
    times["image"] = image()
    times["compile"] = first - times["image"]
    times["start"] = times["first image"] - times["image"]
    return times


if __name__ == "__main__":
    app.run(main)
