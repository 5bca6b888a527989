"""PPCL against arrays of the authors' code (OPPO-Mente-Lab/Qwen-Image-Pruning) and restatements.

Functions and the distillation pass are the release's, on a toy teacher of two streams; probes,
chains and intervals, of which there is no code, are restated in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.systems.linear_probes import (
    Moments,
    chains,
    cka,
    intervals,
    least_squares,
    losses,
    probes_of,
    products_of,
)
from ppflow_jax.systems.ppcl import direction_loss, normalised_l1
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

EXACT = 1e-11  # of float64 against float64, in the unit of the largest value


def rows(ref: Reference) -> Iterator[Row]:
    if "functions/student" in ref:
        yield from functions(ref)
    if "distil/hidden" in ref:
        yield from distillation(ref)
    if "restated/activations" in ref:
        yield from probing(ref)


def functions(ref: Reference) -> Iterator[Row]:
    for few in ("", "_few_rows"):
        if f"functions/X{few}" not in ref:
            continue
        x, y = (ref[f"functions/{name}{few}"].reshape(-1, ref.config["D"]) for name in "XY")
        kernel, bias = least_squares(x, y)
        yield from ref.row(f"functions/weight{few}", kernel.T)
        yield from ref.row(f"functions/bias{few}", bias)
        if not few:  # the same from streamed products: what is fitted there is y - x
            probes = probes_of(streamed(np.stack([x, y])), ridge=0.0)
            yield from ref.row(
                "functions/weight", (probes.kernel[0] + np.eye(x.shape[1])).T, what="streamed"
            )
            yield from ref.row("functions/bias", probes.bias[0], what="streamed")
    student, teacher = (jnp.asarray(ref[f"functions/{n}"]) for n in ("student", "teacher"))
    loss, grad = jax.value_and_grad(lambda s: jnp.mean(normalised_l1(s, teacher)))(student)
    yield from ref.row("functions/normalised_l1", loss)
    yield from ref.row("functions/normalised_l1_grad", grad)


def streamed(tokens: np.ndarray, parts: int = 3) -> Moments:
    """Moments of tokens [points, n, d], added in parts, with the shift of the first."""
    cut = np.array_split(np.float64(tokens), parts, axis=1)
    found = Moments.empty(cut[0].mean(axis=1))
    for part in cut:
        found.add(part.shape[1], *products_of(part - found.shift[:, None]))
    return found


def block(p: dict[str, jax.Array], h: jax.Array, e: jax.Array, t: jax.Array):
    """A block of the toy teacher: both streams after it."""
    time = t[:, None, None] * p["c"][None, None]
    mean = lambda x: x.mean(axis=1, keepdims=True)
    after = h + jnp.tanh(h @ p["a"] + mean(e) @ p["b"] + time)
    return after, e + jnp.tanh(e @ p["e"] + mean(h) @ p["b"])


def distillation(ref: Reference) -> Iterator[Row]:
    leaves = {k: jnp.asarray(v) for k, v in ref.below("distil/teacher").items()}
    layers = [
        {n: leaves[f"transformer_blocks.{i}.{n}"] for n in "abce"} for i in range(len(leaves) // 4)
    ]
    spans = ref.config["iv"]
    t = jnp.asarray(ref["distil/t"])
    states = [(jnp.asarray(ref["distil/hidden"]), jnp.asarray(ref["distil/text"]))]
    for p in layers[: max(last for _, last in spans) + 1]:
        states.append(block(p, *states[-1], t))
    hidden, text = (np.stack([s[i] for s in states[1:]]) for i in (0, 1))
    yield from ref.row("distil/teacher_hidden", hidden)
    yield from ref.row("distil/teacher_text", text)
    yield from ref.row("distil/out", states[-1][0])
    starts = [(first + last) // 2 for first, last in spans]
    yield from ref.row("distil/student_starts_from_block", np.array(starts))

    def parts(students):
        made = [block(s, *states[first], t) for s, (first, _) in zip(students, spans)]
        each = [
            [jnp.mean(direction_loss(ours[i], states[last + 1][i])) for i in (1, 0)]
            for ours, (_, last) in zip(made, spans)
        ]
        return jnp.sum(jnp.stack([v for pair in each for v in pair])), jnp.array(each)

    (loss, each), grads = jax.value_and_grad(parts, has_aux=True)([layers[i] for i in starts])
    yield from ref.row("distil/loss", loss)
    yield from ref.row("distil/loss_per_interval", each)
    for i, grad in enumerate(grads):
        for name, value in grad.items():
            yield from ref.row(f"distil/grad/{i}.{name}", value)


def probing(ref: Reference) -> Iterator[Row]:
    tokens = ref["restated/activations"]
    moments = streamed(tokens)
    probes = probes_of(moments, ridge=0.0)
    similarity = chains(moments, probes)
    upper = np.triu(np.ones(similarity.shape, bool))
    found = {
        "probe_weight": np.swapaxes(probes.kernel, 1, 2),
        "probe_bias": probes.bias,
        "probe_relative_residual": probes.residual,
    }
    for name, ours in found.items():
        if f"restated/{name}" in ref:
            yield from exact(ref, name, ours)
    theirs = ref["restated/cka"]
    yield from exact(ref, "cka", np.where(upper, similarity, theirs))
    delta = losses(similarity)
    yield from exact(ref, "delta", np.where(np.isnan(delta), ref["restated/delta"], delta))
    yield from ref.row("restated/intervals", np.array(intervals(delta)))
    if "restated/cka_pairs" in ref:
        pairs = ref["restated/cka_pairs"]
        ours = [pair_cka(moments, int(i), int(j)) for i, j, _ in pairs]
        yield from exact(ref, "cka_pairs", np.column_stack([pairs[:, :2], ours]))
    for number, case in enumerate(json.loads(str(ref["restated/finder_cases"]))):
        d = np.array([np.nan, *case["delta_of_block_1_on"]])
        ours = [list(span) for span in intervals(np.tile(d, (len(d), 1)))]
        wrong = int(ours != case["intervals"])
        yield Row(f"{ref.name} restated/finder_cases {number}", wrong, 0, "differ")


def pair_cka(moments: Moments, i: int, j: int) -> float:
    """Of the tokens at two points."""
    return cka(*(moments.covariance(*pair) for pair in ((i, j), (i, i), (j, j))))


def exact(ref: Reference, name: str, ours: np.ndarray) -> Iterator[Row]:
    """Two computations in float64, of tokens in float32."""
    theirs = np.nan_to_num(ref[f"restated/{name}"])
    error = np.max(np.abs(np.nan_to_num(ours) - theirs))
    yield Row(f"{ref.name} restated/{name}", float(error), EXACT * max(1, np.max(np.abs(theirs))))
