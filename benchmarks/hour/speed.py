"""Training steps and sampling of B and XL in bfloat16, beside plain matrix products."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hour.device import ceiling, peak_bytes, quartiles, timed
from benchmarks.hour.models import PYRAMIDS, config_of, euler, fitting, random_params, sampler
from benchmarks.hour.work import Job, Work, same_device
from ppflow_jax.devices.programs import for_passes, for_training
from ppflow_jax.flow.cost import sampling_flops, training_flops
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import state_from
from ppflow_jax.train.step import compiled, make_train_step

SAMPLED, STEPS, SCALE = 128, 8, 1.5  # images at once, Euler steps, guidance
SECONDS = 3.0  # of timed rounds
# In the order in which they are wanted, if time should not be enough
ORDER = (("XL", "SiT"), ("XL", "2 levels"), ("B", "SiT"), ("B", "2 levels"))
ORDER += (("XL", "3 levels"), ("B", "3 levels"))


def run(work: Work) -> None:
    same_device(work.settings)
    work.each(_jobs(work))


def _jobs(work: Work) -> Iterator[Job]:
    for train in (True, False):
        for size, name in ORDER[1:3] if work.tiny else ORDER:
            given = work, size, name
            if train:
                yield f"train {size} {name}", lambda given=given: _training(*given)
            else:
                free = "" if name == "SiT" else ", first stage unguided"
                yield f"sample {size} {name}{free}", lambda given=given: _sampling(*given)


def _training(work: Work, size: str, name: str) -> dict[str, Any]:
    """The largest batch that fits; those that did not are in the row."""
    model = config_of(size, PYRAMIDS[name], work.tiny)
    # SiT's, so that the pyramids of a size have the same
    batches = fitting(config_of(size, PYRAMIDS["SiT"], work.tiny), work.settings.device["memory"])
    tried: list[int] = []
    for batch in batches:
        try:
            return _step(work, model, batch) | _names(size, name) | {"did_not_fit": tried}
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e) or batch == batches[-1]:
                raise
            tried.append(batch)
        gc.collect()  # what the failed step held
    raise AssertionError("the last batch returns or raises")


def _names(size: str, name: str) -> dict[str, Any]:
    return {"size": size, "model": name}


def _step(work: Work, model: ModelConfig, batch: int) -> dict[str, Any]:
    """Draws, loss, gradients, AdamW and EMA, as `main` trains."""
    programs = for_training("auto", jnp.bfloat16, head=model.head_width)
    apply = make_apply(model, dtype=jnp.bfloat16, programs=programs)
    tx = make_optimizer(OptimConfig(), 1)
    objective = FlowObjective(model.pyramid, Flow(), model.null_label)
    objective.check_batch(batch, 1)
    step = compiled(make_train_step(objective, apply, tx, ema=0.9999), programs)
    state = jax.jit(lambda params: state_from(params, tx))(random_params(model))
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (batch, *model.shape))
    data = {"x": x, "label": jnp.arange(batch, dtype=jnp.int32) % model.num_classes}
    begin = time.perf_counter()
    program = step.lower(state, data, key).compile()
    compiling = time.perf_counter() - begin

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, data, key)
        return metrics

    flops = training_flops(model, objective.pattern, batch)
    row = _row(work, call, flops, batch) | {"attention": programs.attention}
    loss = float(call()["loss"])
    row |= {"compile_seconds": compiling, "loss": loss, "good": bool(np.isfinite(loss))}
    return row | {"memory_bytes": _memory(program), "kind": "train"}


def _sampling(work: Work, size: str, name: str) -> dict[str, Any]:
    """Euler steps, guided but in the first of several stages."""
    model, batch = config_of(size, PYRAMIDS[name], work.tiny), 4 if work.tiny else SAMPLED
    levels = len(model.pyramid)
    plan = euler(model, STEPS, *((1.0,) * (levels > 1) + (SCALE,) * max(1, levels - 1)))
    begin = time.perf_counter()
    call, program = sampler(plan, random_params(model), batch)
    compiling = time.perf_counter() - begin
    row = _row(work, call, batch * sampling_flops(model, plan.segments), batch)
    row |= {"compile_seconds": compiling, "memory_bytes": _memory(program), "kind": "sample"}
    row["attention"] = for_passes("auto", jnp.bfloat16, head=model.head_width).attention
    finite = bool(jnp.all(jnp.isfinite(call())))
    return row | _names(size, name) | {"nfe": plan.nfe, "good": finite}


def _row(work: Work, call: Callable[[], Any], flops: int, batch: int) -> dict[str, Any]:
    """Times of `call` and of matrix products in the same rounds.

    `peak_bytes` is the process's so far: of this row only if `peak_grew`.
    """
    products, before = ceiling(work.tiny), peak_bytes()
    most = 3 if work.tiny else 15
    seconds = timed({"row": call, "products": products.call}, SECONDS, most=most)
    products.seconds = seconds["products"]
    median, after = float(np.median(seconds["row"])), peak_bytes()
    rate, peak = flops / median, work.settings.device["peak"]
    row = {
        "batch": batch,
        "seconds": median,
        "quartiles": quartiles(seconds["row"]),
        "images_per_second": batch / median,
        "flops": flops,
        "rate": rate,
        "ceiling": products.rate,
        "of_ceiling": rate / products.rate,
        "of_peak": rate / peak if peak else None,
        "peak_bytes": after,
        "peak_grew": None if after is None else after > (before or 0),
    }
    said = f"{row['images_per_second']:.1f} images/s, batch {batch}"
    return row | {"said": f"{said}, {row['of_ceiling']:.0%} of the ceiling"}


def _memory(program: Any) -> int:
    """Bytes as the compiler counts."""
    m = program.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return held + m.temp_size_in_bytes
