"""Samples that a student and its teacher see, and the steps that they take with them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from ppflow_jax.flow.grids import aligned_grid
from ppflow_jax.flow.path import Path, expand
from ppflow_jax.models.conditions import GUIDANCE, LABEL
from ppflow_jax.models.network import Apply, Params
from ppflow_jax.pyramid import Pyramid


class Rows(NamedTuple):
    """Samples of one stage."""

    z: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    end: Float[Array, " b"]
    y: Int[Array, " b"]
    scale: Float[Array, " b"]


def asked(rows: tuple[Rows, ...], told: bool = True) -> tuple[tuple, tuple, tuple, tuple]:
    """What a network is called with: states, times, conditions and stages."""
    ys = tuple({LABEL: own.y, GUIDANCE: own.scale - 1} if told else {LABEL: own.y} for own in rows)
    return tuple(r.z for r in rows), tuple(r.t for r in rows), ys, tuple(range(len(rows)))


def predict(
    apply: Apply, params: Params, rows: tuple[Rows, ...], told: bool = True
) -> tuple[Float[Array, "_ h w c"], ...]:
    """Predictions by stage, in one pass over the blocks; without guidance if it is not told any."""
    return tuple(output.prediction for output in apply(params, *asked(rows, told)))


def counts(steps: int, pyramid: Pyramid) -> list[int]:
    """Steps of every stage on the aligned grid.

    Raises:
      InputError: fewer steps than stages.
    """
    grid = aligned_grid(0.0, 1.0, steps, pyramid)
    stages = [pyramid.stage_at((a + b) / 2) for a, b in zip(grid, grid[1:])]
    return [stages.count(stage) for stage in range(len(pyramid))]


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
    """z at `end`, if noise and data stay what they are at t (arXiv 2010.02502).

    On the linear path it is Euler's step.
    """
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

    On the linear path (z_end - z) / (end - t).
    """
    keep = expand(path.sigma(end) / path.sigma(t))
    alpha, sigma = expand(path.alpha(t)), expand(path.sigma(t))
    data = (z_end - keep * z) / (expand(path.alpha(end)) - keep * alpha)
    noise = (z - alpha * data) / sigma
    return expand(path.d_alpha(t)) * data + expand(path.d_sigma(t)) * noise
