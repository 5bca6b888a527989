"""A cascade of two resolutions: a small sample, and a model that is told it and adds the rest.

The relative of LowDiff (arXiv 2509.15342), of which no code was found: there one network makes all
resolutions, each told the one below. Here they are two networks, which are trained on their own (as
in arXiv 2106.15282): the first on pictures or latents shrunk by a factor, the second with the small
one, enlarged, as a condition in channels (`models.conditions.Channels`). The pyramid's coarse
stages spend few tokens on the same latent; a cascade spends few on a smaller one.

What the first makes is not quite what the second saw in training. So noise of a fixed level is
added to the small one, in training and in sampling (Sec. 4.2 there, with the level as a setting).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.plan import Segment
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.models.conditions import LABEL
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params
from ppflow_jax.systems.tasks import SuperResolution

_NOISE_OF_SECOND, _NOISE_OF_TOLD = 0x5EED0001, 0x5EED0002  # mixed into the seed


@dataclass(frozen=True)
class Upsampling(SuperResolution):
    """What the second model of a cascade is told.

    Attributes:
      noise: standard deviation of the noise on the small picture.

    Raises:
      InputError: a setting out of its range.
    """

    kind = "cascade"
    noise: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.noise < np.inf:
            raise InputError(f"task {self}: noise must be at least 0")

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> Float[Array, "b h w k"]:
        low = self.shrunk(x)
        return self.enlarged(low + self.noise * jax.random.normal(key, low.shape))

    def told(
        self, low: Float[Array, "b g v c"], seed: int, ids: Int[np.ndarray, " b"]
    ) -> Float[Array, "b h w c"]:
        """The condition of small pictures, with the noise of every image's number."""
        noise, _ = image_noise(_mixed(seed, _NOISE_OF_TOLD), ids, low.shape[1:])
        return self.enlarged(jnp.asarray(low) + self.noise * noise)


@dataclass(frozen=True)
class Cascade:
    """Two models that fit each other.

    Attributes:
      low, high: the first, of small latents, and the second.
      task: that the second was trained with.

    Raises:
      InputError: models that do not fit.
    """

    low: ModelConfig
    high: ModelConfig
    task: Upsampling

    def __post_init__(self):
        size = self.low.latent_size * self.task.factor
        if size != self.high.latent_size:
            raise InputError(
                f"a cascade of latents of {self.low.latent_size} and {self.high.latent_size} with "
                f"factor {self.task.factor}: the second must have {size}"
            )
        for name in ("channels", "num_classes"):
            first, second = getattr(self.low, name), getattr(self.high, name)
            if first != second:
                raise InputError(f"a cascade of {first} and {second} {name}: give equal ones")
        names = [c.name for c in self.high.conditions]
        if names != [self.task.condition] or self.low.conditions:
            raise InputError(
                f"a cascade needs a first model without conditions and a second with "
                f"{self.task.condition} alone, not {', '.join(names) or 'none'}: train it with "
                f"config.data.task={self.task}"
            )

    def sample(
        self,
        samplers: tuple[Sampler, Sampler],
        params: tuple[Params, Params],
        seed: int,
        ids: Sequence[int] | Int[np.ndarray, " b"],
        labels: Int[Any, " b"],
    ) -> tuple[Float[Array, "b g v c"], Float[Array, "b h w c"]]:
        """Small latents and those of the second model, by ODE solvers.

        An image depends on the seed, its number and its label alone.
        """
        ids = np.asarray(ids, np.int32)
        first, second = samplers
        low = first(params[0], image_noise(seed, ids, self.low.shape)[0], labels)
        noise, _ = image_noise(_mixed(seed, _NOISE_OF_SECOND), ids, self.high.shape)
        cond = {LABEL: labels, self.task.condition: self.task.told(low, seed, ids)}
        return low, second(params[1], noise, cond)

    def flops(self, first: tuple[Segment, ...], second: tuple[Segment, ...]) -> int:
        """Of one image through both plans."""
        return sampling_flops(self.low, first) + sampling_flops(self.high, second)


def _mixed(seed: int, tag: int) -> np.uint32:
    """Another seed for another noise."""
    return np.uint32((seed ^ tag) & 0xFFFFFFFF)
