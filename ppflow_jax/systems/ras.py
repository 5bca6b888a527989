"""Region-adaptive sampling (RAS, arXiv 2502.10389): most steps compute a part of the tokens.

At a cheap step every image has `share` of its tokens computed, chosen by the velocity of the step
before. They pass all blocks; their queries see the keys and values of all tokens, those of the
others as they were when these were last computed. The velocity of the others stays what it was.
How many tokens are computed is static, which ones is a matter of the image: a gather.

What the authors' code (microsoft/RAS) does and this does not:
  * its starvation factor makes tokens that were left out often more likely to be left out again
    where the largest values are left out (its default); here less likely, as the paper means it;
  * it rounds the two parts of what is left out down one by one, so that one token too many may be
    computed, and fails where none of the largest are left out;
  * its counts may drift from step to step, which would be a program for each;
  * it takes one image at a time, and one choice for both rows of guidance; here every image of a
    batch has its own choice, shared by its two rows, as the choice follows the guided velocity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_flops, ends_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.models.patch import patchify
from ppflow_jax.systems.attention_branch import at, attended, with_attention
from ppflow_jax.systems.composition import Made, in_stages
from ppflow_jax.systems.forecast_schedule import full_steps
from ppflow_jax.systems.token_groups import take

METRICS = ("std", "norm")
_SMALLEST = 1e-30
# Keys and values of every block as they were last computed: depth, rows of the batch, tokens, heads
Kept = tuple[Float[Array, "_ _ _ _ _"], Float[Array, "_ _ _ _ _"]]


@dataclass(frozen=True)
class RasConfig:
    """Which tokens are computed, when, and how many.

    Attributes:
      ras: what of a token's velocity decides, the mean over its pixels: `std`, the standard
        deviation of the channels, or `norm`, their Euclidean norm. Models of one channel have
        no standard deviation: `norm`.
      share: of the tokens that a cheap step computes; 1 is off.
      high: share of those left out that have the largest values; the others have the smallest.
      starvation: k in the factors exp(k n) and exp(-k n) of the smallest and the largest values of
        a token that was left out n times; 0 is none.
      warmup: full steps at the start of a stage.
      interval: after them every so many steps one is full.
      ras_stages: the stages with cheap steps, 0 the coarsest; by default the finest alone.

    Raises:
      InputError: a value out of its range.
    """

    ras: str = "std"
    share: float = 0.5
    high: float = 1.0
    starvation: float = 0.1
    warmup: int = 4
    interval: int = 9
    ras_stages: tuple[int, ...] = ()

    def __post_init__(self):
        if self.ras not in METRICS:
            raise InputError(f"unknown ras {self.ras!r}: one of {', '.join(METRICS)}")
        if not 0 < self.share <= 1 or not 0 <= self.high <= 1:
            raise InputError(
                f"ras share {self.share} must be in (0, 1] and high {self.high} in [0, 1]"
            )
        if not 0 <= self.starvation < np.inf:
            raise InputError(f"ras starvation must be at least 0, got {self.starvation}")
        if self.warmup < 1 or self.interval < 1:
            raise InputError(
                f"ras warmup {self.warmup} and interval {self.interval} must be at least 1"
            )

    def counts(self, tokens: int) -> tuple[int, int]:
        """How many of the smallest and of the largest are left out, of so many tokens."""
        left = min(int((1 - self.share) * tokens), tokens - 1)
        high = int(self.high * left)
        return left - high, high


def spread(
    velocity: Float[Array, "b h w c"], patch: tuple[int, int], metric: str
) -> Float[Array, "b n"]:
    """What decides about every token: one of `METRICS` of each pixel, the mean over its patch."""
    v = velocity.astype(jnp.float32)
    pixels = jnp.std(v, axis=-1, ddof=1) if metric == "std" else jnp.linalg.norm(v, axis=-1)
    return jnp.mean(patchify(pixels[..., None], patch), axis=-1)


def left_out(
    low: Float[Array, "b n"], high: Float[Array, "b n"], counts: tuple[int, int]
) -> Bool[Array, "b n"]:
    """The tokens with the smallest values of `low`, and of the others the largest of `high`."""
    out = _first(low, counts[0])
    return out | _first(jnp.where(out, jnp.inf, -high), counts[1])


def _first(values: Float[Array, "b n"], count: int) -> Bool[Array, "b n"]:
    """Whether each is one of the `count` smallest, the first one first among equals."""
    rank = jnp.argsort(jnp.argsort(values, axis=1, stable=True), axis=1)
    return rank < count


def put(
    x: Float[Array, "b n ..."], tokens: Int[Array, "b a"], rows: Float[Array, "b a ..."]
) -> Float[Array, "b n ..."]:
    """`x` with these rows in the place of those of `tokens`."""
    one = lambda x, i, y: x.at[i].set(y, mode="promise_in_bounds", unique_indices=True)
    return jax.vmap(one)(x, tokens, rows.astype(x.dtype))


@dataclass(frozen=True)
class Ras:
    """The method of a segment (see `flow.method.Method`).

    Its memory: the last velocity, the keys and values of every network, how often each token was
    left out, and which are at the next step. A step's input says whether there is a cheap one next.

    Attributes:
      metric: one of `METRICS`.
      counts: of the smallest and the largest that are left out.
      starvation: of `RasConfig`.
      grid: rows and columns of tokens.
    """

    metric: str
    counts: tuple[int, int]
    starvation: float
    grid: tuple[int, int]
    name: str = "ras"
    level: str = "velocity"

    def memory(self, evaluation: Evaluation) -> dict[str, Any]:
        velocity, kept = evaluation.call(trunks=lambda name: new_kept)
        shape = len(velocity), self.grid[0] * self.grid[1]
        return {
            "velocity": velocity,
            "kept": kept,
            "times": jnp.zeros(shape, jnp.int32),
            "out": jnp.zeros(shape, bool),
        }

    def evaluate(self, evaluation: Evaluation, memory: Any) -> tuple[Array, Any]:
        call, inputs, full = evaluation
        out = memory["out"] & jnp.logical_not(full)
        left = self.grid[0] * self.grid[1] - sum(self.counts)
        active = jnp.argsort(memory["out"], axis=1, stable=True)[:, :left]
        trunks = lambda name: partial(self.trunk, memory["kept"][name], active, full)
        velocity, kept = call(trunks=trunks)
        velocity = jnp.where(self._pixels(out, velocity), memory["velocity"], velocity)
        out, times = self.choose(velocity, memory["times"], inputs["next"])
        return velocity, {"velocity": velocity, "kept": kept, "times": times, "out": out}

    def choose(
        self,
        velocity: Float[Array, "b h w c"],
        times: Int[Array, "b n"],
        counted: Bool[Array, ""] | bool,
    ) -> tuple[Bool[Array, "b n"], Int[Array, "b n"]]:
        """Which tokens the next step leaves out, and how often each was, if that step is cheap."""
        patch = tuple(side // n for side, n in zip(velocity.shape[1:3], self.grid))
        values = jnp.log(jnp.maximum(spread(velocity, patch, self.metric), _SMALLEST))
        spared = self.starvation * times
        out = left_out(values + spared, values - spared, self.counts)
        return out, times + (out & counted)

    def trunk(
        self,
        kept: Kept,
        active: Int[Array, "_ a"],
        full: Bool[Array, ""] | bool,
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n d"], Kept]:
        """The blocks on all tokens, or on those of `active`, where others keep what entered."""
        active = jnp.repeat(active, len(h) // len(active), axis=0)

        def part(_, both):
            h, kept = both
            x, kept = through(blocks, take(h, active), c, kept, active)
            return put(h, active, x), kept

        # Loops of one turn or none change the memory in place; a branch would copy it.
        turns, both = jnp.asarray(full, int), (h, kept)
        whole = lambda _, both: through(blocks, both[0], c, both[1])
        both = jax.lax.fori_loop(0, turns, whole, both)
        return jax.lax.fori_loop(0, 1 - turns, part, both)

    def _pixels(self, tokens: Bool[Array, "b n"], like: Array) -> Bool[Array, "b h w 1"]:
        high, wide = (side // n for side, n in zip(like.shape[1:3], self.grid))
        mask = tokens.reshape(-1, *self.grid)
        return jnp.repeat(jnp.repeat(mask, high, axis=1), wide, axis=2)[..., None]

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        """The final projection is that of all tokens."""
        n = self.grid[0] * self.grid[1]
        left = n if full else n - sum(self.counts)
        others = 4 * left * (n - left) * model.width  # keys and values of tokens not computed
        block = block_flops(model, stage, left, left) + others
        return model.blocks_at(stage) * block + ends_flops(model, stage)


def new_kept(
    blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]
) -> tuple[Float[Array, "b n d"], Kept]:
    """A trunk that makes a memory; only its shapes are used."""
    depth, _, _, *heads = blocks.attention.qkv_kernel.shape
    both = jnp.zeros((depth, *h.shape[:2], *heads), blocks.attention.dtype)
    return h, (both, both)


def through(
    blocks: Block,
    x: Float[Array, "b a d"],
    c: Float[Array, "b d"],
    kept: Kept,
    active: Int[Array, "b a"] | None = None,
) -> tuple[Float[Array, "b a d"], Kept]:
    """Tokens through all blocks, which renews their keys and values among those of all tokens.

    Args:
      active: which of all tokens they are; None: all.
    """

    def body(carry, layer):
        (x, kept), (block, i) = carry, layer
        new = []

        def attention(x):
            q, *fresh = block.attention.project(x)
            for old, rows in zip(kept, fresh):
                rows = rows if active is None else put(at(old, i), active, rows)
                fresh = rows.astype(old.dtype)
                new.append((jax.lax.dynamic_update_index_in_dim(old, fresh, i, 0), rows))
            return attended(block.attention, q, new[0][1], new[1][1])

        x = with_attention(block, x, c, attention)
        return (x, (new[0][0], new[1][0])), None

    layers = np.arange(len(kept[0]), dtype=np.uint32)
    return jax.lax.scan(body, (x, kept), (blocks, layers))[0]


def regional(segments: Iterable[Segment], model: ModelConfig, config: RasConfig) -> list[Segment]:
    """The plan with cheap steps in the stages of `config`.

    Raises:
      InputError: see `composition.in_stages`; a metric that the model's channels do not have.
    """
    if config.ras == "std" and model.channels == 1:
        raise InputError("ras=std compares channels, and the model has one: give ras=norm")

    def make(stage: int, steps: int) -> Made:
        grid = model.pyramid.grid(stage, model.latent_size)
        counts = config.counts(grid[0] * grid[1])
        full = full_steps("taylor", steps, config.interval, config.warmup, 0.0)
        if full.all() or not sum(counts):
            return None
        method = Ras(config.ras, counts, config.starvation, grid)
        return method, full, {"next": np.append(~full[1:], False)}

    return in_stages(segments, model, "ras", config.ras_stages, make)
