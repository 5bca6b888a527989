"""Runs a plan: each segment is one compiled scan, only the latent crosses between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.guidance import autoguided, guided
from ppflow_jax.flow.path import Flow, velocity_from
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.solvers import ODE_SOLVERS, rk_step, sde_last_step, sde_step
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params

_MAX_ADAPTIVE_STEPS = 4096


def image_noise(
    seed: int, ids: Int[np.ndarray, " b"] | Int[Array, " b"], shape: tuple[int, ...]
) -> tuple[Float[Array, "b h w c"], Key[Array, " b"]]:
    """Initial N(0, 1) noise and the SDE key of every image.

    A pure function of the seed and the image's number: the same for any batch or device count.
    """
    root = jax.random.key(seed)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(jnp.asarray(ids))
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
    return noise, keys[:, 1]


def _unwritten(shape: jax.ShapeDtypeStruct) -> Array:
    """Memory before its first use: numbers that show in any result, unless their weight is 0."""
    fill = jnp.finfo(shape.dtype).max if jnp.issubdtype(shape.dtype, jnp.floating) else 0
    return jnp.full(shape.shape, fill, shape.dtype)


def _row(tables: Any, k: Int[Array, ""] | int) -> Any:
    """Row k of every table; that k is not negative saves code."""
    row = partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(lambda table: row(table, k), tables)


def _padded(table: np.ndarray) -> np.ndarray:
    """The last row repeated up to a multiple of 64: plans of any length share one program."""
    return np.pad(table, [(0, -len(table) % 64), *[(0, 0)] * (table.ndim - 1)], mode="edge")


def _runs(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Consecutive segments that differ only in guidance scale; each list is one program."""
    runs: list[list[Segment]] = []
    for s in segments:
        facts = (s.kind, s.stages, s.guided, s.method)
        goes_on = s.kind in ("ode", "sde") and (s.method is None or s.keeps)
        last = runs[-1][-1] if runs else None
        if goes_on and last and facts == (last.kind, last.stages, last.guided, last.method):
            runs[-1].append(s)
        else:
            runs.append([s])
    return runs


