"""Images by number: the same ones for any batch, device or host count.

The last bits of a compiled program's results depend on the number of images it takes, and on
nothing else here: so every device always takes `microbatch` of them, the last ones padded.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int, UInt8, UInt32

from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.data.classes import Classes
from ppflow_jax.devices.sharding import batch_sharding, data_shards, fetch, local_mesh, spread
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.flow.tables import Scales, scales_of
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.network import Params

MICROBATCH = 16
_LABELS = 0x6C61626C  # sets the keys of labels apart from those of noise


class Images(NamedTuple):
    """Some images: their numbers, the model's outputs, and the pictures of these."""

    ids: Int[np.ndarray, " b"]
    latents: Float[np.ndarray, "b h w c"]
    pictures: UInt8[np.ndarray, "b y x k"]


class Generator:
    """Samples a model on the devices of a mesh, a compiled program for all calls.

    Image k is a function of the weights, the sampler, the seed, k, and its label and conditions;
    none of them but the sampler, without its guidance scales, is compiled in. On the devices of
    one process (the default) processes do not talk to each other: each may be given its own
    numbers. On a mesh of several all are given the same, and get the same.
    """

    def __init__(
        self,
        sampler: Sampler,
        decoder: Decoder,
        *,
        microbatch: int = MICROBATCH,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        """
        Args:
          decoder: makes the pictures; its card is that of the model.
          microbatch: images that a device computes at once; changes the last bits.
          dtype: compute dtype of the model; float32 is then also that of matrix products.
          mesh: of the parameters; None: all devices of this process. If they are cut along `fsdp`
            or `tensor`, the sampler's network must have the `sharding.layout` of the mesh.

        Raises:
          InputError: a microbatch below 1.
        """
        if microbatch < 1:
            raise InputError(f"a device must compute at least 1 image at once, not {microbatch}")
        mesh, shape = mesh or local_mesh(), decoder.card.model.shape
        self.decoder, self.microbatch = decoder.on(local_mesh()), microbatch
        self.group = microbatch * data_shards(mesh)
        self.place = batch_sharding(mesh)
        self.precision = "highest" if dtype == "float32" else "default"

        def drawn(seed, ids):
            return image_noise(seed, ids, shape)

        def images(params, weak, scales, noise, labels, keys):
            return sampler(params, noise, labels, keys, weak=weak, scales=scales)

        # shard_map, not automatic partitioning: guidance doubles the batch, and doubling a sharded
        # axis would move images between the devices. Parameters that are cut it would gather whole.
        rows = self.place.spec
        if mesh.size == mesh.shape["data"]:
            shared = functools.partial(jax.shard_map, mesh=mesh, out_specs=rows, check_vma=False)
            drawn = shared(drawn, in_specs=(rows, rows))
            images = shared(images, in_specs=(P(), P(), P(), rows, rows, rows))
        self.drawn, self.compiled = jax.jit(drawn), jax.jit(images)
        self.scales = scales_of(sampler.segments)

    def __call__(
        self,
        params: Params,
        ids: Int[np.ndarray, " n"],
        labels: Cond,
        noise: Float[np.ndarray, "n h w c"] | None = None,
        *,
        seed: int | UInt32[np.ndarray, " n"] = 0,
        scales: Scales | None = None,
        weak: Params | None = None,
        batch: int = 1,
    ) -> Iterator[Images]:
        """The images with these numbers, in order, as many at a time as the devices take.

        Args:
          params: of the model, on the devices of the mesh.
          labels: class of each, or {"label": classes, name: values of a condition}.
          noise: initial noise of each, instead of that of the seed.
          seed: of the noise, one or one of each.
          scales: guidance scales instead of the sampler's, see `flow.tables.scales_of`.
          weak: parameters of the sampler's weaker network.
          batch: images that the devices are given before the first are waited for; at least two
            groups, so that devices work while the host writes. Changes no image.

        Raises:
          RunError: an image is not finite.
        """
        ahead = max(2, -(-batch // self.group))
        waiting: collections.deque = collections.deque()
        seeds = np.broadcast_to(np.asarray(seed, np.uint32), len(ids))
        for first in range(0, len(ids), self.group):
            part = slice(first, first + self.group)
            rows = jax.tree.map(lambda x, part=part: x[part], (seeds, ids, labels, noise))
            started = self._start((params, weak, scales or self.scales), *rows)
            waiting.append((ids[part], started))
            if len(waiting) == ahead:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _start(self, given, *rows) -> jax.Array:
        def pad(x):
            return np.pad(x, [(0, self.group - len(x))] + [(0, 0)] * (x.ndim - 1), mode="edge")

        with jax.default_matmul_precision(self.precision):
            seeds, ids, labels, noise = spread(jax.tree.map(pad, rows), self.place)
            drawn, keys = self.drawn(seeds, ids)
            return self.compiled(*given, drawn if noise is None else noise, labels, keys)

    def _finish(self, ids, started: jax.Array) -> Images:
        latents = fetch(started)[: len(ids)]
        if bad := int(np.sum(~np.isfinite(latents).all(axis=(1, 2, 3)))):
            raise RunError(
                f"{bad} of {len(ids)} images are not finite (numbers {ids[0]} to {ids[-1]}): the "
                "weights may have diverged; try --dtype=float32, more --steps or a lower --cfg"
            )
        chunk = min(16, self.microbatch)
        with jax.default_matmul_precision("highest"):  # else TPUs round the convolutions
            return Images(ids, latents, self.decoder.pictures(latents, chunk))


def choose_labels(
    rule: str, count: int, classes: int, seed: int, known: Classes | None = None
) -> Int[np.ndarray, " n"]:
    """Class of every image, int32.

    `balanced`: the trained classes in turn, so that no class has two images more than another, in
    any first part. `uniform`: drawn from them with equal probabilities, a function of (seed, k).
    Otherwise numbers or names of classes as `1,2,cat`, repeated in order; `classes` itself is the
    null class.

    Args:
      classes: number of the model's classes.
      known: what the model was trained on; None: all classes.

    Raises:
      InputError: none of these, or a class that the model does not have.
    """
    known = known or Classes()
    trained = known.trained(classes)
    if rule == "balanced":
        return np.resize(trained, count)
    if rule == "uniform":
        root = jax.random.fold_in(jax.random.key(seed), _LABELS)
        return trained[np.asarray(_uniform(root, np.arange(count), len(trained)))]
    given = [_class_number(text.strip(), known) for text in rule.split(",")]
    if wrong := [y for y in given if not 0 <= y <= classes]:
        raise InputError(
            f"--labels has {wrong[0]}: the model has classes 0 to {classes - 1} "
            f"(and {classes} for none)"
        )
    return np.resize(np.int32(given), count)


def _class_number(text: str, known: Classes) -> int:
    """A number counts as a number, also where classes have numbers as names."""
    try:
        return int(text)
    except ValueError:
        number = known.number(text)
    if number is None:
        names = f" or names such as {known.names[0]}" if known.names else ""
        raise InputError(
            f"--labels has {text!r}: write numbers{names}, e.g. 1,2,3, or balanced or uniform"
        )
    return number


@functools.partial(jax.jit, static_argnums=2)
def _uniform(root, ids, classes):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(root, ids)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))(keys)
