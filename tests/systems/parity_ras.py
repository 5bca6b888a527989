"""RAS against arrays of the authors' code (microsoft/RAS): what is left out, and what comes of it.

Their rule differs from ours in two places, which are put back here: both ends are ranked with the
same factor, and both parts of what is left out are rounded down. `net/` is of their network, of
which what it predicts is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ppflow_jax.systems.ras import left_out, spread
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

PATCH = (2, 2)
METRICS = {"std": "std", "l2norm": "norm"}


def rows(ref: Reference) -> Iterator[Row]:
    cases = sorted({name.rsplit("/", 1)[0] for name in ref.arrays if name.endswith("/args")})
    for case in cases:
        given = ref.below(case)
        found = run(json.loads(str(given["args"])), given)
        for name, ours in found.items():
            if f"{case}/{name}" in ref:
                ours = ours if ref[f"{case}/{name}"].dtype == bool else np.float64(ours)
                yield from ref.row(f"{case}/{name}", ours)
        if "metric" in given:  # of any size
            error = np.max(np.abs(found["size"] / given["metric"] - 1)[found["chosen"]])
            yield Row(f"{ref.name} {case}/metric, relative", float(error), 1e-5)


def run(args: dict[str, Any], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their sampler on given velocities, by our choice of tokens."""
    steps, sigmas = args["K"], np.float64(given["sigmas"])
    velocity = given["v"] if "v" in given else given["raw"]
    x = np.float64(given["x0"] if "x0" in given else given["x"][0])
    last, out = np.zeros_like(x), np.zeros(args["hw"][0] * args["hw"][1] // 4, bool)
    times = np.zeros(len(out))
    found: dict[str, list] = {"x": [x]}
    for i in range(steps):
        cheap = args["start"] <= i <= args["end"] and i not in args["reset"]
        now = out & cheap
        pixels = np.kron(now.reshape([side // 2 for side in args["hw"]]), np.ones(PATCH)) > 0
        last = np.where(pixels, last, velocity[i])
        step = (sigmas[i + 1] - sigmas[i]) * last
        x = x + step
        changed = jnp.float32(step.transpose(1, 2, 0)[None])
        value = np.float64(spread(changed, PATCH, METRICS[args["metric"]])[0])
        value *= np.exp(args["k"] * (times - (steps + 1)))
        if chosen := args["start"] <= i + 1 < args["end"] and i + 1 not in args["reset"]:
            count = _count(args, given, i + 1, len(out))
            low, high = int(count * (1 - args["high"])), int(count * args["high"])
            ranks = jnp.log(jnp.float32(value / value.max()))[None]
            out = np.asarray(left_out(ranks, ranks, (low, high))[0])
            times = times + out
        for name, entry in {
            "x": x,
            "size": value,
            "chosen": chosen,
            "dropped_for_next": out if chosen else np.zeros_like(out),
            "drop_count": times,
            "active": ~now,
        }.items():
            found.setdefault(name, []).append(entry)
    return {name: np.stack(entries) for name, entries in found.items()}


def _count(args: dict[str, Any], given: dict[str, np.ndarray], step: int, tokens: int) -> int:
    if "skip_num_step" in args:  # a drift that we have not
        return int(given["skip_list"][step])
    return int((1 - args["ratio"]) * tokens)
