"""Distillation of guided diffusion (arXiv 2210.03142): guidance, then steps, learned by a student.

Stage one. The student is told the guidance scale s beside the time, and learns what the teacher
computes from two evaluations,

    v(x, t, y, s) = v_u + s (v_c - v_u),

v_c with the label and v_u with the null class, for s drawn uniformly from a range. It starts from
the teacher's weights; what tells it the scale is zero at first, so that it is the teacher with the
label, without guidance. Guided sampling then takes one evaluation where the teacher takes two.

Stage two, progressive distillation (arXiv 2202.00512). A student learns to do in one step what the
teacher, which knows the scale already, does in two halves of it: from z at t to z' at t', its
velocity is that of the straight way, (z' - z) / (t' - t). The grid is the aligned one of the
sampler, so that no step crosses a boundary of the pyramid. The student takes half the teacher's
steps, and is the teacher of the next round.

On other paths than the straight one the steps are those of DDIM (arXiv 2010.02502), which for a
linear path are Euler's.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from ppflow_jax.flow.guidance import Cfg, Predict
from ppflow_jax.flow.path import Path, expand


def guided(
    predict: Predict,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
    scale: Float[Array, " b"],
    cfg: Cfg,
) -> Float[Array, "b h w c"]:
    """What a teacher predicts under guidance with a scale of every sample."""
    return cfg(predict, None, x, t, y, expand(scale))


def ends(
    path: Path, velocity: Float[Array, "b h w c"], z: Float[Array, "b h w c"], t: Float[Array, " b"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Noise and data between which z moves with this velocity."""
    alpha, d_alpha, sigma, d_sigma = (
        expand(f(t)) for f in (path.alpha, path.d_alpha, path.sigma, path.d_sigma)
    )
    scale = alpha * d_sigma - d_alpha * sigma
    return (alpha * velocity - d_alpha * z) / scale, (d_sigma * z - sigma * velocity) / scale


def ddim(
    path: Path,
    velocity: Float[Array, "b h w c"],
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    end: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """z at `end`, if noise and data stay what they are at t; on a linear path Euler's step."""
    noise, data = ends(path, velocity, z, t)
    return expand(path.alpha(end)) * data + expand(path.sigma(end)) * noise


def one_step(
    path: Path,
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    z_end: Float[Array, "b h w c"],
    end: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """The velocity at z with which one step of `ddim` ends at `z_end`.

    On a linear path (z_end - z) / (end - t).
    """
    keep = expand(path.sigma(end) / path.sigma(t))
    alpha, sigma = expand(path.alpha(t)), expand(path.sigma(t))
    data = (z_end - keep * z) / (expand(path.alpha(end)) - keep * alpha)
    noise = (z - alpha * data) / sigma
    return expand(path.d_alpha(t)) * data + expand(path.d_sigma(t)) * noise
