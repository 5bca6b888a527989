"""A trained network and what can be done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ppflow_jax.api.plan import Plan, make_plan, static
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checks import check_local, check_seed
from ppflow_jax.errors import InputError
from ppflow_jax.flow.likelihood import log_likelihood
from ppflow_jax.flow.path import velocity_from
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.flow.tables import scales_of
from ppflow_jax.generate.images import MICROBATCH, Generator, choose_labels
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params, make_apply

Labels = str | int | Sequence[int | str] | Int[np.ndarray, " _"]


class Samples(NamedTuple):
    """Images of a model: pictures uint8 [n, y, x, k], latents float32 [n, h, w, c], labels [n]."""

    pictures: UInt8[np.ndarray, "n y x k"]
    latents: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network with its weights on the devices of this process.

    Attributes:
      card: architecture, path and prediction, what it was trained on.
      params: its parameters.
      dtype: of matrix products.
    """

    card: Card
    params: Params
    dtype: str = "float32"
    _programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        return self.card.model

    @property
    def network(self) -> Apply:
        """`(params, x, t, y, stage) -> prediction`, see `models.network.make_apply`."""
        return self._once("network", lambda: make_apply(self.config, dtype=jnp.dtype(self.dtype)))

    def __call__(
        self,
        x: Any,
        t: Any,
        labels: Labels,
        stage: int | None = None,
    ) -> Float[Array, "b h w c"]:
        """What the network predicts (velocity, score or noise), unguided.

        Args:
          x: latents, float32 [b, h, w, c].
          t: time in [0, 1], 0 is noise; one, or one of every latent.
          labels: classes; `config.null_label` is none.
          stage: whose patches are used; None: that of t, which must then be one number.

        Raises:
          InputError: shapes, times, labels or a stage that the model does not have.
        """
        x, ts = self._latents(x), np.broadcast_to(np.float32(t), np.shape(x)[:1])
        if not ((ts >= 0) & (ts <= 1)).all():
            raise InputError(f"times are from 0 (noise) to 1 (data), got {t}")
        stages = {self.config.pyramid.stage_at(np.float32(v)) for v in np.unique(ts)}
        if stage is None and len(stages) > 1:
            raise InputError(f"times of the stages {sorted(stages)} in one call: give stage=")
        stage = stages.pop() if stage is None else stage
        if not 0 <= stage < len(self.config.pyramid):
            raise InputError(
                f"stage={stage}: the model has stages 0 to {len(self.config.pyramid) - 1}"
            )
        y = self._labels(labels, len(ts), 0)
        program = self._once("call", lambda: jax.jit(self.network, static_argnums=4))
        return self._exact(program, self.params, x, ts, y, stage)

    def velocity(self, x: Any, t: Any, labels: Labels) -> Float[Array, "b h w c"]:
        """dx/dt at (x, t), whatever the network predicts; arguments as in `__call__`.

        Raises:
          InputError: see `__call__`.
        """
        ts = np.broadcast_to(np.float32(t), np.shape(x)[:1])
        return velocity_from(self.card.flow, self(x, t, labels), jnp.asarray(x), jnp.asarray(ts))

    def plan(
        self,
        *,
        steps: int = 50,
        solver: str = "heun",
        cfg: float | int | Sequence[float | int] = 1.0,
        accelerate: str = "exact",
        **settings: Any,
    ) -> Plan:
        """How to sample.

        Args:
          steps: intervals of the grid.
          solver: one of `flow.plan.SOLVERS`.
          cfg: guidance scale, or one of every stage; 1 does not evaluate the null class.
          accelerate: `exact`, `balanced`, `fast` or key=value,... (docs: accelerate).
          settings: of `flow.plan.SamplerConfig`, such as grid, cfg_channels, cfg_interval.

        Raises:
          InputError: a setting that there is not, or a value out of its range.
        """
        return make_plan(self.card, steps, solver, cfg, accelerate, settings)

    def sample(
        self,
        num: int | None = None,
        *,
        plan: Plan | None = None,
        labels: Labels = "balanced",
        seed: int = 0,
        noise: Any = None,
        decode: str = "none",
        microbatch: int = MICROBATCH,
    ) -> Samples:
        """Images; number k is a function of seed, k and its label, as for the command `sample`.

        Args:
          num: how many; None: as many as labels or noise, or 16.
          plan: None is `self.plan()`.
          labels: `balanced`, `uniform`, a class or its name, or several, repeated in order.
          seed: 0 to 2^32 - 1.
          noise: initial N(0, 1) latents, float32 NHWC, instead of the seed's.
          decode: `none`, `vae:DIR` or `taesd:DIR`.
          microbatch: images that a device computes at once (at most `num`); changes last bits.

        Raises:
          InputError: an argument that does not fit the model.
          RunError: images that are not finite.
        """
        plan, start = self._checked(plan), None if noise is None else self._latents(noise)
        _check_seed(seed)
        count = _count(num, labels, start)
        y = self._labels(labels, count, seed)
        if not isinstance(microbatch, int) or microbatch < 1:
            raise InputError(f"microbatch={microbatch!r}: give a whole number from 1 on")
        generator = self._generator(plan, decode, min(microbatch, count))
        parts = list(
            generator(
                self.params,
                np.arange(count),
                y,
                start,
                seed=seed,
                scales=scales_of(plan.segments),
                batch=4 * microbatch,
            )
        )
        _, latents, pictures = (np.concatenate(arrays) for arrays in zip(*parts))
        return Samples(pictures, latents, y)

    def trajectory(
        self,
        num: int | None = None,
        *,
        plan: Plan | None = None,
        labels: Labels = "balanced",
        seed: int = 0,
        noise: Any = None,
    ) -> Float[np.ndarray, "points n h w c"]:
        """Latents at all `plan.times`, the initial noise included; arguments as in `sample`.

        Raises:
          InputError: see `sample`.
        """
        plan, start = self._checked(plan), None if noise is None else self._latents(noise)
        _check_seed(seed)
        count = _count(num, labels, start)
        y = self._labels(labels, count, seed)
        drawn, keys = image_noise(np.uint32(seed), np.arange(count), self.config.shape)
        sampler = self._sampler(plan)
        states = self._exact(
            sampler,
            self.params,
            drawn if start is None else jnp.asarray(start),
            jnp.asarray(y),
            keys,
            scales=scales_of(plan.segments),
            trajectory=True,
        )
        return np.asarray(states)

    def log_likelihood(
        self, x: Any, labels: Labels, *, steps: int = 50, seed: int = 0
    ) -> Float[np.ndarray, " b"]:
        """log p(x | label) in nats, by Heun's method and Hutchinson's estimate.

        Raises:
          InputError: see `__call__`; steps below the number of stages.
        """
        x = self._latents(x)
        _check_seed(seed)
        y, config = self._labels(labels, len(x), seed), self.plan(steps=steps).config
        probes = jax.random.key(np.uint32(seed))
        given = (self.params, jnp.asarray(x), jnp.asarray(y), probes)
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
        args = (self.network, self.config, self.card.flow, plan.config)
        key = ("sampler", static(plan))
        return self._once(key, lambda: Sampler(*args, segments=plan.segments))

    def _generator(self, plan: Plan, decode: str, microbatch: int) -> Generator:
        def make() -> Generator:
            decoder = self._once(("decoder", decode), lambda: Decoder.parse(decode, self.card))
            return Generator(self._sampler(plan), decoder, microbatch=microbatch, dtype=self.dtype)

        if not isinstance(decode, str):
            raise InputError(f"decode={decode!r}: write none, vae:DIR or taesd:DIR")
        check_local(decode, "decode")
        return self._once(("generator", static(plan), decode, microbatch), make)

    def _latents(self, x: Any) -> Float[np.ndarray, "b h w c"]:
        shape = ", ".join(map(str, self.config.shape))
        try:
            array = np.asarray(x, np.float32)
        except (TypeError, ValueError) as e:
            raise InputError(f"latents must be numbers of shape (n, {shape}): {e}") from e
        if array.ndim != 4 or array.shape[1:] != self.config.shape or not len(array):
            raise InputError(
                f"latents of shape {array.shape}, the model takes (n, {shape}), channels last"
            )
        if not np.isfinite(array).all():
            raise InputError("latents have values that are NaN or infinite")
        return array

    def _labels(self, labels: Labels, count: int, seed: int) -> Int[np.ndarray, " n"]:
        if isinstance(labels, str):
            rule = labels
        elif isinstance(labels, bool | float) or labels is None:
            raise InputError(f"labels={labels!r}: give balanced, uniform, a class or several")
        else:
            rule = ",".join(map(str, np.atleast_1d(labels).tolist()))
        return choose_labels(rule, count, self.config.num_classes, seed, self.card.classes)


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise InputError(f"seed={seed!r}: a seed is a whole number")
    check_seed(int(seed), "seed")


def _count(num: int | None, labels: Labels, noise: np.ndarray | None) -> int:
    if num is not None and (not isinstance(num, int | np.integer) or num < 1):
        raise InputError(f"num={num!r}: give a whole number from 1 on")
    if noise is not None and num not in (None, len(noise)):
        raise InputError(f"num={num}, but noise holds {len(noise)} images")
    if noise is not None:
        return len(noise)
    if num is None and not isinstance(labels, str):
        return len(np.atleast_1d(labels))
    return 16 if num is None else int(num)
