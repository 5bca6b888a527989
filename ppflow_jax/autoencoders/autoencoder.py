"""One interface to the autoencoders: images in [-1, 1] <-> *scaled* latents, NHWC.

Scaled means what the diffusion model sees: the KL autoencoder multiplies by its `scaling_factor`
on the way in and divides on the way out, TAESD works in that space by itself. Parameters are a
plain dict `{"encoder": ..., "decoder": ...}`; either half may be absent where it is not used.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, UInt8

from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig, KLDecoder, KLEncoder
from ppflow_jax.autoencoders.taesd import TAESDConfig, TAESDDecoder, TAESDEncoder
from ppflow_jax.data.transforms import to_uint8
from ppflow_jax.errors import InputError

Params = dict[str, Any]
Config = AutoencoderKLConfig | TAESDConfig

_HALVES = {
    AutoencoderKLConfig: {"encoder": KLEncoder, "decoder": KLDecoder},
    TAESDConfig: {"encoder": TAESDEncoder, "decoder": TAESDDecoder},
}


@functools.cache
def _split(config: Config, dtype: str, half: str) -> tuple[Any, Params]:
    """Graph definition and abstract parameters of one half; touches no memory."""
    module = _HALVES[type(config)][half]
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0))), nnx.Param
    )
    return graphdef, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A pure function of its parameters; hashable, so it can be a static argument of `jax.jit`.

    `dtype` is the compute dtype; parameters, latents, images, normalisation statistics and
    softmax are float32. On TPU and on tensor-core GPUs float32 convolutions run at reduced
    precision unless `jax.default_matmul_precision("highest")` is set.
    """

    config: Config
    dtype: str = "float32"

    def init(self, seed: int) -> Params:
        """Random float32 parameters, for tests: no autoencoder is trained here.

        Kernels are normal with variance 1 / fan-in, scales near 1, biases near 0; drawn by NumPy
        because compiling an initialiser for every shape takes longer than the tests.
        """
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            values = rng.standard_normal(leaf.shape, np.float32)
            if leaf.ndim > 1:
                values /= np.sqrt(np.prod(leaf.shape[:-1]))
            else:
                values = 0.1 * values + (path[-1].key == "scale")
            return jnp.asarray(values, jnp.float32)

        return jax.tree_util.tree_map_with_path(draw, self.abstract_params())

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return {half: _split(self.config, self.dtype, half)[1] for half in ("encoder", "decoder")}

    def encode(
        self, params: Params, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b g v z"], Float[Array, "b g v z"]]:
        """Mean and standard deviation of the latent, both scaled; `mean + std * noise` samples.

        The log-variance of the KL autoencoder is clipped to [-30, 20] (before scaling); the
        standard deviation of TAESD is 0. Raises `InputError` for a size that does not divide.
        """
        h, w, c = images.shape[1:]
        f = self.config.downsample
        if h % f or w % f or c != self.config.in_channels:
            raise InputError(
                f"images are {h}x{w} with {c} channels; this autoencoder needs sides divisible "
                f"by {f} and {self.config.in_channels} channels: resize or crop them first"
            )
        return self._merge(params, "encoder")(images)

    def decode(self, params: Params, latents: Float[Array, "b g v z"]) -> Float[Array, "b h w c"]:
        """Images clamped to [-1, 1]. Raises `InputError` for another number of channels."""
        if latents.shape[-1] != self.config.latent_channels:
            raise InputError(
                f"latents of shape {latents.shape} have {latents.shape[-1]} channels (last axis), "
                f"but this autoencoder decodes {self.config.latent_channels}"
            )
        return jnp.clip(self._merge(params, "decoder")(latents), -1.0, 1.0)

    def _merge(self, params: Params, half: str) -> Callable[..., Any]:
        if half not in params:
            raise InputError(
                f"these autoencoder parameters have no {half} (they hold: {', '.join(params)}); "
                f"convert a file that has the {half} too"
            )
        return nnx.merge(_split(self.config, self.dtype, half)[0], params[half])


# One call per half and not one per Autoencoder: `jax.jit` then caches over static arguments, and
# only the half in use is an input of the compiled program.
@functools.partial(jax.jit, static_argnums=0)
def _encode(autoencoder: Autoencoder, params: Params, images):
    return autoencoder.encode(params, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(autoencoder: Autoencoder, uint8: bool, params: Params, latents):
    images = autoencoder.decode(params, latents)
    return to_uint8(images) if uint8 else images


def encode_chunked(
    autoencoder: Autoencoder,
    params: Params,
    images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"],
    *,
    chunk: int = 16,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[Float[np.ndarray, "n g v z"], Float[np.ndarray, "n g v z"]]:
    """`encode` of any number of images on the host, `chunk` at a time; see `decode_chunked`."""
    half = {k: v for k, v in params.items() if k == "encoder"}
    return _chunked(functools.partial(_encode, autoencoder, half), images, chunk, sharding)


def decode_chunked(
    autoencoder: Autoencoder,
    params: Params,
    latents: Float[Array, "n g v z"] | Float[np.ndarray, "n g v z"],
    *,
    chunk: int = 16,
    uint8: bool = False,
    sharding: jax.sharding.Sharding | None = None,
) -> Float[np.ndarray, "n h w c"] | UInt8[np.ndarray, "n h w c"]:
    """`decode` of any number of latents on the host, `chunk` at a time, one compilation.

    The last chunk is padded by repeating its last item, and the padding is cut off again. Memory
    is bounded along the batch only: tiling in space would change the result of the KL
    autoencoder, whose normalisation and attention see the whole image. With `uint8` the images
    are rounded on the device (`to_uint8`). `sharding` places each chunk, so `chunk` must divide
    over it. Raises `InputError` for an empty batch or a chunk below 1.
    """
    half = {k: v for k, v in params.items() if k == "decoder"}
    return _chunked(functools.partial(_decode, autoencoder, uint8, half), latents, chunk, sharding)


def _chunked(function: Callable, batch, chunk: int, sharding) -> Any:
    n = len(batch)
    if n == 0 or chunk < 1:
        raise InputError(f"nothing to do: {n} items in chunks of {chunk}; both must be at least 1")
    results = []
    for start in range(0, n, chunk):
        part = np.asarray(batch[start : start + chunk])
        kept = len(part)
        part = np.pad(part, [(0, chunk - kept)] + [(0, 0)] * (part.ndim - 1), mode="edge")
        part = jax.device_put(part, sharding)
        results.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], function(part)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)
