"""HASTE against arrays of the authors' code (NUS-HPC-AI-Lab/HASTE); times as in parity_repa.

Their keys are rows of 256, which these arrays have; their log of a softmax is infinite where ours
is not, and that array is compared with what it should have been.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.convert.keys import to_torch
from ppflow_jax.flow.path import LINEAR, interpolate
from ppflow_jax.flow.terms import View
from ppflow_jax.models.stack import Taps
from ppflow_jax.systems.haste import AttentionAlign, cross_entropy
from ppflow_jax.systems.repa import Repa, alignment, project
from tests.acceptance.comparison import Row
from tests.systems.parity_repa import grid_of
from tests.systems.sit_reference import (
    Sit,
    close,
    gradient_rows,
    nchw,
    nhwc,
    projector,
    projector_tensors,
)

if TYPE_CHECKING:
    from tests.systems_parity import Reference

BOUND = 1e-5  # of the README, relative
HEADS = 12  # of the teacher
PAIRS = {4: 8, 5: 9, 6: 10, 7: 11}  # layers of the student and of the teacher


def rows(ref: Reference) -> Iterator[Row]:
    if "direct/student4" in ref:
        yield from direct(ref)
    if "full/images" in ref:
        yield from Full(ref).rows()


def direct(ref: Reference) -> Iterator[Row]:
    """The losses of given arrays; what is over all pairs of layers only where all are there."""
    pairs = {s: t for s, t in PAIRS.items() if f"direct/student{s}" in ref}
    student = {s: jnp.asarray(ref[f"direct/student{s}"]) for s in pairs}
    maps = {t: jax.nn.softmax(jnp.asarray(ref[f"direct/teacher{t}"])) for t in pairs.values()}

    def attention(student: dict[int, jax.Array]) -> jax.Array:
        each = [jnp.mean(cross_entropy(student[s], maps[t])) for s, t in pairs.items()]
        return sum(each) / len(PAIRS)

    value, gradient = jax.jit(jax.value_and_grad(attention))(student)
    for s in pairs:
        ours = gradient[s][:, :HEADS]
        yield from close(ref, f"direct/dattention_dstudent{s}", ours, BOUND, 1e-4)
        rest = float(jnp.max(jnp.abs(gradient[s][:, HEADS:]), initial=0))
        yield Row(f"{ref.name} heads of layer {s} beyond the teacher's", rest, 0)
    tokens = [jnp.asarray(ref[f"direct/{name}"]) for name in ("projected", "teacher_feature")]
    projection = jnp.mean(alignment(*tokens))
    yield from close(ref, "direct/projection", projection, BOUND)
    images, noise = nhwc(ref["direct/images"]), nhwc(ref["direct/noise"])
    target = noise - images
    denoising = jnp.mean(jnp.square(nhwc(ref["direct/model_output"]) - target), axis=(1, 2, 3))
    yield from close(ref, "direct/denoising", denoising, BOUND)
    if pairs == PAIRS:
        yield from close(ref, "direct/attention", value, BOUND)
        far = attention({s: 60 * logits for s, logits in student.items()})
        yield from close(ref, "direct/attention_student_times60", far, BOUND)
        entropy = -sum(jnp.mean(jnp.sum(m * jnp.log(m), -1)) for m in maps.values()) / len(maps)
        yield from close(ref, "direct/teacher_entropy", entropy, BOUND)
        weights = ref.config["proj_coeff"], ref.config["attn_coeff"]
        total = jnp.mean(denoising) + weights[0] * projection + weights[1] * value
        yield from close(ref, "direct/total", total, BOUND)


def teacher_logits(ref: Reference) -> jax.Array:
    """What the field holds: of all layers, without the row and the column of the class token."""
    found = []
    for x, layer in zip(ref["teacher/x"], PAIRS.values()):
        weight, bias = (ref[f"teacher/{layer}/qkv.{part}"] for part in ("weight", "bias"))
        qkv = (x @ weight.T + bias).reshape(*x.shape[:2], 3, HEADS, -1)
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        found.append(np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1]))
    return jnp.asarray(np.stack(found, axis=1)[..., 1:, 1:], jnp.float32)


class Full:
    """The student with both terms."""

    def __init__(self, ref: Reference):
        self.ref, settings = ref, ref.config
        self.sit = Sit(ref, settings["num_heads"], ("projectors.",))
        self.terms = {
            "projection": Repa(
                settings["encoder_depth"], (settings["z_dim"],), settings["projector_dim"]
            ),
            "attention": AttentionAlign(tuple(PAIRS)),
        }
        self.weights = {"projection": settings["proj_coeff"], "attention": settings["attn_coeff"]}
        self.own = {"teacher": projector(self.sit.others, "projectors.0")}

    def rows(self) -> Iterator[Row]:
        ref, sit = self.ref, self.sit
        x1, noise = nhwc(ref["full/images"]), nhwc(ref["full/noise"])
        y, t = jnp.asarray(ref["full/y"], jnp.int32), jnp.asarray(ref["full/t"])
        xt, velocity = interpolate(LINEAR, noise, x1, 1 - t)
        yield from close(ref, "full/x_t", nchw(xt), BOUND)
        grid = sit.config.pyramid.grid(0, sit.config.latent_size)
        fields = {
            "teacher": grid_of(ref["full/teacher_feature"], grid),
            "teacher_attention": teacher_logits(ref),
        }
        sample = jnp.swapaxes(fields["teacher_attention"], 0, 1)[:, :, :3, :4]
        yield from close(ref, "teacher/logits_sample", sample, BOUND)
        taps = Taps(h=self.terms["projection"].taps.h, logits=tuple(range(8)))
        found = sit(sit.params, xt, t, y, taps)
        yield from close(ref, "full/out", nchw(found.prediction), BOUND)
        logits = jnp.stack([found.taps[f"logits/{i}"][:, ::5, :4] for i in range(8)])
        yield from close(ref, "full/student_logits_sample", logits, BOUND)
        h = found.taps[f"h/{taps.h[0]}"]
        yield from close(ref, "full/projected", project(self.own["teacher"], h), BOUND)

        def losses(params: Any, own: Any, fields: Any) -> dict[str, jax.Array]:
            out = sit(params, xt, t, y, taps)
            view = View(x1, noise, xt, t, y, velocity, fields, {}, 0, grid)
            denoising = jnp.mean(jnp.square(out.prediction + velocity), axis=(1, 2, 3))
            terms = {name: jnp.mean(term(own, out, view)) for name, term in self.terms.items()}
            total = sum(self.weights[name] * value for name, value in terms.items())
            return {"denoising": denoising, "total": total + jnp.mean(denoising)} | terms

        given = (sit.params, self.own, fields)
        for name, value in jax.jit(losses)(*given).items():
            yield from close(ref, f"full/{name}", value, BOUND)
        for which in ("attention", "total"):
            one = jax.jit(jax.grad(lambda *args, w=which: losses(*args)[w], (0, 1)))
            yield from self.gradients(which, *one(*given))
        after = jax.jit(jax.grad(lambda *args: jnp.mean(losses(*args)["denoising"])))
        yield from self.gradients("after_stop", after(*given), None)

    def gradients(self, which: str, params: Any, own: Any) -> Iterator[Row]:
        """By tensor, and the norms of all; -1 is that of a tensor that has none."""
        tensors = to_torch(self.sit.config, params)
        if own is not None:
            tensors |= projector_tensors(own["teacher"], "projectors.0")
        yield from gradient_rows(self.ref, f"full/d{which}", tensors, BOUND)
        names = [str(n) for n in self.ref["full/grad_norm_names"]]
        theirs = self.ref[f"full/grad_norm_{which}"]
        ours = [np.linalg.norm(tensors[n]) if n in tensors else -1.0 for n in names]
        ours = np.where((theirs == -1) & (np.array(ours) == 0), -1, ours)
        yield from close(self.ref, f"full/grad_norm_{which}", ours, BOUND)
