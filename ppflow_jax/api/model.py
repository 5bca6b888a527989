"""A trained network and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ppflow_jax.api.inputs import (
    Labels,
    Samples,
    Values,
    asked,
    latents_of,
    seed_of,
    stage_of,
    whole,
)
from ppflow_jax.api.plans import ACCELERATE, SOLVER, STEPS, Guidance, plan_of
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError, check_address
from ppflow_jax.flow.likelihood import log_likelihood
from ppflow_jax.flow.path import velocity_from
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.flow.tables import scales_of
from ppflow_jax.generate.images import MICROBATCH, Generator, Images
from ppflow_jax.generate.plan import Plan
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params, make_apply


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network with its weights on the devices of this process.

    Attributes:
      weights: where it came from, and its parameters.
      dtype: of matrix products.
    """

    weights: Weights
    dtype: str = "float32"
    _programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def card(self) -> Card:
        """Architecture, path and prediction, what it was trained on."""
        return self.weights.card

    @property
    def params(self) -> Params:
        return self.weights.params

    @property
    def config(self) -> ModelConfig:
        return self.card.model

    @property
    def network(self) -> Apply:
        """`(params, x, t, y, stage) -> prediction`, see `models.network.make_apply`."""
        return self._network(one_time=False)

    def _network(self, one_time: bool) -> Apply:
        make = lambda: make_apply(self.config, dtype=jnp.dtype(self.dtype), one_time=one_time)
        return self._once(("network", one_time), make)

    def __call__(
        self, x: Any, t: Any, labels: Labels, stage: int | None = None, conditions: Values = None
    ) -> Float[Array, "b h w c"]:
        """What the network predicts (velocity, score or noise), unguided.

        Args:
          x: latents, float32 [b, h, w, c].
          t: time in [0, 1], 0 is noise; one, or one of every latent.
          labels: classes; `config.null_label` is none.
          stage: whose patches are used; None: that of t, which must then be one number.
          conditions: of a model that has some, values by name: one of every latent, or one.

        Raises:
          InputError: shapes, times, labels or a stage that the model does not have.
        """
        x = latents_of(x, self.config.shape)
        ts = np.broadcast_to(np.float32(t), len(x))
        stage = stage_of(stage, ts, self.config.pyramid)
        y = asked(self.card, len(ts), labels, conditions=conditions).told
        program = self._once("call", lambda: jax.jit(self.network, static_argnums=4))
        return self._exact(program, self.params, x, ts, y, stage)

    def velocity(
        self, x: Any, t: Any, labels: Labels, conditions: Values = None
    ) -> Float[Array, "b h w c"]:
        """dx/dt at (x, t), whatever the network predicts; arguments as in `__call__`.

        Raises:
          InputError: see `__call__`.
        """
        ts = np.broadcast_to(np.float32(t), np.shape(x)[:1])
        prediction = self(x, t, labels, conditions=conditions)
        return velocity_from(self.card.flow, prediction, jnp.asarray(x), jnp.asarray(ts))

    def plan(
        self,
        file: str | Path | PlanFile | None = None,
        *,
        steps: int = STEPS,
        solver: str = SOLVER,
        cfg: Guidance = None,
        accelerate: str = ACCELERATE,
        weak: Model | None = None,
        **settings: Any,
    ) -> Plan:
        """How to sample.

        Args:
          file: of `ppflow tune`, which decides all but `cfg`.
          steps: intervals of the grid.
          solver: one of `flow.plan.SOLVERS`.
          cfg: guidance scale, or one of every stage; 1 (the default, or the file's) does not
            evaluate the null class.
          accelerate: a preset, `auto` (the run's plan.json) or key=value,... (docs: accelerate).
          weak: autoguidance by this model in place of the null class (arXiv 2406.02507).
          settings: of `flow.plan.SamplerConfig`, such as grid, cfg_channels, cfg_interval.

        Raises:
          InputError: a setting that there is not, or a value out of its range.
        """
        if not (weak is None or isinstance(weak, Model)):
            raise InputError(f"weak={weak!r}: give a model, as pf.load makes it")
        weaker = None if weak is None else weak.weights
        return plan_of(self.weights, file, steps, solver, cfg, accelerate, weaker, settings)

    def sample(
        self,
        num: int | None = None,
        *,
        plan: Plan | None = None,
        labels: Labels = "balanced",
        seed: int = 0,
        noise: Any = None,
        conditions: Values = None,
        decode: str = "none",
        microbatch: int = MICROBATCH,
    ) -> Samples:
        """Images; number k is a function of seed, k and its label, as for the command `sample`.

        Args:
          num: how many; None: as many as labels, noise or conditions, or 16.
          plan: None is `self.plan()`.
          labels: `balanced`, `uniform`, a class or its name, or several, repeated in order.
          seed: 0 to 2^32 - 1.
          noise: initial N(0, 1) latents, float32 NHWC, instead of the seed's.
          conditions: of a model that has some, values by name: one of every image, or one.
          decode: `none`, `vae:DIR` or `taesd:DIR`.
          microbatch: images that a device computes at once (at most `num`); changes last bits.

        Raises:
          InputError: an argument that does not fit the model.
          RunError: images that are not finite.
        """
        given = asked(self.card, num, labels, seed, noise, conditions)
        ids, size = np.arange(given.num), min(whole("microbatch", microbatch), given.num)
        rows = ids, given.told, given.noise
        parts = self.images(*rows, plan=plan, seed=seed, decode=decode, microbatch=size)
        _, latents, pictures = (np.concatenate(arrays) for arrays in zip(*parts))
        return Samples(pictures, latents, given.labels)

    def images(
        self,
        ids: Int[np.ndarray, " n"],
        labels: Cond,
        noise: Float[np.ndarray, "n h w c"] | None = None,
        *,
        plan: Plan | None = None,
        seed: int | UInt32[np.ndarray, " n"] = 0,
        decode: str = "none",
        microbatch: int = MICROBATCH,
        batch: int = 4 * MICROBATCH,
    ) -> Iterator[Images]:
        """The images of `sample` with the numbers `ids`, in groups as they are done.

        Args:
          labels: of each, or {"label": labels, name: values of a condition}.
          noise: of each; None is that of the seed, which is one or one of each.
          batch: images in flight, over all devices; changes no image.

        Raises:
          InputError, RunError: see `sample`.
        """
        plan = self._checked(plan)
        return self.generator(plan, decode, microbatch)(
            self.params,
            ids,
            labels,
            noise,
            seed=seed if isinstance(seed, np.ndarray) else seed_of(seed),
            scales=scales_of(plan.segments),
            weak=None if plan.weak is None else plan.weak.params,
            batch=whole("batch", batch),
        )

    def generator(
        self, plan: Plan, decode: str = "none", microbatch: int = MICROBATCH
    ) -> Generator:
        """What makes the images of a plan; the same for all its guidance scales.

        Raises:
          InputError: an autoencoder that is not there, or not of these latents.
        """
        if not isinstance(decode, str):
            raise InputError(f"decode={decode!r}: write none, vae:DIR or taesd:DIR")
        check_address(decode, "decode", stores=True, hub=True)
        size = whole("microbatch", microbatch)

        def make() -> Generator:
            decoder = self._once(("decoder", decode), lambda: Decoder.parse(decode, self.card))
            return Generator(self._sampler(plan), decoder, microbatch=size, dtype=self.dtype)

        return self._once(("generator", plan.static, decode, size), make)

    def trajectory(
        self,
        num: int | None = None,
        *,
        plan: Plan | None = None,
        labels: Labels = "balanced",
        seed: int = 0,
        noise: Any = None,
        conditions: Values = None,
    ) -> Float[np.ndarray, "points n h w c"]:
        """Latents at all `plan.times`, the initial noise included; arguments as in `sample`.

        Raises:
          InputError: see `sample`.
        """
        plan = self._checked(plan)
        given = asked(self.card, num, labels, seed, noise, conditions)
        drawn, keys = image_noise(np.uint32(seed), np.arange(given.num), self.config.shape)
        states = self._exact(
            self._sampler(plan),
            self.params,
            drawn if given.noise is None else jnp.asarray(given.noise),
            jax.tree.map(jnp.asarray, given.told),
            keys,
            scales=scales_of(plan.segments),
            trajectory=True,
        )
        return np.asarray(states)

    def log_likelihood(
        self, x: Any, labels: Labels, *, steps: int = 50, seed: int = 0, conditions: Values = None
    ) -> Float[np.ndarray, " b"]:
        """log p(x | label) in nats, by Heun's method and Hutchinson's estimate.

        Raises:
          InputError: see `__call__`; steps below the number of stages.
        """
        x = latents_of(x, self.config.shape)
        y = jax.tree.map(jnp.asarray, asked(self.card, len(x), labels, seed, x, conditions).told)
        config = self.plan(steps=steps).config
        given = (self.params, jnp.asarray(x), y, jax.random.key(np.uint32(seed)))
        args = (self.network, self.config, self.card.flow, config, *given)
        return np.asarray(self._exact(log_likelihood, *args)[0])

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _exact(self, function: Any, *args: Any, **options: Any) -> Any:
        """At full float32 precision, unless the dtype says otherwise."""
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
            return function(*args, **options)

    def _checked(self, plan: Plan | None) -> Plan:
        plan = self.plan() if plan is None else plan
        if not isinstance(plan, Plan) or (plan.model, plan.flow) != (self.config, self.card.flow):
            raise InputError("the plan is of another model: make it with this model's plan()")
        return plan

    def _sampler(self, plan: Plan) -> Sampler:
        one_time = self.config.block.wrap is not None  # only a wrap makes something of it
        make = lambda: plan.sampler(self._network(one_time), self.dtype)
        return self._once(("sampler", plan.static), make)
