"""The InceptionV3 of the Frechet inception distance (`inception-2015-12-05`).

The network of Szegedy et al. 2016 (arXiv:1512.00567) as TensorFlow published it in 2015, whose
features define FID (Heusel et al. 2017, arXiv:1706.08500). It differs from the ImageNet network of
torchvision: average pools divide by the number of real pixels, Mixed_7c pools by maximum, and
there are 1008 classes. Names of layers are torchvision's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError

Params = dict[str, Any]

SIZE = 299  # pixels along each side
EPSILON = 1e-3  # of the batch normalisation
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, for sFID
FEATURES = ("64", "192", "768", "2048", "spatial", "logits", "logits_unbiased")
_POOLED = {"64": "maxpool1", "192": "maxpool2", "768": "Mixed_6e", "2048": "Mixed_7c"}


class Layer(NamedTuple):
    """A convolution (rows, columns), batch normalisation and ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: bool = True


class BlockSpec(NamedTuple):
    """Branches that are concatenated in this order, each a chain of layers.

    A chain may end in two layers side by side. The one called `branch_pool` starts from the 3x3
    average or maximum of stride 1; where pool is "reduce", a maximum of stride 2 comes last.
    """

    branches: tuple[tuple[Layer | tuple[Layer, Layer], ...], ...]
    pool: str


def _a(pool: int) -> BlockSpec:
    return BlockSpec(
        (
            (Layer("branch1x1", 64),),
            (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
            (
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                Layer("branch3x3dbl_3", 96, (3, 3)),
            ),
            (Layer("branch_pool", pool),),
        ),
        "average",
    )


def _c(width: int) -> BlockSpec:
    return BlockSpec(
        (
            (Layer("branch1x1", 192),),
            (
                Layer("branch7x7_1", width),
                Layer("branch7x7_2", width, (1, 7)),
                Layer("branch7x7_3", 192, (7, 1)),
            ),
            (
                Layer("branch7x7dbl_1", width),
                Layer("branch7x7dbl_2", width, (7, 1)),
                Layer("branch7x7dbl_3", width, (1, 7)),
                Layer("branch7x7dbl_4", width, (7, 1)),
                Layer("branch7x7dbl_5", 192, (1, 7)),
            ),
            (Layer("branch_pool", 192),),
        ),
        "average",
    )


def _e(pool: str) -> BlockSpec:
    return BlockSpec(
        (
            (Layer("branch1x1", 320),),
            (
                Layer("branch3x3_1", 384),
                (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))),
            ),
            (
                Layer("branch3x3dbl_1", 448),
                Layer("branch3x3dbl_2", 384, (3, 3)),
                (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
            ),
            (Layer("branch_pool", 192),),
        ),
        pool,
    )


# Maximum pools of stride 2 follow the layers 2b and 4a.
STEM = {
    Layer("Conv2d_1a_3x3", 32, (3, 3), stride=2, pad=False): None,
    Layer("Conv2d_2a_3x3", 32, (3, 3), pad=False): None,
    Layer("Conv2d_2b_3x3", 64, (3, 3)): "maxpool1",
    Layer("Conv2d_3b_1x1", 80): None,
    Layer("Conv2d_4a_3x3", 192, (3, 3), pad=False): "maxpool2",
}
BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": BlockSpec(
        (
            (Layer("branch3x3", 384, (3, 3), stride=2, pad=False),),
            (
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                Layer("branch3x3dbl_3", 96, (3, 3), stride=2, pad=False),
            ),
        ),
        "reduce",
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": BlockSpec(
        (
            (
                Layer("branch3x3_1", 192),
                Layer("branch3x3_2", 320, (3, 3), stride=2, pad=False),
            ),
            (
                Layer("branch7x7x3_1", 192),
                Layer("branch7x7x3_2", 192, (1, 7)),
                Layer("branch7x7x3_3", 192, (7, 1)),
                Layer("branch7x7x3_4", 192, (3, 3), stride=2, pad=False),
            ),
        ),
        "reduce",
    ),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("max"),
}


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """What a file of weights has beyond the convolutions.

    `scale`: of the batch normalisation, 1 in the published weights. `logits`: the last layer.
    """

    scale: bool = False
    logits: bool = False


