"""What training may minimise beside the flow: terms of the loss, and the phases they hold for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Output, Params
from ppflow_jax.models.stack import Taps

OWN = "terms"  # where the parameters have the leaves of terms, by the term's name

Batch = Mapping[str, Array]
Weights = Mapping[str, float]
Metrics = dict[str, Float[Array, ""]]


def network_leaves(params: Params) -> Params:
    """The parameters without the leaves of terms, which sampling has no use for."""
    return {name: leaf for name, leaf in params.items() if name != OWN}


class View(NamedTuple):
    """What a term sees of the samples of one stage.

    Attributes:
      x1, noise, xt: data, noise and what the network was given, float32 [b, h, w, c].
      t, y: times [b]; labels [b], some of them dropped, or these and values of conditions.
      velocity: of the path from noise to data, dx_t/dt.
      batch: the term's fields.
      frozen: arrays that are not trained, by name.
      stage: its number.
      grid: rows and columns of its tokens.
      error: of a prediction, float32 [b, h, w, c]: its squares are the loss of the flow.
    """

    x1: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    xt: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    y: Cond
    velocity: Float[Array, "b h w c"]
    batch: Batch
    frozen: Mapping[str, Any]
    stage: int
    grid: tuple[int, int]
    error: Callable[[Array], Array] | None = None


@runtime_checkable
class Term(Protocol):
    """A term of the loss: a frozen dataclass of numbers and texts.

    Attributes:
      name: in phases, metrics and the parameters.
      taps: what it needs of the network's inside.
      fields: what it needs of a batch besides pictures and labels.
    """

    @property
    def name(self) -> str: ...

    @property
    def taps(self) -> Taps: ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    def init(self, model: ModelConfig, key: Key[Array, ""]) -> Params:
        """Leaves of its own, trained with the network; often none.

        Raises:
          InputError: the term does not fit the model.
        """
        ...

    def __call__(self, own: Params, out: Output, view: View) -> Float[Array, " b"]:
        """Of every sample."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What a training step minimises.

    Attributes:
      pattern: stage of sample i is `pattern[i % len(pattern)]`.
      frozen: names of what it needs that is not trained, each shaped as the network's parameters.
      forward_mode: whether it takes derivatives of the network by forward mode.
      evaluated: stages of what it evaluates without gradient, for the samples of one pattern.
    """

    @property
    def pattern(self) -> tuple[int, ...]: ...

    @property
    def frozen(self) -> tuple[str, ...]: ...

    @property
    def forward_mode(self) -> bool: ...

    @property
    def evaluated(self) -> tuple[int, ...]: ...

    def check_batch(self, batch_size: int, shards: int) -> None:
        """
        Raises:
          InputError: a batch that cannot be cut into so many equal parts.
        """
        ...

    def init(self, model: ModelConfig, key: Key[Array, ""]) -> Params:
        """Leaves that are trained with the network's and of no use to sampling, by term."""
        ...

    def fields(self, weights: Weights) -> tuple[str, ...]:
        """What it needs of a batch besides `x` and `label`."""
        ...

    def draw(self, key: Key[Array, ""], batch: Batch) -> Any:
        """Everything random in a step: a pytree whose leaves have an axis of samples first."""
        ...

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Any,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """What is minimised, and what is logged.

        Args:
          params: of the network, and of terms in `OWN`.
          frozen: arrays that are not trained, by name.
          batch: `x` and the fields; labels are in the draws.
          weights: of terms; one that is 0 or absent is not computed.
        """
        ...


@runtime_checkable
class Scheduled(Protocol):
    """An objective some of whose draws depend on the step."""

    def at(self, draws: Any, step: Int[Array, ""]) -> Any:
        """The draws of that step, the first being 0."""
        ...


@dataclass(frozen=True)
class Phase:
    """A part of a run with weights of its own.

    Attributes:
      until: the number of steps after which it is over.
      weights: of terms by name.

    Raises:
      InputError: a weight that is negative or not finite.
    """

    until: int
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if wrong := [f"{name} {w}" for name, w in self.weights if not 0 <= w < math.inf]:
            raise InputError(f"weights of terms must be at least 0, got {', '.join(wrong)}")

    @property
    def active(self) -> dict[str, float]:
        """Weights of what is computed."""
        return {name: weight for name, weight in self.weights if weight}


def phased(objective: Objective) -> Mapping[str, float]:
    """Terms that an objective has of its own: their weights where phases do not name them."""
    return getattr(objective, "phased", {})


def parse_phases(
    values: Any,
    steps: int,
    always: Mapping[str, Any],
    names: Sequence[str],
) -> tuple[Phase, ...]:
    """The phases of `config.train.phases`, ((until, {term: weight}), ...); the last has no end.

    Args:
      steps: of the run, for one phase where there are none.
      always: weights of terms that phases need not name.
      names: of terms that phases must name.

    Raises:
      InputError: terms that there are not, or that no phase names; phases that are not in order.
    """
    if not values:
        if names:
            raise InputError(
                f"config.train.phases gives no weight to {', '.join(names)}: set it to "
                f"(({steps}, {{'{names[0]}': 0.5}}),)"
            )
        return (Phase(steps, tuple(always.items())),)
    try:
        pairs = [
            (int(until), {name: float(w) for name, w in ({**always, **weights}).items()})
            for until, weights in values
        ]
    except (TypeError, ValueError) as e:
        raise InputError(
            f"config.train.phases must be ((until_step, {{term: weight}}), ...), got {values}"
        ) from e
    phases = tuple(Phase(until, tuple(weights.items())) for until, weights in pairs)
    ends = [phase.until for phase in phases]
    if ends != sorted(set(ends)) or ends[0] < 1:
        raise InputError(f"config.train.phases must end one after another, got steps {ends}")
    known = {*always, *names}
    if unknown := {k for _, weights in pairs for k in weights} - known:
        raise InputError(
            f"config.train.phases: no term {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(known)) or 'none (see config.flow.terms)'}"
        )
    if unused := [n for n in names if not any(n in phase.active for phase in phases)]:
        raise InputError(f"config.train.phases gives no weight to {', '.join(unused)}")
    return phases


def own_leaves(terms: Sequence[Term], model: ModelConfig, key: Key[Array, ""]) -> dict[str, Params]:
    """Fresh leaves of the terms that have any, by name."""
    made = {term.name: term.init(model, jax.random.fold_in(key, i)) for i, term in enumerate(terms)}
    return {name: leaves for name, leaves in made.items() if leaves}
