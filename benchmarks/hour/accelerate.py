"""Rows of the table of accelerators at full batch: latency beside FLOPs, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.fast_sampling import Setting, settings
from benchmarks.hour.device import ratio, timed
from benchmarks.hour.models import (
    PYRAMIDS,
    card_of,
    config_of,
    euler,
    random_params,
    sampler,
    tuned,
)
from benchmarks.hour.work import Job, Work, same_device
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.plan import Plan, make_plan
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.systems.accelerate import AccelerateConfig, with_preset

SIZE, STEPS, CFG, BATCH = "B", 24, 2.0, 128
COUNTS = {"SiT": (8,), "3 levels": (3, 2, 3)}  # of the tuned plan of 8 evaluations
# Names of `fast_sampling.settings`, in the order in which they are wanted
WANTED = (
    *("guided everywhere", "exact: coarse stage unguided", "preset balanced", "preset fast"),
    *("tuned plan of 8", "TaylorSeer, interval 3, order 1", "FORA, interval 2", "SDTM", "ToMe"),
    *("DeepCache, middle third", "HiCache, interval 3, order 2", "Adams-Bashforth 2, interval 2"),
    *("Euler 12", "ab2 12"),
)


def run(work: Work) -> None:
    same_device(work.settings)
    work.each(_jobs(work.tiny))


def _jobs(tiny: bool) -> Iterator[Job]:
    params: dict[str, Any] = {}
    base: list[Any] = []

    def of(model: ModelConfig, title: str) -> Any:
        if title not in params:
            params[title] = random_params(model)
        return params[title]

    def reference() -> tuple[Callable[[], Any], int]:
        """SiT with plain steps: its call and FLOPs."""
        if not base:
            sit = config_of(SIZE, PYRAMIDS["SiT"], tiny)
            plan = euler(sit, STEPS, CFG)
            call, _ = sampler(plan, of(sit, "SiT"), _batch(tiny))
            base.append((call, sampling_flops(sit, plan.segments)))
        return base[0]

    for name in WANTED[4:6] if tiny else WANTED:
        for title in COUNTS:
            model = config_of(SIZE, PYRAMIDS[title], tiny)
            found = [s for s in settings(STEPS, len(model.pyramid), model.depth) if s.name == name]
            for s in found:
                given = model, title, s
                yield (
                    f"{title}: {name}",
                    lambda given=given: _measured(*given, of, reference, tiny),
                )


def _batch(tiny: bool) -> int:
    return 2 if tiny else BATCH


def _measured(
    model: ModelConfig,
    title: str,
    s: Setting,
    params: Callable[[ModelConfig, str], Any],
    reference: Callable[[], tuple[Callable[[], Any], int]],
    tiny: bool,
) -> dict[str, Any]:
    """Beside SiT's plain steps, in the same rounds."""
    plan, (base, of_base) = plan_of(model, title, s), reference()
    call, _ = sampler(plan, params(model, title), _batch(tiny))
    seconds = timed({"base": base, "row": call}, 2.0, most=3 if tiny else 9)
    row: dict[str, Any] = {"model": title, "name": s.name, "nfe": plan.nfe, "batch": _batch(tiny)}
    row["seconds"] = float(np.median(seconds["row"]))
    row["latency"] = ratio(seconds["row"], seconds["base"])
    row["flops"] = sampling_flops(model, plan.segments) / of_base
    return row | {"said": f"{row['latency']:.2f} of SiT's time, {row['flops']:.2f} of its FLOPs"}


def plan_of(model: ModelConfig, title: str, s: Setting) -> Plan:
    """The plan of a row for a model."""
    scales = (CFG,) * len(model.pyramid)
    if s.scales == "free":
        scales = (1.0, *scales[1:])
    if s.kind == "plan":
        return tuned(model, COUNTS[title], scales)
    config = with_preset(SamplerConfig(s.solver, s.steps, cfg=scales), s.accelerate, model)
    return make_plan(card_of(model), config, AccelerateConfig.parse(s.accelerate))