class ConvNorm(nnx.Module):
    """relu((conv(x) - mean) / sqrt(var + 1e-3) * scale + bias) with stored mean and variance.

    Convolutions are done in full float32: at the TF32 of a GPU or the bfloat16 of a TPU the
    features are off by 5e-3 and 5e-2 of their size.
    """

    def __init__(self, channels: int, layer: Layer, *, scale: bool, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels,
            layer.channels,
            layer.kernel,
            strides=(layer.stride, layer.stride),
            padding=[(k // 2, k // 2) if layer.pad else (0, 0) for k in layer.kernel],
            use_bias=False,
            precision=lax.Precision.HIGHEST,
            rngs=rngs,
        )
        ones, zeros = jnp.ones(layer.channels), jnp.zeros(layer.channels)
        self.bias, self.mean, self.var = nnx.Param(zeros), nnx.Param(zeros), nnx.Param(ones)
        self.scale = nnx.Param(ones) if scale else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g v d"]:
        factor = lax.rsqrt(self.var[...] + EPSILON)
        if self.scale is not None:
            factor = factor * self.scale[...]
        mean, factor, bias = (v[None, None, None] for v in (self.mean[...], factor, self.bias[...]))
        return jax.nn.relu((self.conv(x) - mean) * factor + bias)


class Block(nnx.Module):
    """Branches side by side, concatenated along channels."""

    def __init__(self, channels: int, spec: BlockSpec, *, scale: bool, rngs: nnx.Rngs):
        self._spec = spec
        self.channels = channels if spec.pool == "reduce" else 0
        for chain in spec.branches:
            width = channels
            for step in chain:
                layers = (step,) if isinstance(step, Layer) else step
                for layer in layers:
                    setattr(self, layer.name, ConvNorm(width, layer, scale=scale, rngs=rngs))
                width = sum(layer.channels for layer in layers)
            self.channels += width

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g v d"]:
        pool = self._spec.pool
        results = []
        for chain in self._spec.branches:
            h = x
            if chain[0].name == "branch_pool":
                h = _average(x) if pool == "average" else _maximum(x, 1)
            for step in chain:
                layers = (step,) if isinstance(step, Layer) else step
                h = jnp.concatenate([getattr(self, layer.name)(h) for layer in layers], axis=-1)
            results.append(h)
        if pool == "reduce":
            results.append(_maximum(x, 2))
        return jnp.concatenate(results, axis=-1)


class InceptionNetwork(nnx.Module):
    """Scaled images -> outputs of the stem's layers and pools and of the blocks, by name."""

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
        channels = 3
        for layer in STEM:
            setattr(self, layer.name, ConvNorm(channels, layer, scale=config.scale, rngs=rngs))
            channels = layer.channels
        for name, spec in BLOCKS.items():
            block = Block(channels, spec, scale=config.scale, rngs=rngs)
            setattr(self, name, block)
            channels = block.channels
        if config.logits:
            self.fc = nnx.Linear(channels, CLASSES, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> dict[str, Float[Array, "b _ _ _"]]:
        maps = {}
        for layer, pool in STEM.items():
            x = maps[layer.name] = getattr(self, layer.name)(x)
            if pool:
                x = maps[pool] = _maximum(x, 2)
        for name in BLOCKS:
            x = maps[name] = getattr(self, name)(x)
        return maps


def _average(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """3x3 average at stride 1 that divides by the number of real pixels."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b g v c"]:
    """3x3 maximum; padded at stride 1 only."""
    return nnx.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


@functools.cache
def _split(config: InceptionConfig) -> tuple[Any, Params]:
    """Graph definition and abstract parameters; touches no memory."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: InceptionNetwork(config, rngs=nnx.Rngs(0))), nnx.Param
    )
    return graphdef, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class Inception:
    """A pure function of its parameters; hashable, so it can be a static argument of `jax.jit`.

    Images are 299x299 RGB, resized and scaled by the caller: (x - 128) / 128 of 0..255 in the
    TensorFlow graph that FID was published with, 2x/255 - 1 in pytorch-fid.
    """

    config: InceptionConfig = InceptionConfig()

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, 21,802,784 numbers without scale and last layer."""
        return _split(self.config)[1]

    def maps(
        self, params: Params, images: Float[Array, "b h w c"]
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Outputs (after ReLU) of the layers and pools of the stem and of the blocks, by name.

        Raises:
          InputError: images of another size.
        """
        if images.shape[1:] != (SIZE, SIZE, 3):
            raise InputError(
                f"images of shape {images.shape}: the Inception network takes [b, {SIZE}, {SIZE}, "
                "3]; resize them first"
            )
        return nnx.merge(_split(self.config)[0], params)(images)

    def features(
        self, params: Params, images: Float[Array, "b h w c"], names: tuple[str, ...] = ("2048",)
    ) -> dict[str, Float[Array, "b _"]]:
        """The features called `names`, of `FEATURES`.

        64, 192, 768, 2048: means over the output of the first and second maximum pool, Mixed_6e and
        Mixed_7c (FID uses 2048). spatial: the first 7 channels of Mixed_6d.branch1x1 after ReLU,
        17x17x7 flattened, of sFID (Nash et al. 2021, arXiv:2103.03841) as ADM computes it. logits:
        of 1008 classes; logits_unbiased: without the bias, for the Inception Score.

        Under `jax.jit` layers behind the last one asked for are not computed.

        Raises:
          InputError: a name that is not known or needs the last layer where there is none; images
            of another size.
        """
        if unknown := [name for name in names if name not in FEATURES]:
            raise InputError(f"no features {', '.join(unknown)}; choose from {', '.join(FEATURES)}")
        if not self.config.logits and any(name.startswith("logits") for name in names):
            raise InputError(
                "these Inception weights have no last layer, so there are no logits and no "
                "Inception Score: convert pytorch-fid's pt_inception-2015-12-05 file"
            )
        maps = self.maps(params, images)
        found = {name: jnp.mean(maps[layer], axis=(1, 2)) for name, layer in _POOLED.items()}
        # branch1x1 is the first of the branches that are concatenated
        found["spatial"] = maps["Mixed_6d"][..., :SPATIAL_CHANNELS].reshape(len(images), -1)
        if self.config.logits:
            kernel, bias = params["fc"]["kernel"], params["fc"]["bias"]
            logits = jnp.dot(found["2048"], kernel, precision=lax.Precision.HIGHEST)
            found |= {"logits": logits + bias[None], "logits_unbiased": logits}
        return {name: found[name] for name in names}
