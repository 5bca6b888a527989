"""Dopri5 with a step size of its own for every image."""

from __future__ import annotations

from collections.abc import Callable

import diffrax
import jax
from jaxtyping import Array, Float

from ppflow_jax.models.conditions import Cond

_MOST_STEPS = 4096


def dopri5(
    velocity: Callable[[Array, Array, Cond], Array],
    x: Float[Array, "b h w c"],
    labels: Cond,
    times: tuple[Float[Array, ""], Float[Array, ""]],
    tolerances: tuple[float, float],
) -> Float[Array, "b h w c"]:
    """Integrate every image from the first of `times` to the second.

    Args:
      velocity: (x [1, h, w, c], t scalar, label [1] or conditions) -> dx/dt [1, h, w, c].
      tolerances: relative and absolute.
    """
    controller = diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1])

    def one(value):
        return value[None]

    def solve(x, label):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, _: velocity(x[None], t, jax.tree.map(one, label))[0]),
            diffrax.Dopri5(),
            t0=times[0],
            t1=times[1],
            dt0=None,
            y0=x,
            stepsize_controller=controller,
            max_steps=_MOST_STEPS,
            adjoint=diffrax.DirectAdjoint(),
        ).ys[0]

    return jax.vmap(solve)(x, labels)
