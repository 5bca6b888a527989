"""Runs a plan: each segment is one compiled scan, only the latent crosses between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.adaptive import dopri5
from ppflow_jax.flow.guidance import autoguided, guided
from ppflow_jax.flow.path import Flow, velocity_from
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.solvers import ODE_SOLVERS, Sde, rk_step, sde_last_step, sde_step
from ppflow_jax.flow.tables import (
    Facts,
    Networks,
    Scales,
    Tables,
    row,
    runs_of,
    tables_of,
    unwritten,
)
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params


def image_noise(
    seed: Any, ids: Int[np.ndarray, " b"] | Int[Array, " b"], shape: tuple[int, ...]
) -> tuple[Float[Array, "b h w c"], Key[Array, " b"]]:
    """Initial N(0, 1) noise and the SDE key of every image.

    A pure function of the seed (of all images, or of each) and the image's number: the same for
    any batch or device count.
    """
    ids = jnp.asarray(ids)
    seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), ids.shape)

    def pair(seed, number):
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), number))

    keys = jax.vmap(pair)(seeds, ids)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
    return noise, keys[:, 1]


class Sampler:
    """Sampler of one model, compiled once per distinct segment.

    Args:
      segments: what to run instead of the plain plan of `config`, e.g. from
        `systems.accelerate.accelerated`.
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
        self.compiled = jax.jit(self._segment, static_argnames="facts")
        self.accelerated = jax.jit(self._accelerated, static_argnames="facts")

    def __call__(
        self,
        params: Params,
        noise: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        keys: Key[Array, " b"] | None = None,
        *,
        weak: Params | None = None,
        scales: Scales | None = None,
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
          scales: guidance scales instead of the plan's, as `tables.scales_of` makes them.
          replay: N(0, 1) noise of every stochastic step, instead of `keys`.
          trajectory: return the state at every grid point, the initial one included (the
            adaptive solver's: at every stage boundary).

        Returns:
          Latents, float32.
        """
        x, states, first = noise, [noise[None]], 0
        for number, run in enumerate(runs_of(self.segments)):
            steps = sum(s.steps for s in run)
            noises = None if replay is None else replay[first : first + steps]
            nets = Networks(params, weak, labels)
            program, tables, facts = self._program(run, trajectory)
            tables = tables if scales is None else tables._replace(scales=scales[number])
            x, passed = program(x, nets, tables, facts, keys, first, noises)
            states.append(passed[:steps] if trajectory else None)
            first += steps
        return jnp.concatenate(states) if trajectory else x

    def lower(self, params: Params, noise: Any, labels: Any, keys: Any) -> list[jax.stages.Lowered]:
        """The program of every run of segments, from shapes alone (`jax.ShapeDtypeStruct`).

        For plans without a weaker network.
        """
        lowered, first = [], 0
        for run in runs_of(self.segments):
            nets = Networks(params, None, labels)
            program, tables, facts = self._program(run, False)
            lowered.append(program.lower(noise, nets, tables, facts, keys, first, None))
            first += sum(s.steps for s in run)
        return lowered

    def _program(self, run: list[Segment], trajectory: bool):
        """What to call for segments that share a program, with what tables."""
        segment = run[0]
        facts = Facts(segment.kind, segment.stages, segment.guided, segment.method, trajectory)
        return self.compiled if segment.method is None else self.accelerated, tables_of(run), facts

    def memory_of(
        self, segment: Segment, params: Params, weak: Params | None, x: Any, y: Any
    ) -> Any:
        """Shapes of what the segment's method keeps between steps, from the shapes of `__call__`'s
        arguments; None without a method."""
        if segment.method is None:
            return None
        scales = np.float32([segment.scales] * segment.steps)
        tables = Tables(np.float32(segment.times), scales, segment.inputs)
        facts = Facts(segment.kind, segment.stages, segment.guided, segment.method, False)

        def run(x, nets, tables):
            return self._memory(self._accelerated_step(nets, tables, facts), x)

        return jax.eval_shape(run, x, Networks(params, weak, y), tables)

    def _predict(self, model, weak, x, t, y, scale, stage, guide):
        """The prediction of networks (x, t, y, stage) -> prediction, guided or not."""
        ts = jnp.full(x.shape[:1], t)
        if not guide:
            return model(x, ts, y, stage)
        channels = self.config.cfg_channels
        if weak is not None:
            return autoguided(model, weak, x, ts, y, stage, scale, channels)
        return guided(model, x, ts, y, stage, scale, self.null_label, channels)

    def _plain(self, nets: Networks):
        """The networks with their parameters."""
        weak = partial(self.weak, nets.weak) if self.weak is not None else None
        return partial(self.apply, nets.params), weak

    def _segment(self, x, nets, tables, facts, keys, first, replay):
        """Final state of a plain segment, and if asked the states after its steps."""
        flow, config, networks = self.flow, self.config, self._plain(nets)
        times, scales = tables.times, tables.scales

        def predict(scale, x, t, i, y=nets.labels):
            args = (scale[i], facts.stages[i], facts.guide[i])
            return self._predict(*networks, x, t, y, *args)

        def velocity(scale, x, t, i, y=nets.labels):
            return velocity_from(flow, predict(scale, x, t, i, y), x, jnp.full(x.shape[:1], t))

        if facts.kind == "adaptive":
            x = dopri5(
                lambda x, t, y: velocity(scales[0], x, t, 0, y),
                x,
                nets.labels,
                (times[0], times[1]),
                (config.rtol, config.atol),
            )
            return x, x[None] if facts.trajectory else None
        sde = Sde(flow, config.diffusion, config.diffusion_norm)
        if facts.kind == "last":
            size = config.last_step_size
            prediction = predict(scales[0], x, times[0], 0)
            x = sde_last_step(config.last_step, sde, prediction, x, times[0], size)
            return x, x[None] if facts.trajectory else None

        def step(x, inputs):
            t0, t1, scale, index, noise = inputs
            if facts.kind == "ode":
                x = rk_step(ODE_SOLVERS[config.solver], partial(velocity, scale), x, t0, t1)
            else:
                if noise is None:
                    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
                    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(step_keys)
                x = sde_step(config.solver, sde, partial(predict, scale), x, t0, t1, noise)
            return x, x if facts.trajectory else None

        indices = first + jnp.arange(times.shape[0] - 1)
        x, states = jax.lax.scan(step, x, (times[:-1], times[1:], scales, indices, replay))
        return x, states

    def _accelerated(self, x, nets, tables, facts, keys, first, replay):
        """`_segment` of a fixed-grid ODE whose evaluations a method computes.

        The tables may be longer than the steps that are taken.
        """
        step = self._accelerated_step(nets, tables, facts)
        memory = jax.tree.map(unwritten, jax.eval_shape(partial(self._memory, step), x))
        states = jnp.zeros((tables.times.shape[0] - 1, *x.shape)) if facts.trajectory else None

        def body(k, carry):
            x, memory, states = carry
            x, memory = step(x, memory, k, row(tables.full, k))
            return x, memory, None if states is None else states.at[k].set(x)

        x, _, states = jax.lax.fori_loop(0, tables.steps, body, (x, memory, states))
        return x, states

    def _memory(self, step, x):
        """What `step` leaves in its method's memory, which it makes."""
        return step(x, tuple({} for _ in ODE_SOLVERS[self.config.solver].nodes), 0, True)[1]

    def _accelerated_step(self, nets, tables, facts):
        """(state, memory, number of the step, whether it is full) -> (state, memory)."""
        flow, tableau, method = self.flow, ODE_SOLVERS[self.config.solver], facts.method
        model, weak = self._plain(nets)

        def step(x, memory, k, full):
            scale, now = row((tables.scales, tables.inputs), k)
            slots = [dict(slot) for slot in memory]

            def through(level, name, i, call):
                """`call` by the method where it works at this level; its memory is replaced."""
                if method.level != level:
                    return call()
                result, slots[i][name] = method.evaluate(call, slots[i].get(name), now, full)
                return result

            def velocity(x, t, i):
                def net(name, network, *args):
                    return through("network", name, i, partial(network, *args))

                def guided_velocity():
                    weaker = partial(net, "weak", weak) if weak is not None else None
                    args = (x, t, nets.labels, scale[i], facts.stages[i], facts.guide[i])
                    prediction = self._predict(partial(net, "model", model), weaker, *args)
                    return velocity_from(flow, prediction, x, jnp.full(x.shape[:1], t))

                return through("velocity", "velocity", i, guided_velocity)

            times = tables.times
            x = rk_step(tableau, velocity, x, row(times, k), row(times, k + 1))
            return x, tuple(slots)

        return step
