"""Guided distillation against arrays of the progressive-distillation release and of diffusers.

The release has a cosine schedule, here a path whose time is -phi, with data cos(phi) and noise
sin(phi): its velocity is the release's v with the other sign. Arrays on the linear path are a
restatement, in float64, of what the two papers say for flows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import LINEAR, Flow, Path, expand, interpolate
from ppflow_jax.models.conditions import GUIDANCE, LABEL, Scalar, sinusoid
from ppflow_jax.models.network import Output
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.distillation_rows import Rows, ddim, ends, one_step, predict
from ppflow_jax.systems.guided_distillation import Guided, Halved
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

ANGLES, SCHEDULE = 5e-4, 1e-4  # of the largest value
RESTATED = 5  # times 2e-6 of the largest value: float64 arrays, computed here in float32
COSINE = Path(
    "cosine",
    alpha=jnp.cos,
    d_alpha=lambda t: -jnp.sin(t),
    sigma=lambda t: -jnp.sin(t),
    d_sigma=lambda t: -jnp.cos(t),
    alpha_ratio=lambda t: -jnp.tan(t),
)


def rows(ref: Reference) -> Iterator[Row]:
    if "w" in ref and "embedding_256" in ref:
        yield from embedding(ref)
    if "teacher/W1" in ref:
        yield from stage_one(ref)
        yield from linear(ref)
        for kind in ("v", "x"):
            yield from cosine(ref, kind)
        yield from samples(ref)


def embedding(ref: Reference) -> Iterator[Row]:
    """The scale among the features of time.

    Float32 angles of the library are off by up to 7e-4, which its estimate of its own error, from
    the same angles, leaves out of everything after them.
    """
    w = jnp.asarray(ref["w"])
    for size in (256, 512, 7):
        yield from ref.row(f"embedding_{size}", sinusoid(w, size, 1000.0))
    weights, given = ref.below("time_embedding"), jnp.asarray(ref["time_embedding_in"])

    def out(weights):
        more = Scalar("guidance").vector(lambda x: x @ weights["cond_proj.weight"].T, w)
        hidden = (given + more) @ weights["linear_1.weight"].T + weights["linear_1.bias"][None]
        return jax.nn.silu(hidden) @ weights["linear_2.weight"].T + weights["linear_2.bias"][None]

    yield from _bounded(ref, "time_embedding_out", out(weights), ANGLES)
    whole = jax.grad(lambda w: jnp.sum(out(w) * ref["time_embedding_cotangent"]))
    for name, value in whole(weights).items():
        yield from _bounded(ref, f"time_embedding_grad/{name}", value, ANGLES)


def toy(path: Path | None = None, gives: str = "v"):
    """The network of the file as ours; without a path t is the log-SNR itself.

    Of v the network of the file has the other sign on the cosine path.
    """

    def apply(params, zs, ts, ys, stages):
        return tuple(Output(one(params, *each), {}) for each in zip(zs, ts, ys))

    def one(p, z, t, y):
        snr = t
        if path is not None:
            snr = 2 * jnp.log(path.alpha(t) / path.sigma(t)) if path is COSINE else 20 * t - 10
        w = y.get(GUIDANCE, jnp.zeros(len(z)))
        told = (snr / 20)[:, None] * p["a"][None] + w[:, None] * p["b"][None] + p["table"][y[LABEL]]
        out = (
            jnp.tanh(z @ p["W1"] + told[:, None, None]) @ p["W2"]
            + z @ p["W3"]
            + p["b2"][None, None, None]
        )
        if path is not COSINE:
            return out
        if gives == "v":
            return -out
        alpha, sigma = expand(path.alpha(t)), expand(path.sigma(t))
        return sigma * out - alpha * (z - alpha * out) / sigma

    return apply


def network(ref: Reference, name: str) -> dict[str, jax.Array]:
    return {k: jnp.float32(v) for k, v in ref.below(name).items()}


def samples_of(ref: Reference, z, t, end) -> Rows:
    z, t, end = (jnp.float32(a) for a in (z, t, end))
    return Rows(z, t, end, jnp.int32(ref["y"]), 1 + jnp.float32(ref["w"]))


def stage_one(ref: Reference) -> Iterator[Row]:
    """The guided target, of a scale that is the file's w plus 1."""
    snr = ref["stage1/logsnr"]
    now, base = samples_of(ref, ref["stage1/z_t"], snr, snr), _base(ref)
    teacher, student = network(ref, "teacher"), network(ref, "student")
    (v_c,) = predict(toy(), teacher, (now,), told=False)
    yield from ref.row("stage1/v_cond", v_c, RESTATED)
    (target,) = Guided().targets(base, toy(), teacher, (now,))
    yield from ref.row("stage1/v_target", target, RESTATED)
    (ours,) = predict(toy(), student, (now,))
    yield from ref.row("stage1/v_student", ours, RESTATED)
    error = jnp.mean(jnp.square(ours - target), axis=(1, 2, 3))
    yield from ref.row("stage1/v_mse", error, RESTATED)


def _base(ref: Reference) -> FlowObjective:
    return FlowObjective(SIT, Flow(), ref.config["classes"])


