"""Published figures of accelerator chips, for estimates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the maker states.

    Attributes:
      flops: peak bfloat16 FLOP/s.
      memory: bytes of HBM.
      memory_rate: bytes/s of HBM.
      link_rate: bytes/s that one inter-chip link carries in one direction.
      wraps: a slice whose axes are all multiples of this is a torus, others are open.
    """

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    wraps: int


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, "System architecture". Link rate: "bidirectional
# ICI bandwidth per chip" (400, 1200, 800 GB/s) over 2 directions and 4, 6, 4 ports. v5e and v6e
# wrap round along an axis of 16; v5p if its slice is made of whole cubes of 4 x 4 x 4.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 50e9, wraps=16),
    "v5p": Chip(459e12, 95e9, 2765e9, 100e9, wraps=4),
    "v6e": Chip(918e12, 32e9, 1638e9, 100e9, wraps=16),
}
