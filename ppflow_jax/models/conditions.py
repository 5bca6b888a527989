"""What a model is told about an image besides time and label.

A condition is configuration and factory at once, and the owner of its leaves: their FLOPs and
PyTorch names. These are in `params["conditions"][name]`, so that the leaves of the model without it
keep their shapes; they start so that the model computes what it did without it.

A network takes, in the place of the labels alone, {"label": labels, name: values, ...}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.models.layers import FREQUENCIES, _zeros, linear
from ppflow_jax.models.parts import Described, Execution, Key
from ppflow_jax.models.patch import patchify

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig
    from ppflow_jax.pyramid import Pyramid

LABEL = "label"
# Scalars that the sampler supplies, so that nobody is asked for them: the length of the interval
# whose average velocity is wanted, and the guidance scale minus 1. A network that is called without
# them takes 0, which is the velocity itself, and no guidance.
INTERVAL, GUIDANCE = SUPPLIED = ("interval", "guidance")
# Labels, int32, or {"label": labels, name: values} with a leading axis of images
Cond = Int[Array, " b"] | Int[np.ndarray, " b"] | dict[str, Any]
# Names of what a batch holds besides conditions
_TAKEN = (LABEL, "x", "t", "image", "mean", "std", "noise")


@dataclass(frozen=True)
class Condition(Described):
    """Base of all conditions: frozen dataclasses of numbers and texts.

    Attributes:
      enters: `input` (added to the tokens), `vector` (added to the features of time), or `blocks`
        (see `models.feedback`): then nobody gives values.
      name: of its values, and of its leaves.

    Raises:
      InputError: a name that is none, or that something else in a batch has.
    """

    enters: ClassVar[str]
    name: str

    def __post_init__(self):
        free = self.name not in _TAKEN and self.name not in dir(nnx.Dict)
        if not (self.name.isidentifier() and free):
            raise InputError(
                f"condition {self}: name={self.name!r} is no name, or that of something else: "
                "choose another, such as low or mask"
            )

    @property
    def dropped(self) -> float:
        """Probability with which training replaces its values by `null`."""
        return 0.0

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: a model that cannot have it.
        """

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Of the value of one image."""
        raise NotImplementedError

    def null(self, values: Array) -> Array:
        """What stands for values that are not given: in training, and in guidance."""
        raise NotImplementedError

    def module(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> nnx.Module:
        """Its leaves."""
        raise NotImplementedError

    def tokens(
        self, module: Any, values: Array, stage: int, patch: tuple[int, int]
    ) -> Float[Array, "b n d"]:
        """Of one that enters at the input: what is added to the tokens of a stage, float32."""
        raise NotImplementedError

    def vector(self, module: Any, values: Float[Array, " b"]) -> Float[Array, "b f"]:
        """Of one that enters the vector: what is added to the features of time, float32."""
        raise NotImplementedError

    def flops(self, model: ModelConfig) -> int:
        """FLOPs of its matrix products for one image, 2 per multiply-add."""
        raise NotImplementedError

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        """PyTorch names of its leaves: `conditions.NAME.` and what follows."""
        raise NotImplementedError

    @classmethod
    def read(cls, state: Mapping[str, Any], name: str, pyramid: Pyramid) -> Condition | None:
        """The condition of a PyTorch state dict under this name, if it is of this kind."""
        raise NotImplementedError


@dataclass(frozen=True)
class Channels(Condition):
    """A picture or latent beside the noisy one, float32 [b, h, w, channels], of its size.

    Every stage has a projection of its patches, without bias, whose tokens are added to those of
    the noisy latent. That is what concatenated channels and a wider patch projection compute
    (arXiv 2112.10752, Sec. 4.3).

    Attributes:
      channels: of the values.
      drop: probability with which training replaces them by zeros. With 0 guidance keeps them
        too; otherwise it takes zeros together with the null class.

    Raises:
      InputError: a setting out of its range.
    """

    kind = "channels"
    enters = "input"
    channels: int = 4
    drop: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.channels < 1 or not 0 <= self.drop < 1:
            raise InputError(
                f"condition {self}: channels must be at least 1, drop at least 0 and below 1"
            )

    @property
    def dropped(self) -> float:
        return self.drop

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        return (model.latent_size, model.latent_size, self.channels)

    def null(self, values: Array) -> Array:
        return jnp.zeros_like(values) if self.drop else values

    def module(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> nnx.Module:
        sizes = [s.patch[0] * s.patch[1] * self.channels for s in model.pyramid.stages]
        options: Any = dict(dtype=run.dtype, init=_zeros, bias=False)
        return nnx.List([linear(size, model.width, rngs, **options) for size in sizes])

    def tokens(
        self, module: Any, values: Float[Array, "b h w c"], stage: int, patch: tuple[int, int]
    ) -> Float[Array, "b n d"]:
        return module[stage](patchify(values, patch)).astype(jnp.float32)

    def flops(self, model: ModelConfig) -> int:
        """2 D C for every pixel, whatever the patches."""
        return 2 * model.width * math.prod(self.shape(model))

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        for stage in range(len(model.pyramid)):
            path = ("conditions", self.name, stage, "kernel")
            name = f"conditions.{self.name}.{stage}.weight"
            yield Key(name, path, (), np.transpose, np.transpose)

    @classmethod
    def read(cls, state: Mapping[str, Any], name: str, pyramid: Pyramid) -> Channels | None:
        weight = f"conditions.{name}.0.weight"
        if weight not in state:
            return None
        return cls(name, state[weight].shape[-1] // math.prod(pyramid.stages[0].patch))


@dataclass(frozen=True)
class Scalar(Condition):
    """A number for every image, float32 [b], such as the guidance scale of a distilled student.

    Its sinusoid passes a projection without bias and is added to the features of time, before
    their MLP (arXiv 2210.03142, Sec. 3.1, in the form of the diffusers library). It says how the
    model is evaluated, not what is asked for: training does not drop it and guidance keeps it.

    Attributes:
      features: of the sinusoid.
      scale: factor of the number in it.

    Raises:
      InputError: a setting out of its range.
    """

    kind = "scalar"
    enters = "vector"
    features: int = 256
    scale: float = 1000.0

    def __post_init__(self):
        super().__post_init__()
        if self.features < 4 or not self.scale > 0:
            raise InputError(f"condition {self}: features must be at least 4, scale above 0")

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        return ()

    def null(self, values: Array) -> Array:
        return values

    def module(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> nnx.Module:
        # As the projections of time: in bfloat16 close numbers would be one
        options: Any = dict(dtype=jnp.float32, init=_zeros, bias=False)
        return linear(self.features, 2 * FREQUENCIES, rngs, **options)

    def vector(self, module: Any, values: Float[Array, " b"]) -> Float[Array, "b f"]:
        return module(sinusoid(values, self.features, self.scale)).astype(jnp.float32)

    def flops(self, model: ModelConfig) -> int:
        return 4 * FREQUENCIES * self.features

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        path = ("conditions", self.name, "kernel")
        yield Key(f"conditions.{self.name}.weight", path, (), np.transpose, np.transpose)

    @classmethod
    def read(cls, state: Mapping[str, Any], name: str, pyramid: Pyramid) -> Scalar | None:
        weight = f"conditions.{name}.weight"
        return cls(name, state[weight].shape[-1]) if weight in state else None


def sinusoid(values: Float[Array, " b"], features: int, scale: float) -> Float[Array, "b f"]:
    """[sin, cos] of scale x 10000^(-k/(h-1)), k = 0 .. h-1, h = features // 2; a 0 if it is odd.

    The whole turns of an angle are taken away before it is rounded: a product of float32 numbers
    would be off by 7e-4 at x = 14 with a scale of 1000. Exact to 2e-6 for |x| < 32.
    """
    half = features // 2
    turns = scale * 10000.0 ** (-np.arange(half) / (half - 1)) / (2 * np.pi)
    # 12 bits of the number times 12 bits of the turns have no rounding in float32
    step = 2.0 ** (np.ceil(np.log2(turns[0])) - 12)
    coarse = np.round(turns / step) * step
    first = jnp.round(values * 128) / 128
    product = first[:, None] * np.float32(coarse)[None]
    rest = first[:, None] * np.float32(turns - coarse)[None]
    rest += (values - first)[:, None] * np.float32(turns)[None]
    angle = 2 * np.pi * ((product - jnp.round(product)) + rest)
    odd = jnp.zeros((len(values), features % 2))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), odd], axis=-1)


class Told(NamedTuple):
    """What a network is told about its images: their labels, and values of conditions by name."""

    labels: Int[Array, " b"]
    values: dict[str, Array]


def split(conditions: tuple[Condition, ...], y: Cond) -> Told:
    """The labels and values that `y` holds for a model with these conditions.

    Raises:
      InputError: there are others than those of the model.
    """
    labels, values = (y[LABEL], dict(y)) if isinstance(y, dict) else (y, {LABEL: y})
    del values[LABEL]
    names = [condition.name for condition in conditions if condition.enters != "blocks"]
    for name in supplied(conditions):
        values.setdefault(name, jnp.zeros(len(labels)))
    if sorted(values) != sorted(names):
        raise InputError(
            f"the model's conditions are {', '.join(names) or 'none'}, the network was given "
            f"{', '.join(values) or 'none'}: give labels and the model's conditions, by name"
        )
    return Told(labels, values)


def supplied(conditions: tuple[Condition, ...]) -> tuple[str, ...]:
    """Those of the conditions that the sampler supplies."""
    return tuple(c.name for c in conditions if isinstance(c, Scalar) and c.name in SUPPLIED)


def null(conditions: tuple[Condition, ...], null_label: int, y: Cond) -> Cond:
    """The null class in the place of the labels in `y`, and of every condition its null."""
    if not isinstance(y, dict):
        return jnp.full_like(y, null_label)
    nothing = {LABEL: jnp.full_like(y[LABEL], null_label)}
    return nothing | {c.name: c.null(y[c.name]) for c in conditions if c.name in y}
