"""Re-ttention against arrays of the authors' code (cccrrrccc/Re-ttention).

Theirs keeps what is missing after the output projection (and lets rho grow past 1, which is put
back here); steps 5, 10 and 15 are those that keep it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ppflow_jax.systems.rettention import band_attention, full_attention, half_width, in_band
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

KEEPS = (5, 10, 15)


def rows(ref: Reference) -> Iterator[Row]:
    for case in sorted({name.split("/")[0] for name in ref.arrays if name.endswith("/args")}):
        given = ref.below(case)
        for name, ours in run(json.loads(str(given["args"])), given).items():
            yield from ref.row(f"{case}/{name}", ours)


def run(args: dict[str, Any], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads, tokens, batch = args["heads"], args["N"], args["B"]
    half = half_width(tokens, args["sparsity"])
    prefix = "model/"
    weights = {k[len(prefix) :]: jnp.float32(v) for k, v in given.items() if k.startswith(prefix)}

    def linear(name: str, x: Any, bias: bool = True) -> Any:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"][None, None] if bias else y

    def leaves(x: Any, out: Any, bias: bool = True) -> Any:
        y = linear("to_out.0", out.reshape(batch, tokens, -1), bias)
        return (y + x if args["resid"] and bias else y) / args["rescale"]

    rho = jnp.zeros((batch, tokens, heads))
    outside = jnp.zeros((batch, tokens, heads, args["dim"] // heads))
    found: dict[str, list] = {"mask": in_band(tokens, half)}
    for i, x in enumerate(jnp.float32(given["x"]), args["first"]):
        q, k, v = (linear(f"to_{n}", x).reshape(batch, tokens, heads, -1) for n in "qkv")
        whole, (new, beyond) = full_attention(q, k, v, half)
        seen = rho if args["use_ratio"] else jnp.ones_like(rho)
        if full := i < 5 or i in KEEPS:
            rho = new
        if i in KEEPS:
            outside = beyond
            if not args["use_ratio"]:
                outside = whole - band_attention(q, k, v, half, seen, jnp.zeros_like(beyond))
        out = whole if full else band_attention(q, k, v, half, seen, outside)
        if not full:
            rho = rho + 0.04
        for name, value in {
            "out": leaves(x, out),
            "full_out": leaves(x, whole),
            "ratio_after": jnp.swapaxes(rho, 1, 2).reshape(batch * heads, tokens, 1),
            "residual_after": leaves(x, outside, bias=False),
        }.items():
            found.setdefault(name, []).append(np.asarray(value))
    return {name: np.stack(values) for name, values in found.items()}
