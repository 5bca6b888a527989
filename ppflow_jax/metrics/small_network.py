"""A small classifier whose features stand in for Inception's on data that Inception does not suit.

Distances in its features compare models trained on one dataset with one network. They are not
comparable with the FID of papers, nor between two such networks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, UInt8

from ppflow_jax.models.conv import conv

Params = dict[str, Any]
NAMES = ("features", "logits")


@dataclasses.dataclass(frozen=True)
class FeatureNetConfig:
    """Pictures of size x size x channels (1 or 3), `classes`, and what every convolution makes.

    The last of `widths` is the number of features.
    """

    size: int
    channels: int
    classes: int
    widths: tuple[int, ...] = (32, 64, 64)


class FeatureNetModule(nnx.Module):
    """3x3 convolutions with ReLU, halving between them while 4 pixels are left; mean; linear."""

    def __init__(self, config: FeatureNetConfig, *, rngs: nnx.Rngs):
        channels = (config.channels, *config.widths)
        for i, (a, b) in enumerate(zip(channels, config.widths)):
            setattr(self, f"conv{i}", conv(a, b, dtype="float32", rngs=rngs))
        self.fc = nnx.Linear(config.widths[-1], config.classes, rngs=rngs)
        self._layers = len(config.widths)

    def __call__(self, x: Float[Array, "b h w c"]) -> dict[str, Float[Array, "b ..."]]:
        for i in range(self._layers):
            if i and x.shape[1] >= 4:
                x = nnx.max_pool(x, (2, 2), (2, 2))
            x = jax.nn.relu(getattr(self, f"conv{i}")(x))
        features = x.mean(axis=(1, 2))
        return {"tokens": x, "features": features, "logits": self.fc(features)}


@functools.cache
def _split(config: FeatureNetConfig) -> tuple[Any, Params]:
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: FeatureNetModule(config, rngs=nnx.Rngs(0))), nnx.Param
    )
    return graphdef, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A pure function of its parameters; hashable, so it can be a static argument of `jax.jit`."""

    config: FeatureNetConfig

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return _split(self.config)[1]

    def init(self, seed: int) -> Params:
        """Fresh float32 parameters: kernels normal with variance 2 / fan-in, biases 0."""
        rng = np.random.default_rng(seed)

        def draw(leaf):
            if leaf.ndim == 1:
                return np.zeros(leaf.shape, np.float32)
            scale = np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
            return rng.standard_normal(leaf.shape, np.float32) * scale

        return jax.tree.map(draw, self.abstract_params())

    def features(
        self, params: Params, images: UInt8[Array, "b h w c"], names: tuple[str, ...] = NAMES
    ) -> dict[str, Float[Array, "b _"]]:
        """Those of `features` (after ReLU) and `logits` that are named, in float32."""
        found = self._outputs(params, images)
        return {name: found[name] for name in names}

    def tokens(
        self, params: Params, images: UInt8[Array, "b h w c"]
    ) -> Float[Array, "b rows columns d"]:
        """What `features` is the mean of, by place."""
        return self._outputs(params, images)["tokens"]

    def _outputs(self, params: Params, images: UInt8[Array, "b h w c"]) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):
            x = images.astype(jnp.float32) / 127.5 - 1
            return nnx.merge(_split(self.config)[0], params)(x)
