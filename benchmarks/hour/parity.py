"""Forward passes, gradients and samples on the device against float32 on CPU, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hour.models import TINY, card_of, random_params
from benchmarks.hour.work import Job, Work, same_device
from ppflow_jax.devices.programs import Programs, for_passes
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import Params, make_apply
from ppflow_jax.pyramid import PPFLOW2

BATCH, STEPS, DEPTH = 4, 8, 4
SCALES = (1.0, 2.0)
# Of the relative root mean square. float32 is of highest precision on both sides, and rounds in
# another order; bfloat16 has 8 bits.
BOUNDS = {
    "float32": {"forward": 1e-5, "gradient": 1e-4, "samples": 1e-4},
    "bfloat16": {"forward": 1e-2, "gradient": 2e-2, "samples": 2e-2},
}
Results = dict[str, Any]


def run(work: Work) -> None:
    """The CPU's side is computed beside the device's: compiling is most of both."""
    same_device(work.settings)
    pool = ThreadPoolExecutor(1)
    try:
        work.each(_jobs(work, pool))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _jobs(work: Work, pool: ThreadPoolExecutor) -> Iterator[Job]:
    """Of each kind all sizes, in case time is over before the last."""
    models = [_model(size, work.tiny) for size in (("XL",) if work.tiny else ("XL", "B"))]
    references = [_reference(model) for model in models]
    ours = {(m, dtype): _once(partial(_on_device, m, dtype)) for m in models for dtype in BOUNDS}
    for what in ("forward", "gradient", "samples"):
        for model, reference in zip(models, references):
            keys = {d: f"{what}, heads of {model.head_width}, {d}" for d in BOUNDS}
            if all(map(work.record.has, keys.values())):
                continue
            exact = pool.submit(reference[what])
            for dtype, key in keys.items():
                yield key, partial(_compared, what, dtype, ours[model, dtype], exact)


def _model(size: str, tiny: bool) -> ModelConfig:
    """Of the width and the heads of a size, but not its depth."""
    shape = TINY[size] if tiny else SIZES[size] | {"depth": DEPTH}
    return ModelConfig(PPFLOW2, 8 if tiny else 32, 4, **shape, num_classes=10)


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make`, whose first result is kept."""
    kept: list[Any] = []

    def result() -> Any:
        if not kept:
            kept.append(make())
        return kept[0]

    return result


def _compared(
    what: str,
    dtype: str,
    ours: Callable[[], dict[str, Callable[[], Any]]],
    reference: Future[Any],
) -> dict[str, Any]:
    bound = BOUNDS[dtype][what]
    error = difference(ours()[what](), reference.result())
    said = f"{error:.1e}, at most {bound:g}"
    return {"value": error, "bound": bound, "good": error <= bound, "said": said}


def difference(ours: Any, reference: Any) -> float:
    """Relative root mean square over all leaves."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))
    square = sum(float(np.sum(np.square(np.float64(a) - np.float64(b)))) for a, b in pairs)
    return float(np.sqrt(square / sum(float(np.sum(np.square(np.float64(b)))) for _, b in pairs)))


def _reference(model: ModelConfig) -> dict[str, Callable[[], Any]]:
    """Plain attention, whatever the default device has."""
    return _results(model, jnp.float32, Programs("xla"), jax.devices("cpu")[0])


def _on_device(model: ModelConfig, dtype: str) -> dict[str, Callable[[], Any]]:
    programs = for_passes("auto", jnp.dtype(dtype), head=model.head_width)
    return _results(model, jnp.dtype(dtype), programs, jax.devices()[0])


def _results(
    model: ModelConfig, dtype: Any, programs: Programs, device: jax.Device
) -> dict[str, Callable[[], Any]]:
    """What is compared, computed on `device`, in highest precision: a program for each, run once.

    Inputs are NumPy arrays put there, so that both devices have the same.
    """
    apply = make_apply(model, dtype=dtype, programs=programs)
    random = np.random.default_rng(1)
    x = random.standard_normal((BATCH, *model.shape), np.float32)
    target = random.standard_normal((BATCH, *model.shape), np.float32)
    y = np.arange(BATCH, dtype=np.int32)
    t = [np.full(BATCH, (a + b) / 2, np.float32) for a, b in model.pyramid.intervals]
    inputs = jax.device_put((_params(model), x, target, y, t), device)
    plan = make_plan(card_of(model), SamplerConfig("euler", STEPS, cfg=SCALES))
    solve = plan.sampler(apply)

    def forward(params: Params, x, target, y, t):
        return [apply(params, x, t[stage], y, stage) for stage in range(len(t))]

    def loss(params: Params, x, target, y, t):
        outputs = forward(params, x, target, y, t)
        return sum(jnp.mean(jnp.square(out - target)) for out in outputs)

    def samples(params: Params, x, target, y, t):
        return solve(params, x, y) - x  # how far: the noise itself has no error

    def call(function: Callable[..., Any]) -> Callable[[], Any]:
        def result() -> Any:
            with jax.default_matmul_precision("highest"), jax.default_device(device):
                return jax.device_get(jax.jit(function)(*inputs))

        return _once(result)

    functions = {"forward": forward, "gradient": jax.grad(loss), "samples": samples}
    return {name: call(function) for name, function in functions.items()}


def _params(model: ModelConfig) -> Any:
    """The same values on every device: made on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(random_params(model))
