"""What local and linear attention cost beside full attention, by size of the picture.

    python -m benchmarks.mixers [--width=384]

prints a row for every number of tokens and mixer: time of a forward pass over two blocks and their
matrix products, both over those of full attention. Time is processor time, the least of five calls
in turn, so that other programs on the machine matter little.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.registry import take_block

MIXERS = ("attention", "clear:radius=8", "clear:radius=8,pool=4", "clear:radius=16", "linfusion")
PIXELS = (256, 512, 1024)  # of pictures whose latents have an eighth of the side
CALLS = 5


def main(width: int = 384) -> None:
    print(f"width {width}, 2 blocks, one picture, {jax.devices()[0].device_kind}")
    print("| pixels | tokens | mixer | time | FLOPs |\n|---|---|---|---|---|")
    for pixels in PIXELS:
        calls, flops = [], []
        for text in MIXERS:
            model = ModelConfig(
                *(SIT, pixels // 8, 4, width, 2, max(1, width // 64), 10),
                block=take_block({"mixer": text}),
            )
            calls.append(_call(model))
            flops.append(forward_flops(model, 0))
        seconds = np.min([[_seconds(call) for call in calls] for _ in range(CALLS)], axis=0)
        tokens = (pixels // 16) ** 2
        for text, s, f in zip(MIXERS, seconds / seconds[0], np.array(flops) / flops[0]):
            print(f"| {pixels} | {tokens} | {text} | {s:.2f} | {f:.2f} |", flush=True)


def _call(model: ModelConfig):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.float32(0.05 * rng.standard_normal(s.shape)), abstract_params(model)
    )
    apply = jax.jit(make_apply(model), static_argnums=4)
    given = params, jnp.zeros((1, *model.shape)), jnp.full(1, 0.5), jnp.zeros(1, jnp.int32), 0
    apply(*given).block_until_ready()
    return lambda: apply(*given).block_until_ready()


def _seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main(*(int(a.removeprefix("--width=")) for a in sys.argv[1:]))
