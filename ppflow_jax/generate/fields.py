"""Fields of a teacher: what a feature network sees in every picture, place by place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.console import progress, say
from ppflow_jax.data.cache import Manifest
from ppflow_jax.data.fields import DTYPE, Field, FieldManifest, check_names, differences, folder_of
from ppflow_jax.data.fields import record as field_record
from ppflow_jax.data.images import as_channels, source_pictures
from ppflow_jax.data.pictures import Pictures
from ppflow_jax.data.sources import ArraySource
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic, locked, writable_directory
from ppflow_jax.generate.encoding import Job
from ppflow_jax.generate.latent_cache import finish, prepare_shards
from ppflow_jax.metrics.extract import check_shape
from ppflow_jax.metrics.networks import FeatureNetwork, Params, load_features

Networks = dict[str, FeatureNetwork]


def networks(texts: list[str], resize: str) -> Networks:
    """By field, from texts NAME=FOLDER.

    Raises:
      InputError: another text, names that cannot be used, no feature network.
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, path) in zip(texts, pairs) if not (name and path)]:
        raise InputError(f"--fields={wrong[0]}: write NAME=FOLDER, as teacher=weights/inception")
    check_names(tuple(name for name, _, _ in pairs))
    return {name: load_features(path, resize) for name, _, path in pairs}


@dataclass(frozen=True)
class Features:
    """The tokens of a feature network for pictures of `size` x `size` pixels."""

    network: FeatureNetwork
    size: int

    def __post_init__(self):
        check_shape("the pictures", (self.size, self.size, 3), self.network)
        if self.network.shape and self.network.shape[-1] != 3:
            raise InputError("the feature network takes grey pictures, these are read as RGB")

    @property
    def params(self) -> Params:
        return self.network.params

    @property
    def function(self) -> Callable[[Params, jax.Array], tuple[jax.Array, ...]]:
        return lambda params, images: (half(self.network.tokens(params, images)),)

    def manifest(self, facts: dict[str, Any], labels: dict[str, Any] | None) -> FieldManifest:
        picture = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.uint8)
        tokens = jax.eval_shape(self.network.tokens, self.params, picture)
        return FieldManifest(**facts, network=self.network.card, shape=tokens.shape[1:])

    def record(self, values: tuple[np.ndarray, ...], label: int) -> bytes:
        return field_record(values[0], label)

    def name(self) -> str:
        card = self.network.card
        return f"the feature network ({card['network']} {card['digest']})"


def half(tokens: jax.Array) -> jax.Array:
    return tokens.astype(jnp.float16)


def cache_field(
    cache: Path, source: Pictures, name: str, network: FeatureNetwork, *, batch: int, workers: int
) -> None:
    """Write the field of a finished cache, or what is missing of it; all processes together.

    Pictures that the cache left out are left out here.

    Raises:
      InputError: other pictures than those of the cache, or a network that does not take them.
    """
    latents = Manifest.read(cache)
    out = folder_of(cache, name)
    made = Features(network, latents.size)
    facts = (latents.flips, batch, latents.shard_pictures)
    job = Job(source, made, out, *facts, jax.process_index(), jax.process_count())
    ours = job.manifest()
    if differing := [what for what in differences(ours, latents) if what != "records"]:
        raise InputError(
            f"{source.name} is not what {cache} was made from ({', '.join(differing)} differ): "
            "give the pictures of the cache"
        )
    writable_directory(out)
    with locked(out) if job.process_index == 0 else contextlib.nullcontext():
        prepare_shards(job, skip_unreadable=bool(latents.unreadable), workers=workers)
        manifest = finish(job)
    if manifest is not None:
        Field(cache, name, latents)  # which checks it
        say(f"field {name}: {manifest.records} records of shape {manifest.shape} in {out}")


def array_field(
    source: ArraySource, out: Path, name: str, network: FeatureNetwork, *, batch: int
) -> None:
    """Write NAME.npy, float16, for arrays that are pictures, with latents.npy and labels.npy.

    Raises:
      InputError: latents, or pictures that the network does not take.
    """
    pictures = source_pictures(source, np.arange(1))[0]
    check_shape(source.name, pictures.shape[1:], network)
    channels = network.shape[-1] if network.shape else 3
    function = jax.jit(lambda params, images: half(network.tokens(params, images)))
    params, parts = jax.device_put(network.params), []
    with contextlib.closing(progress(len(source), 0, "img", f"field {name}")) as bar:
        for first in range(0, len(source), batch):
            index = np.arange(first, min(first + batch, len(source)))
            images = as_channels(source_pictures(source, index)[0], channels)
            padded = np.pad(images, [(0, batch - len(images)), (0, 0), (0, 0), (0, 0)])
            parts.append(np.asarray(function(params, padded))[: len(images)])
            bar.update(len(images))
    values = np.concatenate(parts).astype(DTYPE)
    if not np.isfinite(values).all():
        raise InputError(f"field {name} is not finite in float16: give another network")
    arrays = {"latents": source.x, "labels": source.labels, name: values}
    for file, array in arrays.items():
        path = out / f"{file}.npy"
        if file == name or not path.exists():
            with atomic(path) as temporary, temporary.open("wb") as opened:
                np.save(opened, array)
    say(f"field {name}: {values.shape} in {out / name}.npy")
