"""Architecture of a model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ppflow_jax.errors import InputError
from ppflow_jax.models import students
from ppflow_jax.models.adapters import NONE, Adapter, beside, parse, text
from ppflow_jax.models.backbone import Backbone
from ppflow_jax.models.conditions import Condition, supplied
from ppflow_jax.models.leaves import Matrix, Rule
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.models.students import Student
from ppflow_jax.pyramid import Pyramid

# DiT, arXiv 2212.09748, Table 1.
SIZES = {
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, as stored inside every checkpoint.

    Attributes:
      pyramid: patch size over time.
      latent_size: side of the square latent, in latent pixels.
      channels: channels of the latent.
      width, depth, heads: trunk.
      num_classes: classes without the null class, whose label is `num_classes`.
      mlp_ratio: hidden width of the MLP over `width`.
      learn_sigma: the final projection also has the unused variance channels of DiT; the public
        PyTorch weights have them.
      level_embedding: several stages are told apart by a learned embedding (PPFlow, Sec. 3.2).
      block: what the blocks are made of.
      conditions: what it is told besides time and label.
      adapters: what stands beside the kernels, see `models.adapters`.
      network: what is in the place of `models.network.PPFlow`; None: that.
      students: what stands in the place of blocks in a stage, see `models.students`.

    Raises:
      InputError: a patch does not divide the latent, heads do not divide the width, a part
        of the blocks does not fit, two conditions have one name or one does not fit the model,
        adapters are on no kernel, students are of no blocks, or the network cannot be of this
        model.
    """

    pyramid: Pyramid
    latent_size: int
    channels: int
    width: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    level_embedding: bool = True
    block: BlockSpec = DIT
    conditions: tuple[Condition, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    network: Backbone | None = None
    students: tuple[Student, ...] = ()

    def __post_init__(self):
        sizes = (self.latent_size, self.channels, self.width, self.depth, self.heads)
        if min(*sizes, self.num_classes) < 1:
            raise InputError(f"model sizes must all be at least 1, got {self}")
        for stage in range(len(self.pyramid)):
            self.pyramid.grid(stage, self.latent_size)
        if self.width % self.heads or self.width % 4:
            raise InputError(
                f"width {self.width} must be divisible by heads ({self.heads}) and by 4 "
                "(sin-cos positions)"
            )
        for part in self.block.parts:
            part.check(self)
        names = [condition.name for condition in self.conditions]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise InputError(f"two conditions are called {twice[0]}: give each its own name")
        for condition in self.conditions:
            condition.check(self)
        if self.network is not None:
            self.network.check(self)
        beside(self)
        students.check(self)

    @property
    def has_levels(self) -> bool:
        """Whether there is a table of level embeddings: never with one stage."""
        return self.level_embedding and len(self.pyramid) > 1

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def asked(self) -> tuple[Condition, ...]:
        """Conditions whose values must be given; the others the sampler or the network knows."""
        known = supplied(self.conditions)
        return tuple(c for c in self.conditions if c.enters != "blocks" and c.name not in known)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent shape (h, w, c)."""
        return (self.latent_size, self.latent_size, self.channels)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Shardings of the leaves of its parts, see `devices.sharding`."""
        own = () if self.network is None else self.network.rules
        return self.block.rules + own

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Of the leaves of its parts, for Muon."""
        own = () if self.network is None else self.network.matrices
        return self.block.matrices + own

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Patterns of leaves that weight decay leaves alone."""
        fixed = () if self.network is None else self.network.fixed
        return fixed if self.block.norm is None else (*fixed, *self.block.norm.undecayed)

    @property
    def stacks(self) -> tuple[ModelConfig, ...]:
        """Its stacks of blocks, as models of DiT; `width`, `depth` and `heads` are the trunk's."""
        return (self,) if self.network is None else self.network.stacks(self)

    @property
    def has_trunk(self) -> bool:
        """Whether its blocks are one stack, `params["blocks"]`, which others may reach into."""
        return self.network is None or self.network.trunk

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def blocks_at(self, stage: int) -> int:
        """How many blocks the tokens of a stage pass."""
        return len(students.steps(self, stage))

    def to_json(self) -> dict[str, Any]:
        """By field; conditions, adapters, network, students and parts unlike DiT's, as text."""
        special = ("block", "conditions", "adapters", "network", "students")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in special}
        texts: dict[str, Any] = {"pyramid": str(self.pyramid)} | self.block.to_json()
        if self.conditions:
            texts["conditions"] = list(map(str, self.conditions))
        if self.adapters:
            texts["adapters"] = text(self.adapters)
        if self.network is not None:
            texts["network"] = str(self.network)
        if self.students:
            texts["students"] = students.text(self.students)
        return values | texts

    @classmethod
    def from_json(
        cls,
        values: dict[str, Any],
        block: BlockSpec = DIT,
        conditions: tuple[Condition, ...] = (),
        network: Backbone | None = None,
    ) -> ModelConfig:
        """The model of `to_json`, whose parts, conditions and network have been made already.

        Raises:
          InputError: keys that there are not.
        """
        known = {f.name for f in fields(cls)} - {"block", "conditions", "network"}
        if unknown := set(values) - known:
            raise InputError(f"model config has unknown keys {sorted(unknown)}: update ppflow_jax")
        pyramid = Pyramid.parse(values["pyramid"])
        made: dict[str, Any] = {"pyramid": pyramid, "block": block, "conditions": conditions}
        made |= {"network": network, "students": students.parse(values.get("students", NONE))}
        return cls(**(values | made | {"adapters": parse(values.get("adapters", NONE))}))
