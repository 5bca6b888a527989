"""One block of every stage compiled for TPU, with attention by XLA and by the kernel. Needs libtpu.

    python -m benchmarks.tpu_attention

Nothing is run. The bytes are those that the compiler counts between HBM and the core for a network
of depth 1 in bfloat16: forward, and forward with gradients. Before, the kernel alone is compiled
with its gradient for every chip, width of head and token count up to its limit.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags

from ppflow_jax.cost.targets import Target
from ppflow_jax.models.attention import pallas_attention
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW3

_TARGETS = flags.DEFINE_list(
    "targets",
    ["tpu:v5e:2x2", "tpu:v5p:2x2x1", "tpu:v6e:2x2"],
    "For one device of each.",
)
_SIZES = flags.DEFINE_list("sizes", ["B", "XL"], "Models; S, B and L have heads of 64, XL of 72.")
_LATENTS = flags.DEFINE_list("latents", ["32", "64"], "Sides of the latent.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images.")


def main(_) -> None:
    for name, width in itertools.product(_TARGETS.value, (64, 72)):
        counts = [n for n in (64, 128, 256, 512, 1024) if _kernel(Target.parse(name), n, width)]
        print(f"{name}, heads of {width}: the kernel compiles for {counts} tokens", flush=True)
    print("| chip | model | latent | tokens | forward MB: XLA, kernel | training MB: XLA, kernel |")
    print("|---|---|---|---|---|---|")
    for name, size, side in itertools.product(_TARGETS.value, _SIZES.value, _LATENTS.value):
        target = Target.parse(name)
        model = ModelConfig(PPFLOW3, int(side), 4, **(SIZES[size] | {"depth": 1}), num_classes=1000)
        for stage in range(len(PPFLOW3)):
            rows, cols = PPFLOW3.grid(stage, int(side))
            counts = [_bytes(target, model, stage, kind) for kind in ("xla", "pallas")]
            cells = [", ".join(f"{b / 1e6:.0f}" for b in pair) for pair in zip(*counts)]
            row = (name.split(":")[1], size, side, rows * cols, *cells)
            print("|", " | ".join(map(str, row)), "|", flush=True)


def _kernel(target: Target, tokens: int, width: int) -> bool:
    """Whether both passes of the kernel are in what is compiled."""
    place = jax.sharding.SingleDeviceSharding(target.devices[0])
    q = jax.ShapeDtypeStruct((1, tokens, 16, width), jnp.bfloat16, sharding=place)

    def loss(q, k, v):
        return jnp.sum(jnp.square(pallas_attention(q, k, v).astype(jnp.float32)))

    work = jax.value_and_grad(loss, (0, 1, 2))
    return jax.jit(work).lower(q, q, q).compile().as_text().count("tpu_custom_call") >= 2


def _bytes(target: Target, model: ModelConfig, stage: int, attention: str) -> tuple[float, float]:
    """Of a forward pass, and of one with the gradients of all parameters."""
    apply = make_apply(model, dtype=jnp.bfloat16, attention=attention)

    def loss(params, x, t, y):
        return jnp.mean(jnp.square(apply(params, x, t, y, stage)))

    n, place = _BATCH.value, jax.sharding.SingleDeviceSharding(target.devices[0])
    array = partial(jax.ShapeDtypeStruct, sharding=place)
    params = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), abstract_params(model))
    inputs = (array((n, *model.shape), jnp.float32), array((n,), jnp.float32))
    counts = []
    for work in (loss, jax.grad(loss)):
        compiled = jax.jit(work).lower(params, *inputs, array((n,), jnp.int32)).compile()
        if ("tpu_custom_call" in compiled.as_text()) != (attention == "pallas"):
            raise SystemExit(f"attention {attention} is not what was compiled")
        counts.append(compiled.cost_analysis()["bytes accessed"])
    return tuple(counts)


if __name__ == "__main__":
    app.run(main)
