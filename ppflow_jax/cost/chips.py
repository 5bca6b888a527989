"""Published figures of accelerator chips, for estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the maker states of one device as jax counts them.

    Attributes:
      flops: peak bfloat16 FLOP/s of dense products.
      memory: bytes of HBM.
      memory_rate: bytes/s of HBM.
      link_rate: bytes/s that one link between chips carries in one direction; of a GPU, all that it
        sends to the others of its machine.
      wraps: a slice whose axes are all multiples of this is a torus, others are open; 0: no torus,
        as GPUs.
      devices: devices of a chip.
    """

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    wraps: int
    devices: int = 1

    @property
    def gpu(self) -> bool:
        return not self.wraps

    def sending_rate(self, shape: str, spans: Sequence[int] = ()) -> float:
        """Bytes/s out of a device in a collective on a slice such as 4x4x4; of a GPU `link_rate`.

        A group of chips sends along all axes that it spans at once, both ways round where they
        close (J. Austin et al., "How to scale your model", Google DeepMind 2025, part 3).

        Args:
          spans: places of the group along every axis; empty: the whole slice.
        """
        if self.gpu:
            return self.link_rate
        axes = [int(size) for size in shape.split("x")]
        torus = not any(size % self.wraps for size in axes)
        ways = (2 if torus and n == size else 1 for size, n in zip(axes, spans or axes) if n > 1)
        return self.link_rate * max(sum(ways), 1)


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "System architecture". Link rate:
# "bidirectional ICI bandwidth per chip" (400, 1200, 800, 1200 GB/s) over 2 directions and 4, 6, 4,
# 6 ports. v5e and v6e wrap round along an axis of 16; v5p and TPU7x if their slice is made of whole
# cubes of 4 x 4 x 4. A chip of TPU7x (2307 TFLOP/s, 192 GiB, 7380 GB/s) is two devices.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 50e9, wraps=16),
    "v5p": Chip(459e12, 95e9, 2765e9, 100e9, wraps=4),
    "v6e": Chip(918e12, 32e9, 1638e9, 100e9, wraps=16),
    "tpu7x": Chip(2307e12 / 2, 192e9 / 2, 7380e9 / 2, 100e9 / 2, wraps=4, devices=2),
}

# NVIDIA's data sheets of A100 (80 GB, SXM), H100 (SXM), H200 (SXM) and L4, without sparsity, and
# the Ada white paper for RTX 4090 (bfloat16 with float32 sums). Links: NVLink 3 and 4, 600 and 900
# GB/s both ways together; RTX 4090 and L4 have PCIe 4 x16, 64 GB/s both ways together.
GPUS = {
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, wraps=0),
    "h100": Chip(989.4e12, 80e9, 3350e9, 450e9, wraps=0),
    "h200": Chip(989.4e12, 141e9, 4800e9, 450e9, wraps=0),
    "rtx4090": Chip(165.2e12, 24e9, 1008e9, 32e9, wraps=0),
    "l4": Chip(121e12, 24e9, 300e9, 32e9, wraps=0),
}
