"""What a run is trained on: its dataset, and what becomes of a batch on the devices."""

from __future__ import annotations

import functools
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
from ppflow_jax.data.sources import PICTURES, open_source
from ppflow_jax.devices.sharding import (
    batch_sharding,
    data_shards,
    fetch,
    local_rows,
    replicated,
    to_global,
)
from ppflow_jax.errors import InputError, stream_seed
from ppflow_jax.models.conditions import LABEL, Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.systems.registry import task as task_of
from ppflow_jax.systems.tasks import Task

CHUNK = 16  # pictures that a device encodes at once

Batch = dict[str, Array]


def open_inputs(data: ConfigDict, card: Card) -> tuple[Source, Encoder | None, Card]:
    """Source of a run, what encodes its pictures, and the card completed with both.

    The card's experiment then has `trained_on` (identity of dataset and autoencoder).

    Raises:
      InputError: data that cannot be used, or parts that do not fit together.
    """
    model, pictures = card.model, data.source in PICTURES
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
    task = task_of(data.task)
    if task and task.of_pixels and data.space == "latents" and not pictures:
        raise InputError(
            f"config.data.task={data.task} is computed from pictures and "
            f"config.data.source={data.source} has none: use {', '.join(PICTURES)} with "
            "config.data.vae, or config.data.space=pixels"
        )
    encoder = Encoder.parse(data.vae, "config.data.vae") if data.vae else None
    size = model.latent_size * (encoder.config.downsample if encoder else 1)
    source = _source(data, tuple(data.fields), size)
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
    _check_told(source, model, tuple(data.fields))
    if classes := source.classes():
        identity |= {"labels": classes.to_json()}
    identity = json.loads(json.dumps(identity))  # as checkpoints give it back
    experiment = (card.experiment or {}) | {"trained_on": identity}
    return source, encoder, replace(card, experiment=experiment, latent_scale=scale)


def _check_told(source: Source, model: ModelConfig, fields: tuple[str, ...]) -> None:
    """
    Raises:
      InputError: a field that is a condition of the model has another shape than that.
    """
    shapes = {c.name: c.shape(model) for c in model.asked if c.name in fields}
    one = source.read(np.arange(1), np.zeros(1, bool)) if shapes else {}
    for name, shape in shapes.items():
        if one[name].shape[1:] != shape:
            raise InputError(
                f"{source.name}: field {name} has shape {one[name].shape[1:]}, the model's "
                f"condition of that name has {shape}"
            )


def _source(data: ConfigDict, fields: tuple[str, ...], size: int = 0) -> Source:
    features = dict(image=data.image_feature, label=data.label_feature)
    return open_source(
        data.source,
        data.path,
        size=size,
        split=data.split,
        **features,
        fields=fields,
        stage=data.stage,
    )


def field_shapes(data: ConfigDict, names: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields in a batch as an example of the data has them.

    Raises:
      InputError: data that cannot be read.
    """
    if not names:
        return {}
    one = _source(data, names).read(np.arange(1), np.zeros(1, bool))
    return {
        name: jax.ShapeDtypeStruct((data.batch_size, *one[name].shape[1:]), one[name].dtype)
        for name in names
    }


def shown_to(
    card: Card, source: Source, inputs: Callable[[Batch, int], Batch], mesh: Mesh, count: int
) -> Cond:
    """What a model is told for `count` samples that are looked at while it is trained.

    The trained classes in turn; of a model with conditions what is told of the first examples of
    `source`, without mirroring. Host arrays, the same on every process.
    """
    if not card.model.asked:
        return np.resize(card.classes.trained(card.model.num_classes), count)
    rows = -(-count // data_shards(mesh)) * data_shards(mesh)
    place = batch_sharding(mesh)
    index = np.arange(rows)[local_rows(place, rows)] % len(source)
    batch = source.read(index, np.zeros(len(index), bool))
    batch.pop("unreadable", None)
    seen = inputs(to_global(batch, place, rows), 0)
    names = (LABEL, *(condition.name for condition in card.model.asked))
    return {name: fetch(seen[name])[:count] for name in names}


def make_inputs(
    encoder: Encoder | None, mesh: Mesh, seed: int, task: Task | None = None
) -> Callable[[Batch, int], Batch]:
    """`inputs(batch, step) -> {"x", "label", fields}`, what is trained on of a global batch.

    From {"x"}: as it is. From {"mean", "std"}: mean + std * noise. From {"image"}, uint8: the same
    of its encoding, or pixels in [-1, 1] without an encoder. The noise is a function of (seed,
    step) over the global batch: new at every visit, and independent of the mesh. With a task also
    its condition, a function of the same.
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

    def told(task: Task, params: Any, batch: Batch, keys: tuple, step: Array) -> Batch:
        """The batch that the model sees, with what the task tells it."""
        seen = batch if "x" in batch else examples(params, batch, keys[0], step)
        key = jax.random.fold_in(keys[1], step)
        if task.of_pixels and autoencoder is not None:
            picture = task(to_float(batch["image"]), key).repeat(3, axis=-1)
            values = encode(params, jnp.round(127.5 * (picture + 1)).astype(jnp.uint8))[0]
        else:
            values = task(seen["x"], key)
        return seen | {task.condition: values}

    place, everywhere = batch_sharding(mesh), replicated(mesh)
    jitted = jax.jit(
        examples if task is None else functools.partial(told, task),
        in_shardings=(everywhere, place, everywhere, everywhere),
        out_shardings=place,
    )
    params = jax.device_put(encoder.params if encoder else {}, everywhere)
    make_key = jax.jit(jax.random.key, out_shardings=everywhere)
    key = make_key(stream_seed(seed, 2))
    keys = key if task is None else (key, make_key(stream_seed(seed, 3)))

    def inputs(batch: Batch, step: int) -> Batch:
        if "x" in batch and task is None:
            return batch
        return jitted(params, batch, keys, np.uint32(step))

    return inputs
