"""Feature probes: what the tokens inside a model tell of classes (arXiv 2303.09769, 2307.08702).

An example x1 is noised to x_t = alpha(t) x1 + sigma(t) x0, with noise x0 that belongs to the
example and is the same at every time. The network of the stage of t sees it with the null class;
the tokens after a block are pooled, and a linear head is fitted to four of five examples and judged
on the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.autoencoders.encode import Encoder
from ppflow_jax.console import progress
from ppflow_jax.data.pipeline import Source
from ppflow_jax.devices.sharding import batch_sharding, data_shards, local_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import interpolate
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.metrics.probe_heads import HEADS
from ppflow_jax.metrics.train_small_network import HELD_OUT
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.stack import Taps
from ppflow_jax.systems.repa import pooled
from ppflow_jax.train.inputs import make_inputs

# By block and pool: [n, d]
Features = dict[tuple[int, str], Float[np.ndarray, "n _"]]


@dataclass(frozen=True)
class Sweep:
    """What is tried, all with all.

    Attributes:
      blocks: whose outputs are read, counted from 1.
      times: in [0, 1], 0 is noise.
      pools: `mean`, or `RxC`: means over R times C equal areas, side by side.
      heads: of `probe_heads.HEADS`.
    """

    blocks: tuple[int, ...]
    times: tuple[float, ...]
    pools: tuple[str, ...] = ("mean",)
    heads: tuple[str, ...] = ("ridge",)

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: nothing of a kind, or what the model or its stages do not have.
        """
        if not (self.blocks and self.times and self.pools and self.heads):
            raise InputError("give at least one of each of blocks, times, pools and heads")
        if wrong := [b for b in self.blocks if not 1 <= b <= model.depth]:
            raise InputError(f"block {wrong[0]}: the model has blocks 1 to {model.depth}")
        if wrong := [t for t in self.times if not 0 <= t <= 1]:
            raise InputError(f"time {wrong[0]}: times are from 0 (noise) to 1 (data)")
        if wrong := [h for h in self.heads if h not in HEADS]:
            raise InputError(f"unknown head {wrong[0]!r}: one of {', '.join(HEADS)}")
        for pool in self.pools:
            rows, columns = areas(pool)
            for t in self.times:
                grid = model.pyramid.grid(stage := model.pyramid.stage_at(t), model.latent_size)
                if rows > grid[0] or columns > grid[1]:
                    raise InputError(
                        f"pool {pool} at t={t:g}: stage {stage} has {grid[0]}x{grid[1]} tokens: "
                        "choose at most as many areas"
                    )


def areas(pool: str) -> tuple[int, int]:
    """Rows and columns of areas that a pool averages over.

    Raises:
      InputError: neither `mean` nor `RxC`.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", "1x1" if pool == "mean" else pool)
    if not match:
        raise InputError(f"unknown pool {pool!r}: mean, or RxC such as 2x2")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Examples:
    """x float32 [n, h, w, c] as the model sees it, labels, and numbers in the dataset."""

    x: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    ids: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def held_out(self) -> np.ndarray:
        """Every fifth, which no head is trained on."""
        return np.arange(len(self)) % HELD_OUT == HELD_OUT - 1


def read_examples(
    source: Source, encoder: Encoder | None, count: int, batch: int, seed: int
) -> Examples:
    """At most `count`, spread over the dataset, unmirrored; latents of a distribution by the seed.

    Raises:
      InputError: too few to hold some out.
    """
    if min(count, len(source)) < 2 * HELD_OUT:
        raise InputError(f"{source.name}: a probe needs at least {2 * HELD_OUT} examples")
    ids = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
    mesh = local_mesh()
    inputs, place = make_inputs(encoder, mesh, seed), batch_sharding(mesh)
    xs, labels = [], []
    for step, (rows, some) in enumerate(batches(ids, batch)):
        read = source.read(some, np.zeros(len(some), bool))
        read.pop("unreadable", None)
        found = inputs(jax.device_put(read, place), step)
        xs.append(np.asarray(found["x"])[:rows])
        labels.append(np.asarray(found["label"])[:rows])
    return Examples(np.concatenate(xs), np.concatenate(labels), ids)


def batches(ids: np.ndarray, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers in batches that the devices share, the last one filled up with its last number."""
    size = -(-min(batch, len(ids)) // (shards := data_shards(local_mesh()))) * shards
    for first in range(0, len(ids), size):
        some = ids[first : first + size]
        yield len(some), np.pad(some, (0, size - len(some)), mode="edge")


def features_at(
    model: Model, examples: Examples, sweep: Sweep, t: float, *, batch: int, seed: int
) -> Features:
    """Pooled tokens of all examples at one time, in float32."""
    program, place = _program(model, sweep, t), batch_sharding(local_mesh())
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    with jax.default_matmul_precision("highest" if model.dtype == "float32" else "default"):
        for rows, some in batches(np.arange(len(examples)), batch):
            noise, _ = image_noise(np.uint32(seed), examples.ids[some], model.config.shape)
            given = jax.device_put((examples.x[some], np.asarray(noise)), place)
            for key, values in zip(_keys(sweep), program(model.params, *given)):
                found.setdefault(key, []).append(np.asarray(values)[:rows])
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _keys(sweep: Sweep) -> list[tuple[int, str]]:
    return [(block, pool) for block in sweep.blocks for pool in sweep.pools]


def _program(model: Model, sweep: Sweep, t: float) -> Callable[..., list[Array]]:
    config, apply = model.config, model.network
    stage = config.pyramid.stage_at(t)
    grid, path = config.pyramid.grid(stage, config.latent_size), model.card.flow.interpolant

    def pool(tokens: Array, name: str) -> Array:
        places = tokens.reshape(len(tokens), *grid, tokens.shape[-1])
        return pooled(places, areas(name)).reshape(len(tokens), -1)

    def run(params: Any, x: Array, noise: Array) -> list[Array]:
        times, null = jnp.full(len(x), t, jnp.float32), jnp.full(len(x), config.null_label)
        xt, _ = interpolate(path, noise, x, times)
        taps = Taps(h=tuple(sorted(set(sweep.blocks))))
        found = apply(params, (xt,), (times,), (null,), (stage,), taps=taps)[0].taps
        return [pool(found[f"h/{block}"], name) for block, name in _keys(sweep)]

    return jax.jit(run)


def probe(
    model: Model, examples: Examples, sweep: Sweep, *, batch: int = 64, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for every time, block, pool and head, with its accuracy on the held-out examples.

    Raises:
      InputError: see `Sweep.check`.
    """
    sweep.check(model.config)
    held, labels = examples.held_out, examples.labels
    classes, rows = model.config.num_classes, []
    total = len(sweep.times) * len(_keys(sweep)) * len(sweep.heads)
    with progress(total, 0, "head", "probe") as bar:
        for t in sweep.times:
            features = features_at(model, examples, sweep, t, batch=batch, seed=seed)
            for (block, pool), values in features.items():
                for name in sweep.heads:
                    train, test = ((values[m], labels[m]) for m in (~held, held))
                    given = {"seed": seed} if name == "linear" else {}
                    head = HEADS[name](*train, classes, **given)
                    rows.append(
                        {
                            "time": t,
                            "stage": model.config.pyramid.stage_at(t),
                            "block": block,
                            "pool": pool,
                            "head": name,
                            "accuracy": head.accuracy(*test),
                            "train_accuracy": head.accuracy(*train),
                        }
                    )
                    bar.update()
    return rows
