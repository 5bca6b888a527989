"""What a block is made of.

A part is configuration and factory at once, and the owner of its leaves: their names, FLOPs,
shardings and PyTorch names. A `BlockSpec` has the parts of a block; what a model must know of its
blocks is a sum over them. The parts of papers are in `systems/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.layers import Attention, Execution, linear
from ppflow_jax.models.leaves import Aux, Described, Key, Leaves, Matrix, Rule, Site, linear_keys

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig
    from ppflow_jax.models.layers import Block
    from ppflow_jax.models.norms import Norm


@dataclass(frozen=True)
class Part(Described):
    """Base of all parts: frozen dataclasses of numbers, texts and booleans.

    Attributes:
      rules: shardings of its leaves, see `devices.sharding`.
      matrices: those of its leaves that are linear maps between features, for Muon.
      term_names: of `terms`.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    matrices: ClassVar[tuple[Matrix, ...]] = ()
    term_names: ClassVar[tuple[str, ...]] = ()

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: a model that it cannot be a part of, as by its sizes or grids.
        """

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """What is attached to a block, by the names of its leaves."""
        raise NotImplementedError

    def keys(self, layer: int) -> Iterator[Key]:
        """PyTorch names of its leaves in one layer."""
        raise NotImplementedError

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        """Its linear layers that adapters may stand beside."""
        return iter(())

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """The blocks of `model`, which has this part, from those of `source`, which has another.

        A pure function of arrays (JAX traces it).

        Args:
          blocks: of `source`, every leaf with its axis of depth; the leaves of other parts stay.
          key: for leaves that have no origin in them.

        Raises:
          InputError: there is no way from there.
        """
        raise InputError(
            f"{self.kind} cannot start from weights of {source.block}: leave init_from empty"
        )

    def terms(self, aux: Aux) -> dict[str, Float[Array, ""]]:
        """By name what training may add to the loss, with a slash in it what it only measures."""
        return {}


class Mixer(Part):
    """The branch of a block in which tokens see each other.

    Attributes:
      attends: it has the projections of DiT's attention, as `block.attention`, whose PyTorch names
        `convert.keys` knows; what such parts have besides is in modules of their own.
    """

    attends: ClassVar[bool] = True

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """The projections; parts with more add to them."""
        how = {"programs": run.programs, "per_device": run.layout.heads}
        return {"attention": Attention(model.width, model.heads, dtype=run.dtype, rngs=rngs, **how)}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The branch before its gate; tokens are row by row of `block.grid`."""
        raise NotImplementedError

    def flops(self, model: ModelConfig, stage: int, tokens: int) -> int:
        """FLOPs of its matrix products for so many tokens of one image, 2 per multiply-add.

        All of the stage's, or fewer where tokens are merged.
        """
        raise NotImplementedError

    def scores(self, model: ModelConfig, stage: int) -> int:
        """Elements of one head's softmax, for estimates of memory traffic."""
        raise NotImplementedError

    def keys(self, layer: int) -> Iterator[Key]:
        return iter(())

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        d, attention = model.width, ("blocks", "attention")
        heads = (3, model.heads, model.head_width)
        yield Site("blocks/attention/qkv", attention, d, heads, "attention", prefix="qkv_")
        yield Site("blocks/attention/out", (*attention, "out"), d, (d,), "attention")

    @classmethod
    def read(cls, state: Any) -> Mixer | None:
        """The part of a PyTorch state dict, where its names tell it."""
        raise NotImplementedError


@dataclass(frozen=True)
class FullAttention(Mixer):
    """DiT's: every token sees all."""

    kind = "attention"

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return block.attention(x)

    def flops(self, model: ModelConfig, stage: int, tokens: int) -> int:
        """8 N D^2 + 4 N^2 D."""
        return 8 * tokens * model.width**2 + 4 * tokens * tokens * model.width

    def scores(self, model: ModelConfig, stage: int) -> int:
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        return (rows * cols) ** 2

    @classmethod
    def read(cls, state: Any) -> Mixer | None:
        return cls()


