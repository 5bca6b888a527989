"""Programs of attention in bfloat16, heads of 64 and 72: what `auto` is, agreement, times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hour.device import timed
from benchmarks.hour.parity import difference
from benchmarks.hour.work import Job, Work, same_device
from ppflow_jax.devices.programs import auto_attention, cudnn_takes
from ppflow_jax.models.attention import SPLASH_TOKENS, attend

HEADS = {64: 12, 72: 16}  # of B and XL: width of a head and how many
TOKENS = (64, 128, 256, 1024)
ROWS = 32_768  # tokens of a call, all images together
LOOPS = 10  # calls of a program one after another, so that starting it does not count
OWN = {"gpu": "cudnn", "tpu": "splash", "cpu": "deferred"}
# Of the relative root mean square, against float32: bfloat16 has 8 bits.
BOUNDS = {"forward": 1e-2, "backward": 2e-2}


def run(work: Work) -> None:
    same_device(work.settings)
    work.each(_jobs(work.settings.device["platform"], work.tiny))


def _jobs(platform: str, tiny: bool) -> Iterator[Job]:
    for head in HEADS:
        for dtype in ("bfloat16", "float32"):
            choice = platform, dtype, head
            yield f"auto, heads of {head}, {dtype}", lambda choice=choice: _choice(*choice)
    own = OWN.get(platform, "xla")
    for tokens in (16,) if tiny else TOKENS:
        taken = own != "splash" or tokens >= SPLASH_TOKENS  # below it is the plain one
        for head, heads in HEADS.items():
            for name in dict.fromkeys(("xla", own) if taken else ("xla",)):
                rows = max(1, (64 if tiny else ROWS) // tokens)
                shape = (rows, tokens, heads, head)
                key = f"{name}, {tokens} tokens, heads of {head}"
                yield key, lambda name=name, shape=shape, tiny=tiny: _measured(name, shape, tiny)
    if platform == "gpu":
        for shape in ((4, 65, 2, 64), (4, 64, 2, 36)):
            key = f"fallback, {shape[1]} tokens, heads of {shape[3]}"
            yield key, lambda shape=shape: _fallback(shape)
    else:
        yield (
            "fallback",
            lambda: {"said": "cuDNN's attention is for GPUs only: nothing to fall from"},
        )


def _choice(platform: str, dtype: str, head: int) -> dict[str, Any]:
    name, why = auto_attention(platform, jnp.dtype(dtype), head)
    return {"choice": name, "why": why, "said": f"{name}: {why}"}


def _measured(name: str, shape: tuple[int, ...], tiny: bool) -> dict[str, Any]:
    """Agreement with float32 of highest precision, and times, of a call and of its gradient."""
    row: dict[str, Any] = {"program": name, "shape": list(shape)}
    row |= _agreement(name, (min(4, shape[0]), *shape[1:]))
    loops = 2 if tiny else LOOPS
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in _arrays(shape)]
    calls = {}
    for kind, function in (("forward", _forward), ("backward", _gradient)):
        looped = jax.jit(_looped(function, name, loops))
        calls[kind] = lambda looped=looped: looped(*arrays)
    for kind, seconds in timed(calls, 0.5, most=3 if tiny else 15).items():
        row[f"{kind}_ms"] = 1e3 * float(np.median(seconds)) / loops
    row["said"] = (
        f"{row['forward_ms']:.3f} ms, with gradient {row['backward_ms']:.3f}; differs by "
        f"{row['forward']:.1e}, {row['backward']:.1e}"
    )
    return row


def _forward(name: str, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
    return attend(name, q, k, v)


def _gradient(name: str, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
    """Forward, and backward from g."""
    out, backward = jax.vjp(lambda *qkv: attend(name, *qkv), q, k, v)
    return out, *backward(g)


def _looped(function: Any, name: str, loops: int) -> Any:
    """Calls that depend on each other, so that none is left out."""

    def run(q, k, v, g):
        def body(_, q):
            found = jax.tree.leaves(function(name, q, k, v, g))
            return q + jnp.asarray(1e-3, q.dtype) * sum(found)

        return jax.lax.fori_loop(0, loops, body, q)

    return run


def _agreement(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    arrays = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in _arrays(shape)]
    ours = jax.jit(_gradient, static_argnums=0)(name, *(jnp.asarray(a, "bfloat16") for a in arrays))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(_gradient, static_argnums=0)("xla", *map(jnp.asarray, arrays))
    ours, exact = jax.device_get((ours, exact))
    row: dict[str, Any] = {"forward": difference(ours[:1], exact[:1])}
    row["backward"] = difference(ours[1:], exact[1:])
    return row | {"good": all(row[name] <= bound for name, bound in BOUNDS.items())}


def _fallback(shape: tuple[int, ...]) -> dict[str, Any]:
    """Shapes that cuDNN does not take, asked of it, are the plain program's."""
    q, k, v, g = (jnp.asarray(a, jnp.bfloat16) for a in _arrays(shape))
    given, plain = (
        jax.jit(_gradient, static_argnums=0)(name, q, k, v, g) for name in ("cudnn", "xla")
    )
    same = difference(*jax.device_get((given, plain)))
    good = not cudnn_takes(shape[3], shape[1]) and same == 0
    return {"value": same, "good": good, "said": f"the plain program, difference {same:g}"}


def _arrays(shape: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for _ in range(4)]
