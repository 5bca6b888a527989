"""What stands before and behind the branches of a block, where it is not DiT's adaLN-Zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Array, Float

from ppflow_jax.models.parts import Part

if TYPE_CHECKING:
    from ppflow_jax.models.layers import Block


class Norm(Part):
    """How a block normalises what enters its branches, and what it takes of the condition.

    DiT's, which is in `models.layers`, makes scale, shift and gate of SiLU(c), the sum of the
    embeddings of time, label and level. Its leaves are in a module of the name `kind`.

    Attributes:
      undecayed: patterns of paths of those of its leaves that weight decay leaves alone.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()

    def tokens(self, h: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """What enters the first block, of tokens and c, which the blocks do not see again."""
        raise NotImplementedError

    def vector(self, t: Float[Array, " b"], width: int) -> Float[Array, "b d"]:
        """What every block gets as `c`: a function of time, float32."""
        raise NotImplementedError

    def modulation(self, block: Block, c: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """See `models.layers.Block.modulation`."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        """See `models.layers.Block.modulated`; float32."""
        raise NotImplementedError

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Norm | None:
        """The part of a PyTorch state dict, if it has it."""
        raise NotImplementedError


def entering(
    norm: Norm | None,
    h: Float[Array, "b n d"],
    c: Float[Array, "b d"],
    vector: Float[Array, "b d"],
    t: Float[Array, " b"],
) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Tokens that enter the blocks, and what every block gets: c = SiLU(vector), or the norm's."""
    if norm is None:
        return h, c
    return norm.tokens(h, vector), norm.vector(t, c.shape[-1])
