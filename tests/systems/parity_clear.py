"""CLEAR against arrays of the authors' code (Huage001/CLEAR).

There are tokens of a text besides those of the picture: keys that all see, as `more` has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.systems.clear import axes, local_attention, pooled
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

TRAINED = 4608  # tokens, for the proportional scale of the original


def rows(ref: Reference) -> Iterator[Row]:
    for name in ref.below("mask"):
        if not name.endswith("keys_per_query"):
            yield from mask(ref, name)
    for name in ref.arrays:
        if name.startswith("attn/") and name.endswith("/args"):
            yield from attention(ref, name.removesuffix("/args"))


def mask(ref: Reference, name: str) -> Iterator[Row]:
    rows, cols, text, radius = (int(part.lstrip("hwtexr")) for part in name.split("_"))
    packed = ref[f"mask/{name}"]
    theirs = np.unpackbits(packed, axis=1)[text:, text : text + rows * cols]
    differ = np.sum(seen((rows, cols), radius) != theirs)
    yield Row(f"clear mask/{name}", int(differ), 0, "differ")


def seen(grid: tuple[int, int], radius: int) -> np.ndarray:
    """Which keys [n, n] our tiles see."""
    found = np.zeros((*grid, *grid), int)
    rows, cols = axes(grid, radius)
    for i, top in enumerate(rows.starts):
        for j, left in enumerate(cols.starts):
            near = rows.squares[i][:, None, :, None] + cols.squares[j][None, :, None] < radius**2
            y, x = i * rows.tile, j * cols.tile
            found[
                y : y + rows.tile,
                x : x + cols.tile,
                top : top + rows.keys,
                left : left + cols.keys,
            ] = near
    return found.reshape(grid[0] * grid[1], -1)


def attention(ref: Reference, case: str) -> Iterator[Row]:
    settings = json.loads(str(ref[f"{case}/args"]))
    x, text = (jnp.asarray(ref[f"{case}/{name}"]) for name in ("x", "text"))
    leaves = {name: jnp.asarray(w) for name, w in ref.below(f"{case}/model").items()}

    def run(leaves, x, text, radius=settings["r"]):
        return outputs(ref, case, settings, leaves, x, text, radius)

    bound = {k: max(1e-5, 10 * float(ref[f"deviation64/{case}/{k}"])) for k in ("out", "grad_x")}
    out = jax.jit(run)(leaves, x, text)
    full = {} if settings["f"] > 1 else jax.jit(lambda *a: run(*a, radius=1000))(leaves, x, text)
    for i, found in enumerate(zip(*(o for o in (out, full) if o))):
        for name, ours in zip(("out", "full_out"), found):
            yield from _row(ref, f"{case}/{name}{i}", ours, bound["out"])

    def total(leaves, x, text):
        found = run(leaves, x, text)
        return sum(jnp.sum(o * ref[f"{case}/cotangent{i}"]) for i, o in enumerate(found))

    if f"{case}/cotangent0" not in ref:
        return
    g, gx, gtext = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(leaves, x, text)
    yield from _row(ref, f"{case}/grad_x", gx, bound["grad_x"])
    yield from _row(ref, f"{case}/grad_text", gtext, bound["grad_x"])
    for leaf, name in (("to_k.weight", "to_k_weight"), ("spatial_weight", "spatial_weight")):
        if leaf in g:
            size = float(np.abs(g[leaf]).max())
            yield from _row(ref, f"{case}/grad_{name}", g[leaf], bound["grad_x"] * max(1, size))


def outputs(ref, case, settings, w, x, text, radius) -> tuple[jax.Array, ...]:
    """Of picture and text, or of both in one stream, text first."""
    grid, heads = (settings["h"], settings["w"]), settings["heads"]
    cut, tokens = text.shape[1], text.shape[1] + x.shape[1]
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if settings["joint"] else ()

    def project(i: int, name: str) -> jax.Array:
        linear = lambda name, x: (
            x @ w[f"{name}.weight"].T + w[f"{name}.bias"][None, None]
        ).reshape(*x.shape[:2], heads, -1)
        both = [linear(names[i] if names else name, text), linear(name, x)]
        if i < 2:
            kind = "qk"[i]
            norms = (f"norm_added_{kind}" if names else f"norm_{kind}", f"norm_{kind}")
            both = [rms(part, w[f"{n}.weight"]) for part, n in zip(both, norms)]
        joined = jnp.concatenate(both, axis=1)
        return turned(joined, ref[f"{case}/cos"], ref[f"{case}/sin"]) if i < 2 else joined

    q, k, v = (project(i, name) for i, name in enumerate(("to_q", "to_k", "to_v")))
    if settings["prop"]:
        n = tokens * (10 if settings["f"] > 1 else 1)
        q = q * (np.log(n) / np.log(TRAINED)) ** 0.5
    more = k[:, :cut], v[:, :cut]
    if settings["f"] > 1:
        weight = w["spatial_weight"].squeeze()
        cells = (pooled(weight, a[:, cut:], grid) for a in (k, v))
        more = tuple(jnp.concatenate(pair, axis=1) for pair in zip(more, cells))
    picture = local_attention(q[:, cut:], k[:, cut:], v[:, cut:], grid, radius, more)
    of_text = jax.nn.dot_product_attention(q[:, :cut], k, v)
    picture, of_text = (a.reshape(*a.shape[:2], -1) for a in (picture, of_text))
    if not names:
        return (jnp.concatenate([of_text, picture], axis=1),)
    pairs = ((picture, "to_out.0"), (of_text, "to_add_out"))
    return tuple(a @ w[f"{name}.weight"].T + w[f"{name}.bias"][None, None] for a, name in pairs)


def rms(x: jax.Array, weight: jax.Array) -> jax.Array:
    return (
        x
        * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        * weight[None, None, None]
    )


def turned(x: jax.Array, cos: np.ndarray, sin: np.ndarray) -> jax.Array:
    """Rotary positions on pairs of neighbours."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos[None, :, None] + rotated * sin[None, :, None]


def _row(ref: Reference, name: str, ours: jax.Array, bound: float) -> Iterator[Row]:
    if name in ref:
        error = np.max(np.abs(np.float64(ours) - np.float64(ref[name])))
        yield Row(f"clear {name}", float(error), bound)
