"""What a run is trained on: its dataset, and what becomes of a batch on the devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from ppflow_jax.autoencoders.encode import Encoder, moments, to_float
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.data.cache import CacheSource
from ppflow_jax.data.checks import check_shape
from ppflow_jax.data.pipeline import Source
from ppflow_jax.data.sources import open_source
from ppflow_jax.devices.sharding import batch_sharding, data_shards, replicated
from ppflow_jax.errors import InputError, stream_seed

CHUNK = 16  # pictures that a device encodes at once

Batch = dict[str, Array]


def open_inputs(data: ConfigDict, card: Card) -> tuple[Source, Encoder | None, Card]:
    """Source of a run, what encodes its pictures, and the card completed with both.

    The card's experiment then has `trained_on` (identity of dataset and autoencoder).

    Raises:
      InputError: data that cannot be used, or parts that do not fit together.
    """
    model, pictures = card.model, data.source in ("folder", "tfds")
    if data.vae and not pictures and data.source != "cache":
        raise InputError(
            f"config.data.source={data.source} has no pictures to encode: leave config.data.vae "
            "empty"
        )
    if data.space == "pixels" and (data.vae or data.source == "cache"):
        raise InputError(
            "config.data.space=pixels takes neither a latent cache nor config.data.vae: set "
            "config.data.space=latents"
        )
    if data.space == "latents" and pictures and not data.vae:
        raise InputError(
            f"config.data.source={data.source} has pictures, the model is trained on latents: "
            "make a cache with python -m ppflow_jax.prepare (faster), or give "
            "--config.data.vae=vae:DIR to encode in every step"
        )
    encoder = Encoder.parse(data.vae, "config.data.vae") if data.vae else None
    size = model.latent_size * (encoder.config.downsample if encoder else 1)
    source = open_source(
        data.source,
        data.path,
        size=size,
        split=data.split,
        image=data.image_feature,
        label=data.label_feature,
        fields=tuple(data.fields),
    )
    identity, scale = source.identity(), card.latent_scale
    if isinstance(source, CacheSource):
        scale = source.manifest.latent_scale
        if encoder:
            source.manifest.check_autoencoder(data.path, encoder.identity(), data.vae)
        encoder = None
    elif encoder:
        identity |= {"autoencoder": encoder.identity()}
        scale = encoder.latent_scale
        check_shape(f"{data.path} through {data.vae}", encoder.latent_shape(size), model.shape)
    elif pictures:
        check_shape(data.path, (size, size, 3), model.shape)
    source.check_fits(model.shape, model.num_classes)
    if classes := source.classes():
        identity |= {"labels": classes.to_json()}
    identity = json.loads(json.dumps(identity))  # as checkpoints give it back
    experiment = (card.experiment or {}) | {"trained_on": identity}
    return source, encoder, replace(card, experiment=experiment, latent_scale=scale)


def field_shapes(data: ConfigDict, names: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields in a batch as an example of the data has them.

    Raises:
      InputError: data that cannot be read.
    """
    if not names:
        return {}
    one = open_source(data.source, data.path, fields=names).read(np.arange(1), np.zeros(1, bool))
    return {
        name: jax.ShapeDtypeStruct((data.batch_size, *one[name].shape[1:]), one[name].dtype)
        for name in names
    }


def make_inputs(encoder: Encoder | None, mesh: Mesh, seed: int) -> Callable[[Batch, int], Batch]:
    """`inputs(batch, step) -> {"x", "label", fields}`, what is trained on of a global batch.

    From {"x"}: as it is. From {"mean", "std"}: mean + std * noise. From {"image"}, uint8: the same
    of its encoding, or pixels in [-1, 1] without an encoder. The noise is a function of (seed,
    step) over the global batch: new at every visit, and independent of the mesh.
    """
    shards = data_shards(mesh)
    autoencoder = encoder.autoencoder if encoder else None

    def encode(params: Any, images: Array) -> list[Array]:
        per_device = images.shape[0] // shards
        chunk = shards * max(c for c in range(1, CHUNK + 1) if per_device % c == 0)
        # Row c * n + i goes to chunk i, so that every device encodes its own rows
        rows = images.reshape(chunk, -1, *images.shape[1:]).swapaxes(0, 1)
        parts = jax.lax.map(lambda part: moments(autoencoder, params, part), rows)
        return [p.swapaxes(0, 1).reshape(-1, *p.shape[2:]) for p in parts]

    def examples(params: Any, batch: Batch, key: Array, step: Array) -> Batch:
        kept = {name: leaf for name, leaf in batch.items() if name not in ("mean", "std", "image")}
        if "mean" in batch:
            mean, std = batch["mean"], batch["std"]
        elif autoencoder is None:
            return kept | {"x": to_float(batch["image"])}
        else:
            mean, std = encode(params, batch["image"])
        noise = jax.random.normal(jax.random.fold_in(key, step), mean.shape, jnp.float32)
        return kept | {"x": mean + std * noise}

    place, everywhere = batch_sharding(mesh), replicated(mesh)
    jitted = jax.jit(
        examples,
        in_shardings=(everywhere, place, everywhere, everywhere),
        out_shardings=place,
    )
    params = jax.device_put(encoder.params if encoder else {}, everywhere)
    key = jax.jit(jax.random.key, out_shardings=everywhere)(stream_seed(seed, 2))

    def inputs(batch: Batch, step: int) -> Batch:
        return batch if "x" in batch else jitted(params, batch, key, np.uint32(step))

    return inputs
