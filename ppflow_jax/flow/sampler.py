"""Runs a plan: each segment is one compiled scan, only the latent crosses between them."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.flow.guidance import guided
from ppflow_jax.flow.path import Flow, velocity_from
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.solvers import ODE_SOLVERS, rk_step, sde_last_step, sde_step
from ppflow_jax.models.ppflow import Apply, ModelConfig, Params

_MAX_ADAPTIVE_STEPS = 4096


def image_noise(
    seed: int, ids: Int[np.ndarray, " b"], shape: tuple[int, ...]
) -> tuple[Float[Array, "b h w c"], Key[Array, " b"]]:
    """Initial N(0, 1) noise and the SDE key of every image.

    A pure function of the seed and the image's number: the same for any batch or device count.
    """
    root = jax.random.key(seed)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(jnp.asarray(ids))
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
    return noise, keys[:, 1]


class Sampler:
    """Sampler of one model, compiled once per distinct segment.

    Attributes:
      segments: the plan.

    Raises:
      InputError: a configuration that does not fit the model's pyramid.
    """

    def __init__(self, apply: Apply, model: ModelConfig, flow: Flow, config: SamplerConfig):
        self.apply, self.flow, self.config, self.null_label = apply, flow, config, model.null_label
        self.segments = plan(config, model.pyramid, flow)
        self.compiled = jax.jit(
            self._segment, static_argnames=("kind", "stages", "guide", "trajectory")
        )

    def __call__(
        self,
        params: Params,
        noise: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        keys: Key[Array, " b"] | None = None,
        *,
        replay: Float[Array, "n b h w c"] | None = None,
        trajectory: bool = False,
    ) -> Float[Array, "b h w c"] | Float[Array, "points b h w c"]:
        """Integrate `noise` to data.

        Args:
          params: of the network.
          noise: initial N(0, 1) latents, float32.
          labels: class of every image.
          keys: of every image, for stochastic solvers.
          replay: N(0, 1) noise of every stochastic step, instead of `keys`.
          trajectory: return the state at every grid point, the initial one included (the
            adaptive solver's: at every stage boundary).

        Returns:
          Latents, float32.
        """
        x, states, first = noise, [noise[None]], 0
        for segment in self.segments:
            noises = None if replay is None else replay[first : first + segment.steps]
            args, static = self._arguments(segment, params, x, labels, keys, first, noises)
            x, passed = self.compiled(*args, **static, trajectory=trajectory)
            states.append(passed)
            first += segment.steps
        return jnp.concatenate(states) if trajectory else x

    def lower(self, params: Params, noise: Any, labels: Any, keys: Any) -> list[jax.stages.Lowered]:
        """The program of every segment, from shapes alone (`jax.ShapeDtypeStruct`)."""
        lowered, first = [], 0
        for segment in self.segments:
            args, static = self._arguments(segment, params, noise, labels, keys, first, None)
            lowered.append(self.compiled.lower(*args, **static, trajectory=False))
            first += segment.steps
        return lowered

    def _arguments(self, segment: Segment, params, x, labels, keys, first, replay):
        times, scales = np.float32(segment.times), np.float32(segment.scales)
        static = dict(kind=segment.kind, stages=segment.stages, guide=segment.guided)
        return (params, x, labels, times, scales, keys, first, replay), static

    def _segment(
        self, params, x, y, times, scales, keys, first, replay, *, kind, stages, guide, trajectory
    ):
        """Final state of one segment, and if asked the states after each of its steps."""
        flow, config = self.flow, self.config

        def predict(x, t, i):
            ts = jnp.full(x.shape[:1], t)
            if not guide[i]:
                return self.apply(params, x, ts, y, stages[i])
            return guided(
                self.apply, params, x, ts, y, stages[i], scales[i], self.null_label,
                config.cfg_channels,
            )  # fmt: skip

        def velocity(x, t, i):
            return velocity_from(flow, predict(x, t, i), x, jnp.full(x.shape[:1], t))

        if kind == "adaptive":
            x = self._adaptive(params, x, y, times, scales, stage=stages[0], guide=guide[0])
            return x, x[None] if trajectory else None
        sde = (flow, config.diffusion, config.diffusion_norm)
        if kind == "last":
            size = config.last_step_size
            x = sde_last_step(config.last_step, *sde, predict(x, times[0], 0), x, times[0], size)
            return x, x[None] if trajectory else None

        def step(x, inputs):
            t0, t1, index, noise = inputs
            if kind == "ode":
                x = rk_step(ODE_SOLVERS[config.solver], velocity, x, t0, t1)
            else:
                if noise is None:
                    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
                    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(step_keys)
                x = sde_step(config.solver, *sde, predict, x, t0, t1, noise)
            return x, x if trajectory else None

        indices = first + jnp.arange(times.shape[0] - 1)
        return jax.lax.scan(step, x, (times[:-1], times[1:], indices, replay))

    def _adaptive(self, params, x, y, times, scales, *, stage, guide):
        """Dopri5 over one stage, with a step size of its own for every image."""
        flow, config = self.flow, self.config
        controller = diffrax.PIDController(rtol=config.rtol, atol=config.atol)

        def solve(x, label):
            def velocity(t, x, _):
                ts, xs, ys = jnp.full((1,), t), x[None], label[None]
                if guide:
                    args = (stage, scales[0], self.null_label, config.cfg_channels)
                    prediction = guided(self.apply, params, xs, ts, ys, *args)
                else:
                    prediction = self.apply(params, xs, ts, ys, stage)
                return velocity_from(flow, prediction, xs, ts)[0]

            return diffrax.diffeqsolve(
                diffrax.ODETerm(velocity),
                diffrax.Dopri5(),
                t0=times[0],
                t1=times[1],
                dt0=None,
                y0=x,
                stepsize_controller=controller,
                max_steps=_MAX_ADAPTIVE_STEPS,
                adjoint=diffrax.DirectAdjoint(),
            ).ys[0]

        return jax.vmap(solve)(x, y)