def linear(ref: Reference) -> Iterator[Row]:
    """A step of a student on the linear path, and its target."""
    if "flow/t_start" not in ref:
        return
    steps = ref.config["num_steps"]
    part = (steps - 1 - ref["i"]) / steps
    yield from ref.row("flow/t_start", part, RESTATED)
    yield from ref.row("flow/t_end", part + 1 / steps, RESTATED)
    start = samples_of(ref, ref["flow/z_start"], ref["flow/t_start"], ref["flow/t_end"])
    teacher, apply = network(ref, "teacher"), toy(LINEAR)
    (first,) = predict(apply, teacher, (start,))
    yield from ref.row("flow/v_first", first, RESTATED)
    middle = jnp.float32(ref["flow/t_mid"])
    halfway = start._replace(z=ddim(LINEAR, first, start.z, start.t, middle), t=middle)
    yield from ref.row("flow/z_mid", halfway.z, RESTATED)
    (second,) = predict(apply, teacher, (halfway,))
    yield from ref.row("flow/v_second", second, RESTATED)
    arrived = ddim(LINEAR, second, halfway.z, middle, start.end)
    yield from ref.row("flow/z_end", arrived, RESTATED)
    (target,) = Halved(steps).targets(_base(ref), apply, teacher, (start,))
    yield from ref.row("flow/v_target", target, 2 * RESTATED)
    data = ends(LINEAR, target, start.z, start.t)[1]
    yield from ref.row("flow/x1_target", data, 2 * RESTATED)


def angles(ref: Reference, u: np.ndarray) -> jax.Array:
    """Our time of the file's u, which is 1 for noise; at 0 there is none left."""
    low, high = (np.arctan(np.exp(-ref.config[f"logsnr_{k}"] / 2)) for k in ("max", "min"))
    return jnp.float32(np.where(u > 0, -(low + (high - low) * u), 0.0))


def cosine(ref: Reference, kind: str) -> Iterator[Row]:
    """Two steps of the release's teacher and the student's target, from a network of v or of x."""
    name, steps = f"stage2/{kind}", ref.config["num_steps"]
    if f"{name}/z_t" not in ref:
        return
    u = (ref["i"] + 1) / steps
    t, middle, end = (angles(ref, u - part / steps) for part in (0, 0.5, 1))
    data, noise = (jnp.float32(ref[k]) for k in ("x", "eps"))
    z, v = interpolate(COSINE, noise, data, t)
    yield from _bounded(ref, f"{name}/z_t", z)
    if kind == "v":
        yield from _of_schedule(ref, u, v)
    teacher, apply = network(ref, "teacher"), toy(COSINE, kind)
    start = samples_of(ref, z, t, end)
    (first,) = predict(apply, teacher, (start,))
    halfway = start._replace(z=ddim(COSINE, first, z, t, middle), t=middle)
    yield from _bounded(ref, f"{name}/z_mid", halfway.z)
    (second,) = predict(apply, teacher, (halfway,))
    target = one_step(COSINE, z, t, ddim(COSINE, second, halfway.z, middle, end), end)
    eps, x = ends(COSINE, target, z, t)
    for what, ours in (("x_target", x), ("eps_target", eps), ("v_target", -target)):
        yield from _bounded(ref, f"{name}/{what}", ours)
    if f"{name}/v_mse/loss" not in ref:
        return

    def errors(params):
        (ours,) = predict(apply, params, (start,))
        return jnp.mean(jnp.square(ours - target), axis=(1, 2, 3))

    student = network(ref, "student")
    yield from _bounded(ref, f"{name}/v_mse/loss", errors(student))
    for leaf, value in jax.grad(lambda p: jnp.mean(errors(p)))(student).items():
        yield from _bounded(ref, f"{name}/v_mse/grad/{leaf}", value)


def _of_schedule(ref: Reference, u: np.ndarray, v: jax.Array) -> Iterator[Row]:
    """Data and noise from v, and v from both, at the log-SNR of stage one."""
    t = -jnp.arctan(jnp.exp(-jnp.float32(ref["stage1/logsnr"]) / 2))
    data, noise = (jnp.float32(ref[k]) for k in ("x", "eps"))
    yield from ref.row("convert/v_from_x_eps", -interpolate(COSINE, noise, data, t)[1])
    yield from ref.row("convert/x_from_v", ends(COSINE, -data, noise, t)[1])


def samples(ref: Reference) -> Iterator[Row]:
    """Trajectories of the teacher, whose last step ends in data."""
    for name in ref.below("ddim"):
        steps = int(name.partition("/")[0])
        z, apply = jnp.float32(ref["z_T"]), toy(COSINE)
        found = [z]
        for k in reversed(range(steps)):
            t, end = (angles(ref, np.full(len(z), i / steps)) for i in (k + 1, k))
            (v,) = predict(apply, network(ref, "teacher"), (samples_of(ref, z, t, end),))
            z = ddim(COSINE, v, z, t, end)
            found.append(z)
        yield from _bounded(ref, f"ddim/{name}", jnp.stack(found))


def _bounded(ref: Reference, name: str, ours: jax.Array, part: float = SCHEDULE) -> Iterator[Row]:
    """Beside the array of that name, if it is there, within a part of its largest value.

    That of the schedule is the README's: float32 rounds its ends so much.
    """
    if name in ref:
        theirs = ref[name]
        error = np.max(np.abs(np.float64(ours) - np.float64(theirs)))
        yield Row(
            f"{ref.name} {name}", float(error), part * max(1.0, float(np.max(np.abs(theirs))))
        )
