"""A one-stage model (SiT) as the start of a pyramid (PPFlow, arXiv 2506.23543, Sec. 3.3).

Patchify weights of a patch that is a multiple of the source's are its weights, repeated over the
sub-pixels and divided by their number: a coarse token sees the average-pooled latent. Unpatchify
weights are repeated: the output is that of the source, nearest-neighbour upsampled.
"""

from __future__ import annotations

from dataclasses import replace

import einops
import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params
from ppflow_jax.pyramid import Pyramid

LEVEL_SCALE = 0.02  # standard deviation of a fresh level table


def expanded_config(config: ModelConfig, pyramid: Pyramid) -> ModelConfig:
    """The model that `expand` makes; needs no parameters.

    Raises:
      InputError: the source has several stages, adapters or a network without a trunk, or a patch
        is no multiple of its patch.
    """
    if len(config.pyramid) != 1:
        raise InputError(
            f"only a model of one stage can be expanded, this one has {config.pyramid}: leave out "
            "--pyramid, or state its own"
        )
    if not config.has_trunk:
        raise InputError(
            f"only a transformer can be expanded, this is {config.network}: leave out --pyramid"
        )
    if config.adapters:
        raise InputError("a model with adapters is not expanded: merge them first")
    if config.students:
        raise InputError("a model with students is not expanded: expand the one they stand in")
    p, q = config.pyramid.stages[0].patch
    if wrong := [s.patch for s in pyramid.stages if s.patch[0] % p or s.patch[1] % q]:
        raise InputError(
            f"patch {wrong[0][1]}x{wrong[0][0]} of {pyramid} is no multiple of the {q}x{p} patch "
            "of the source: choose patches that are"
        )
    return replace(config, pyramid=pyramid)


def expand(
    config: ModelConfig, params: Params, pyramid: Pyramid, seed: int = 0
) -> tuple[ModelConfig, Params]:
    """Model and parameters for `pyramid`; the trunk is shared, not copied.

    The level table, which the source has not, is N(0, 0.02) from `seed`. New arrays have the
    dtype of what they are made from.

    Raises:
      InputError: see `expanded_config`.
    """
    target = expanded_config(config, pyramid)
    p, q = config.pyramid.stages[0].patch
    out, unpatchify = params["unpatchify"][0], {}
    patchify: Params = {name: {} for name in ("patchify", "head_patchify") if name in params}
    for k, stage in enumerate(pyramid.stages):
        patch = dict(p=p, q=q, i=stage.patch[0] // p, j=stage.patch[1] // q)
        for name, stages in patchify.items():
            into = params[name][0]
            kernel = _divided(into["kernel"], patch["i"] * patch["j"])
            stages[k] = {
                "kernel": einops.repeat(kernel, "(p q c) d -> (p i q j c) d", **patch),
                "bias": into["bias"],
            }
        unpatchify[k] = {
            "kernel": einops.repeat(out["kernel"], "d (p q o) -> d (p i q j o)", **patch),
            "bias": einops.repeat(out["bias"], "(p q o) -> (p i q j o)", **patch),
        }
    expanded = params | patchify | {"unpatchify": unpatchify}
    if target.has_levels:
        table = np.random.default_rng(seed).standard_normal((len(pyramid), config.width))
        dtype = params["label"]["embedding"].dtype
        expanded["level"] = {"embedding": (LEVEL_SCALE * table).astype(dtype)}
    return target, expanded


def _divided(x: np.ndarray, count: int) -> np.ndarray:
    # at least float32: half-precision arithmetic of NumPy would round twice
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    return (wide / wide.dtype.type(count)).astype(x.dtype)
