"""Plans of few evaluations against SiT's 50 guided Euler steps: latency with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.hour.device import ratio, timed
from benchmarks.hour.models import config_of, euler, random_params, sampler, tuned
from benchmarks.hour.work import Job, Work, same_device
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.pyramid import PPFLOW3, SIT

STEPS, CFG = 50, 2.0
COUNTS = ((3, 2, 3), (2, 2, 2))  # steps of every stage
SCALES = (1.0, 2.0, 1.0)
BATCHES = (64, 8)


def run(work: Work) -> None:
    same_device(work.settings)
    work.each(_jobs(work.tiny))


def _jobs(tiny: bool) -> Iterator[Job]:
    for batch in (2,) if tiny else BATCHES:
        for size in ("B",) if tiny else ("XL", "B"):
            given = size, batch, tiny
            yield f"{size}, batch {batch}", lambda given=given: _compared(*given)


def _compared(size: str, batch: int, tiny: bool) -> dict[str, Any]:
    """SiT and all plans in turn in every round."""
    slow, fast = (config_of(size, pyramid, tiny) for pyramid in (SIT, PPFLOW3))
    base = euler(slow, 4 if tiny else STEPS, CFG)
    plans = {sum(counts): tuned(fast, counts, SCALES) for counts in COUNTS}
    params = random_params(fast)
    calls = {"SiT": sampler(base, random_params(slow), batch)[0]}
    calls |= {str(nfe): sampler(plan, params, batch)[0] for nfe, plan in plans.items()}
    seconds = timed(calls, 8.0, most=3 if tiny else 9)
    of_base = sampling_flops(slow, base.segments)
    row: dict[str, Any] = {"size": size, "batch": batch, "steps": base.nfe, "plans": []}
    row["sit_seconds"] = float(np.median(seconds["SiT"]))
    for nfe, plan in plans.items():
        one = {"evaluations": nfe, "seconds": float(np.median(seconds[str(nfe)]))}
        one["faster"] = ratio(seconds["SiT"], seconds[str(nfe)])
        one["flops_ratio"] = of_base / sampling_flops(fast, plan.segments)
        row["plans"].append(one)
    times = ", ".join(f"{p['evaluations']} {p['faster']:.1f}x" for p in row["plans"])
    return row | {"said": f"SiT {row['sit_seconds']:.3f} s; evaluations {times}"}