class Sampler:
    """Sampler of one model, compiled once per distinct segment.

    Args:
      segments: what to run instead of the plain plan of `config`, e.g. from
        `accelerate.config.accelerated`.
      weak: a weaker network that takes the place of the null class (autoguidance); its parameters
        are given at every call.

    Attributes:
      segments: the plan.

    Raises:
      InputError: a configuration that does not fit the model's pyramid.
    """

    def __init__(
        self,
        apply: Apply,
        model: ModelConfig,
        flow: Flow,
        config: SamplerConfig,
        *,
        segments: tuple[Segment, ...] | None = None,
        weak: Apply | None = None,
    ):
        if config.cfg_channels > model.channels:
            raise InputError(
                f"cfg_channels is {config.cfg_channels}, the model has {model.channels} channels: "
                "give at most as many, or all"
            )
        self.apply, self.flow, self.config, self.null_label = apply, flow, config, model.null_label
        self.weak = weak
        self.segments = plan(config, model.pyramid, flow) if segments is None else segments
        self.compiled = jax.jit(
            self._segment, static_argnames=("kind", "stages", "guide", "trajectory")
        )
        self.accelerated = jax.jit(
            self._accelerated,
            static_argnames=("stages", "guide", "method", "trajectory"),
        )

    def __call__(
        self,
        params: Params,
        noise: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        keys: Key[Array, " b"] | None = None,
        *,
        weak: Params | None = None,
        replay: Float[Array, "n b h w c"] | None = None,
        trajectory: bool = False,
    ) -> Float[Array, "b h w c"] | Float[Array, "points b h w c"]:
        """Integrate `noise` to data.

        Args:
          params: of the network.
          noise: initial N(0, 1) latents, float32.
          labels: class of every image.
          keys: of every image, for stochastic solvers.
          weak: parameters of the weaker network.
          replay: N(0, 1) noise of every stochastic step, instead of `keys`.
          trajectory: return the state at every grid point, the initial one included (the
            adaptive solver's: at every stage boundary).

        Returns:
          Latents, float32.
        """
        x, states, first = noise, [noise[None]], 0
        for run in _runs(self.segments):
            steps = sum(s.steps for s in run)
            noises = None if replay is None else replay[first : first + steps]
            program, args, static = self._program(run, params, weak, x, labels, keys, first, noises)
            x, passed = program(*args, **static, trajectory=trajectory)
            states.append(passed[:steps] if trajectory else None)
            first += steps
        return jnp.concatenate(states) if trajectory else x

    def lower(self, params: Params, noise: Any, labels: Any, keys: Any) -> list[jax.stages.Lowered]:
        """The program of every run of segments, from shapes alone (`jax.ShapeDtypeStruct`).

        For plans without a weaker network.
        """
        lowered, first = [], 0
        for run in _runs(self.segments):
            program, args, static = self._program(
                run, params, None, noise, labels, keys, first, None
            )
            lowered.append(program.lower(*args, **static, trajectory=False))
            first += sum(s.steps for s in run)
        return lowered

    def _program(self, run: list[Segment], params, weak, x, labels, keys, first, replay):
        """What to call for segments that share a program, with what arguments."""
        segment = run[0]
        times = np.float32([segment.times[0], *(t for s in run for t in s.times[1:])])
        scales = np.float32([s.scales for s in run for _ in range(s.steps)])
        static = {"stages": segment.stages, "guide": segment.guided}
        if segment.method is None:
            args = (params, weak, x, labels, times, scales, keys, first, replay)
            return self.compiled, args, static | {"kind": segment.kind}
        full = np.concatenate([s.full for s in run])
        inputs = jax.tree.map(lambda *a: np.concatenate(a), *(s.inputs for s in run))
        tables = jax.tree.map(_padded, (times, scales, inputs, full))
        args = (params, weak, x, labels, *tables, len(full))
        return self.accelerated, args, static | {"method": segment.method}

    def memory_of(
        self, segment: Segment, params: Params, weak: Params | None, x: Any, y: Any
    ) -> Any:
        """Shapes of what the segment's method keeps between steps, from the shapes of `__call__`'s
        arguments; None without a method."""
        if segment.method is None:
            return None
        scales = np.float32([segment.scales] * segment.steps)
        tables = np.float32(segment.times), scales, segment.inputs
        facts = {"stages": segment.stages, "guide": segment.guided, "method": segment.method}

        def run(params, weak, x, y, *tables):
            return self._memory(self._accelerated_step(params, weak, y, *tables, **facts), x)

        return jax.eval_shape(run, params, weak, x, y, *tables)

    def _predict(self, apply, weak, params, weak_params, x, t, y, scale, *, stage, guide):
        """The network's prediction, guided or not."""
        ts = jnp.full(x.shape[:1], t)
        if not guide:
            return apply(params, x, ts, y, stage)
        channels = self.config.cfg_channels
        if weak is not None:
            return autoguided(apply, params, weak, weak_params, x, ts, y, stage, scale, channels)
        return guided(apply, params, x, ts, y, stage, scale, self.null_label, channels)

    def _segment(
        self, params, weak, x, y, times, scales, keys, first, replay, *, kind, stages, guide,
        trajectory
    ):  # fmt: skip
        """Final state of a plain segment, and if asked the states after its steps."""
        flow, config = self.flow, self.config

        def predict(scale, x, t, i):
            nets = (self.apply, self.weak, params, weak)
            return self._predict(*nets, x, t, y, scale[i], stage=stages[i], guide=guide[i])

        if kind == "adaptive":
            facts = {"stage": stages[0], "guide": guide[0]}
            x = self._adaptive(params, weak, x, y, times, scales[0, 0], **facts)
            return x, x[None] if trajectory else None
        sde = (flow, config.diffusion, config.diffusion_norm)
        if kind == "last":
            size = config.last_step_size
            prediction = predict(scales[0], x, times[0], 0)
            x = sde_last_step(config.last_step, *sde, prediction, x, times[0], size)
            return x, x[None] if trajectory else None

        def step(x, inputs):
            t0, t1, scale, index, noise = inputs

            def velocity(x, t, i):
                return velocity_from(flow, predict(scale, x, t, i), x, jnp.full(x.shape[:1], t))

            if kind == "ode":
                x = rk_step(ODE_SOLVERS[config.solver], velocity, x, t0, t1)
            else:
                if noise is None:
                    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
                    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(step_keys)
                x = sde_step(config.solver, *sde, partial(predict, scale), x, t0, t1, noise)
            return x, x if trajectory else None

        indices = first + jnp.arange(times.shape[0] - 1)
        x, states = jax.lax.scan(step, x, (times[:-1], times[1:], scales, indices, replay))
        return x, states

    def _accelerated(
        self, params, weak, x, y, times, scales, inputs, full, steps, *, stages, guide, method,
        trajectory
    ):  # fmt: skip
        """`_segment` of a fixed-grid ODE whose evaluations a method computes.

        The tables may be longer than the `steps` that are taken.
        """
        facts = {"stages": stages, "guide": guide, "method": method}
        step = self._accelerated_step(params, weak, y, times, scales, inputs, **facts)
        memory = jax.tree.map(_unwritten, jax.eval_shape(partial(self._memory, step), x))
        states = jnp.zeros((times.shape[0] - 1, *x.shape)) if trajectory else None

        def body(k, carry):
            x, memory, states = carry
            x, memory = step(x, memory, k, _row(full, k))
            return x, memory, None if states is None else states.at[k].set(x)

        x, _, states = jax.lax.fori_loop(0, steps, body, (x, memory, states))
        return x, states

    def _memory(self, step, x):
        """What `step` leaves in its method's memory, which it makes."""
        return step(x, tuple({} for _ in ODE_SOLVERS[self.config.solver].nodes), 0, True)[1]

    def _accelerated_step(self, params, weak, y, times, scales, inputs, *, stages, guide, method):
        """(state, memory, number of the step, whether it is full) -> (state, memory)."""
        flow, tableau = self.flow, ODE_SOLVERS[self.config.solver]

        def step(x, memory, k, full):
            scale, now = _row((scales, inputs), k)
            slots = [dict(slot) for slot in memory]

            def through(level, name, i, call):
                """`call` by the method where it works at this level; its memory is replaced."""
                if method.level != level:
                    return call()
                result, slots[i][name] = method.evaluate(call, slots[i].get(name), now, full)
                return result

            def velocity(x, t, i):
                def net(name, apply, *args):
                    return through("network", name, i, partial(apply, *args))

                def guided_velocity():
                    networks = (partial(net, "model", self.apply), partial(net, "weak", self.weak))
                    prediction = self._predict(
                        networks[0], networks[1] if self.weak is not None else None, params, weak,
                        x, t, y, scale[i], stage=stages[i], guide=guide[i],
                    )  # fmt: skip
                    return velocity_from(flow, prediction, x, jnp.full(x.shape[:1], t))

                return through("velocity", "velocity", i, guided_velocity)

            x = rk_step(tableau, velocity, x, _row(times, k), _row(times, k + 1))
            return x, tuple(slots)

        return step

    def _adaptive(self, params, weak, x, y, times, scale, *, stage, guide):
        """Dopri5 over one stage, with a step size of its own for every image."""
        config = self.config
        controller = diffrax.PIDController(rtol=config.rtol, atol=config.atol)

        def solve(x, label):
            def velocity(t, x, _):
                xs, nets = x[None], (self.apply, self.weak, params, weak)
                prediction = self._predict(
                    *nets, xs, t, label[None], scale, stage=stage, guide=guide
                )
                return velocity_from(self.flow, prediction, xs, jnp.full((1,), t))[0]

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
