"""PyTorch layout of what all transformers here have: attention, patch and final projections.

The PyTorch code shuffles a coarse patch's pixels into channels before a convolution of the base
patch, and writes the mirror image of that on the way out; here a patch is one matrix product on
its pixels, so rows and columns are reordered. Every entry is a bijection of the elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import einops
import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.models.leaves import Key, linear_keys
from ppflow_jax.pyramid import Pyramid

# Rows and columns of the base patch (p, q), and how many of it are in this one (i, j)
Factor = dict[str, int]


def factors(pyramid: Pyramid) -> Iterator[tuple[str, Factor]]:
    """Suffix and factor of every stage: no suffix for the last, 1, 2, ... from the coarsest.

    Raises:
      InputError: a patch is no multiple of the last stage's, which that layout needs.
    """
    base = pyramid.stages[-1].patch
    for number, stage in enumerate(pyramid.stages, 1):
        patch = stage.patch
        if patch[0] % base[0] or patch[1] % base[1]:
            raise InputError(
                f"pyramid {pyramid} has no PyTorch layout: it needs every patch to be a "
                f"multiple of the last one, {base[1]}x{base[0]}"
            )
        suffix = "" if number == len(pyramid) else str(number)
        yield suffix, dict(p=base[0], q=base[1], i=patch[0] // base[0], j=patch[1] // base[1])


def lacking(state: Mapping[str, Any], axes: dict[str, int]) -> list[str]:
    """Those of these names that a state dict does not have as arrays of so many axes."""

    def there(name: str, count: int) -> bool:
        shape = state[name].shape if name in state else ()
        return len(shape) == count and all(shape)

    return [f"{name} with {count} axes" for name, count in axes.items() if not there(name, count)]


def patch_keys(name: str, path: tuple[str | int, ...], sizes: Factor) -> Iterator[Key]:
    """Patch convolution [D, (c i j), p, q]; `sizes` is a factor and channels c."""
    yield Key(
        f"{name}.weight",
        (*path, "kernel"),
        (),
        lambda x: einops.rearrange(x, "d (c i j) p q -> (p i q j c) d", **sizes),
        lambda x: einops.rearrange(x, "(p i q j c) d -> d (c i j) p q", **sizes),
    )
    yield Key(f"{name}.bias", (*path, "bias"))


def final_keys(name: str, path: tuple[str | int, ...], sizes: Factor) -> Iterator[Key]:
    """Final projection [(p q o i j), D]; `sizes` is a factor and output channels o."""
    yield Key(
        f"{name}.weight",
        (*path, "kernel"),
        (),
        lambda x: einops.rearrange(x, "(p q o i j) d -> d (p i q j o)", **sizes),
        lambda x: einops.rearrange(x, "d (p i q j o) -> (p q o i j) d", **sizes),
    )
    yield Key(
        f"{name}.bias",
        (*path, "bias"),
        (),
        lambda x: einops.rearrange(x, "(p q o i j) -> (p i q j o)", **sizes),
        lambda x: einops.rearrange(x, "(p i q j o) -> (p q o i j)", **sizes),
    )


def attention_keys(layer: int, heads: int) -> Iterator[Key]:
    """Queries, keys and values of one matrix [3 D, D], and the projection after them."""
    name, index, cut = f"blocks.{layer}", (layer,), dict(h=heads, c=3)
    yield Key(
        f"{name}.attn.qkv.weight",
        ("blocks", "attention", "qkv_kernel"),
        index,
        lambda x: einops.rearrange(x, "(c h e) d -> d c h e", **cut),
        lambda x: einops.rearrange(x, "d c h e -> (c h e) d"),
    )
    yield Key(
        f"{name}.attn.qkv.bias",
        ("blocks", "attention", "qkv_bias"),
        index,
        lambda x: einops.rearrange(x, "(c h e) -> c h e", **cut),
        np.ravel,
    )
    yield from linear_keys(f"{name}.attn.proj", "blocks", "attention", "out", index=index)
