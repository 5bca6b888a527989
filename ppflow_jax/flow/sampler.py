"""Runs a plan: each segment is one compiled scan, only the latent crosses between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.adaptive import dopri5
from ppflow_jax.flow.evaluate import Evaluator
from ppflow_jax.flow.guidance import Auto, Cfg
from ppflow_jax.flow.known import KNOWN, check_keep, pasted, pasted_at
from ppflow_jax.flow.multistep import Past, multistep
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, Segment
from ppflow_jax.flow.segments import segments_of
from ppflow_jax.flow.solvers import JUMPS, ODE_SOLVERS, Sde, rk_step, sde_last_step, sde_step
from ppflow_jax.flow.tables import (
    Facts,
    Networks,
    Scales,
    Tables,
    runs_of,
    tables_of,
    unwritten,
)
from ppflow_jax.models.conditions import Cond, supplied
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


class State(NamedTuple):
    """What goes from step to step.

    Attributes:
      past: of a multistep solver.
    """

    x: Float[Array, "b h w c"]
    past: Past | None = None


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
      InputError: a configuration that does not fit the model.
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
        channels = config.cfg_channels
        if channels > model.channels:
            raise InputError(
                f"cfg_channels is {channels}, the model has {model.channels} channels: "
                "give at most as many, or all"
            )
        self.apply, self.weak, self.flow, self.config = apply, weak, flow, config
        check_keep(config.keep, model)
        cfg = Cfg(model.null_label, channels, model.conditions)
        self.guidance = cfg if weak is None else Auto(channels)
        self.segments = segments_of(config, model, flow) if segments is None else segments
        self.told = supplied(model.conditions)
        self.compiled = jax.jit(self.run, static_argnames="facts")

    def __call__(
        self,
        params: Params,
        noise: Float[Array, "b h w c"],
        labels: Cond,
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
          labels: class of every image, or classes and conditions.
          keys: of every image, for stochastic solvers.
          weak: parameters of the weaker network.
          scales: guidance scales instead of the plan's, as `tables.scales_of` makes them.
          replay: N(0, 1) noise of every stochastic step, instead of `keys`.
          trajectory: return the state at every grid point, the initial one included (the
            adaptive solver's: at every stage boundary).

        Returns:
          Latents, float32.
        """
        state, states, first, config = self.start(noise), [noise[None]], 0, self.config
        for number, run in enumerate(runs_of(self.segments)):
            steps = sum(s.steps for s in run)
            noises = None if replay is None else replay[first : first + steps]
            nets = Networks(params, weak, labels, noise if config.keep == "steps" else None)
            tables, facts = self.program(run, trajectory)
            tables = tables if scales is None else tables._replace(scales=scales[number])
            state, passed = self.compiled(state, nets, tables, facts, keys, first, noises)
            states.append(passed)
            first += steps
        final = pasted(state.x, labels[KNOWN]) if config.keep else state.x
        return (
            jnp.concatenate([*states[:-1], states[-1][:-1], final[None]]) if trajectory else final
        )

    def start(self, noise: Float[Array, "b h w c"]) -> State:
        """Before the first step."""
        rows = self.segments[0].rows
        return State(noise, None if rows is None else Past.empty(noise, rows.rule))

    def lower(self, params: Params, noise: Any, labels: Any, keys: Any) -> list[jax.stages.Lowered]:
        """The program of every run of segments, from shapes alone (`jax.ShapeDtypeStruct`).

        For plans without a weaker network.
        """
        lowered, first, state = [], 0, jax.eval_shape(self.start, noise)
        for run in runs_of(self.segments):
            nets = Networks(params, None, labels)
            tables, facts = self.program(run, False)
            lowered.append(self.compiled.lower(state, nets, tables, facts, keys, first, None))
            first += sum(s.steps for s in run)
        return lowered

    def program(self, run: list[Segment], trajectory: bool) -> tuple[Tables, Facts]:
        """What `run` is given for segments that share a program."""
        s = run[0]
        rule = None if s.rows is None else s.rows.rule
        facts = Facts(s.kind, s.stages, s.guided, s.method, rule, trajectory, self.told)
        return tables_of(run), facts

    def memory_of(
        self, segment: Segment, params: Params, weak: Params | None, x: Any, y: Any
    ) -> Any:
        """Shapes of what the segment's method keeps between steps, from the shapes of `__call__`'s
        arguments; None without a method."""
        if segment.method is None:
            return None
        tables, facts = self.program([segment], False)

        def memories(x, nets, tables):
            return self._memories(self._evaluator(nets, facts), x, tables)

        return jax.eval_shape(memories, x, Networks(params, weak, y), tables)

    def run(
        self,
        state: State,
        nets: Networks,
        tables: Tables,
        facts: Facts,
        keys: Key[Array, " b"] | None,
        first: Any,
        replay: Float[Array, "n b h w c"] | None,
    ) -> tuple[State, Float[Array, "points b h w c"] | None]:
        """The state after the steps of a program; if asked, the latents after each of them.

        Args:
          first: number of the first step in the plan.
        """
        evaluator, config, x = self._evaluator(nets, facts), self.config, state.x
        sde = Sde(self.flow, config.diffusion, config.diffusion_norm)
        if facts.kind in ("adaptive", "last"):
            start, end = tables.times[0], tables.times[1]
            step = evaluator.step(tables.scales[0], ({},))
            x = self.kept(x, nets, start)
            if facts.kind == "adaptive":
                tolerances = config.rtol, config.atol
                x = dopri5(
                    lambda x, t, y: step.velocity(x, t, 0, y),
                    *(x, nets.labels, (start, end), tolerances),
                )
            else:
                prediction, size = step.prediction(x, start, 0), config.last_step_size
                x = sde_last_step(config.last_step, sde, prediction, x, start, size)
            return State(x), x[None] if facts.trajectory else None

        def advance(carry, row):
            (x, past), memories = carry
            (t0, t1, scale, weights, inputs, full), index, noise = row
            length = t1 - t0 if facts.kind == "jump" else 0.0
            step = evaluator.step(scale, memories, inputs, full, length)
            x = self.kept(x, nets, t0)
            if facts.kind in ("ode", "jump"):
                x = rk_step((ODE_SOLVERS | JUMPS)[config.solver], step.velocity, x, t0, t1)
            elif facts.kind == "multistep":
                x, past = multistep(facts.rule, self.flow, step.velocity, x, t0, weights, past)
            else:
                if noise is None:
                    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
                    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(step_keys)
                x = sde_step(config.solver, sde, step.prediction, x, t0, t1, noise)
            return (State(x, past), tuple(step.memories)), x if facts.trajectory else None

        indices = first + jnp.arange(tables.times.shape[0] - 1)
        shapes = jax.eval_shape(lambda x: self._memories(evaluator, x, tables), x)
        memories = jax.tree.map(unwritten, shapes)
        (state, _), states = jax.lax.scan(
            advance, (state, memories), (tables.by_step(), indices, replay)
        )
        return state, states

    def kept(self, x: Float[Array, "b h w c"], nets: Networks, t: Any) -> Float[Array, "b h w c"]:
        """The state before a step from time t."""
        if nets.noise is None:
            return x
        return pasted_at(self.flow.interpolant, x, nets.labels[KNOWN], nets.noise, t)

    def _evaluator(self, nets: Networks, facts: Facts) -> Evaluator:
        return Evaluator(self.apply, self.weak, self.flow, self.guidance, nets, facts)

    def _memories(self, evaluator: Evaluator, x: Any, tables: Tables) -> tuple[dict, ...]:
        """What the method of a segment keeps, which a first step of it makes."""
        none = ({},) * len(evaluator.facts.stages)
        if evaluator.facts.method is None:
            return none
        t0, _, scale, _, inputs, full = jax.tree.map(lambda table: table[0], tables.by_step())
        step = evaluator.step(scale, none, inputs, full)
        for i in range(len(evaluator.facts.stages)):
            step.velocity(x, t0, i)
        return tuple(step.memories)