class Ffn(Part):
    """The branch of a block in which tokens do not see each other."""

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Aux]:
        """The branch before its gate, and what it gives besides."""
        raise NotImplementedError

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """FLOPs of its matrix products for so many tokens of one image, 2 per multiply-add."""
        raise NotImplementedError

    def hidden(self, model: ModelConfig) -> float:
        """Hidden units that a token passes, for estimates of memory traffic."""
        raise NotImplementedError

    @classmethod
    def read(cls, state: Any, width: int) -> tuple[Ffn, int] | None:
        """The part of a PyTorch state dict and the hidden units of its MLP or of one expert.

        None where it has another. What the names and shapes do not say is the default.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Mlp(Ffn):
    """The MLP of DiT: two linear layers, GELU in its tanh form between them."""

    kind = "mlp"

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        hidden = int(model.width * model.mlp_ratio)
        return {
            "fc1": linear(model.width, hidden, rngs, dtype=run.dtype),
            "fc2": linear(hidden, model.width, rngs, dtype=run.dtype),
        }

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Aux]:
        mlp = lambda x: block.fc2(jax.nn.gelu(block.fc1(x), approximate=True))
        return block.per_token(mlp, x), {}

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """4 r N D^2."""
        return 4 * tokens * model.width * int(model.mlp_ratio * model.width)

    def hidden(self, model: ModelConfig) -> float:
        return model.mlp_ratio * model.width

    def keys(self, layer: int) -> Iterator[Key]:
        for name in ("fc1", "fc2"):
            yield from linear_keys(f"blocks.{layer}.mlp.{name}", "blocks", name, index=(layer,))

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        width, hidden = model.width, int(model.width * model.mlp_ratio)
        yield Site("blocks/fc1", ("blocks", "fc1"), width, (hidden,), "mlp")
        yield Site("blocks/fc2", ("blocks", "fc2"), hidden, (width,), "mlp")

    @classmethod
    def read(cls, state: Any, width: int) -> tuple[Ffn, int] | None:
        name = "blocks.0.mlp.fc1.weight"
        return (cls(), state[name].shape[0]) if name in state else None


class Wrap(Part):
    """h + B(u) - u around a block B, u of the part's choice; leaves in a module named `kind`."""

    def signals(
        self, leaves: Leaves, embed: Callable[[Array], Array], t: Float[Array, " b"], *drawn: Any
    ) -> tuple[Any, Aux]:
        """What `__call__` finds as `block.signal`, by layer, and what training may be given.

        From its leaves, each with an axis of depth, the embedding [b, d] of times, and what an
        objective draws for it.
        """
        raise NotImplementedError

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """u of a block that x enters."""
        raise NotImplementedError

    def outputs(self, block: Block, x: Array, c: Array) -> tuple[Array, tuple[Array, Array], Aux]:
        """See `Block.outputs`."""
        inner = self(block, x)
        y, branches, aux = block.inside(inner, c)
        return y + (x - inner), branches, aux

    def gate(self, block: Block) -> Float[Array, " _"] | None:
        """What the gates of both branches are multiplied by, [b] or [1]; None: nothing."""
        return None

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """See `Ffn.flops`."""
        raise NotImplementedError

    @classmethod
    def read(cls, state: Any) -> Wrap | None:
        """The part of a PyTorch state dict, if it has it."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockSpec:
    """The parts of a block; without a norm its adaLN-Zero is DiT's."""

    ffn: Ffn = Mlp()
    wrap: Wrap | None = None
    mixer: Mixer = FullAttention()
    norm: Norm | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        every = (self.mixer, self.ffn, self.wrap, self.norm)
        return tuple(part for part in every if part is not None)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for part in self.parts for rule in part.rules)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for part in self.parts for matrix in part.matrices)

    def keys(self, layer: int) -> Iterator[Key]:
        for part in self.parts:
            yield from part.keys(layer)

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.term_names)

    def terms(self, aux: Aux) -> dict[str, Float[Array, ""]]:
        return {name: value for part in self.parts for name, value in part.terms(aux).items()}

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """Leaves of blocks of this kind from those of `source`, see `Part.start`."""
        for before, now in ((source.block.wrap, self.wrap), (source.block.norm, self.norm)):
            if before not in (None, now):
                raise InputError(f"weights with {before} do not start a model without it")
        for part in self.parts:
            if part not in source.block.parts:
                blocks = part.start(model, source, blocks, key)
        return blocks

    def to_json(self) -> dict[str, str]:
        """The parts that are not DiT's."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: str(p) for name, p in parts.items() if p != getattr(DIT, name)}

    def __str__(self) -> str:
        return ", ".join(str(p) for p in self.parts if p != FullAttention())


DIT = BlockSpec()
