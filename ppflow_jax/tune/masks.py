"""From the scores of a router to few static masks within a budget (NumPy)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from ppflow_jax.errors import InputError


@dataclass(frozen=True)
class Costs:
    """What branches cost, and how much of it a plan may spend.

    Attributes:
      of: of every step, block and branch.
      groups: steps that share a memory; the first of each computes everything.
      share: of the sum of all, at most.

    Raises:
      InputError: a share that leaves nothing to choose.
    """

    of: Float[np.ndarray, "steps depth 2"]
    groups: Sequence[range]
    share: float

    def __post_init__(self):
        least = self.spent(self.fixed)
        if not least < self.share < 1:
            raise InputError(
                f"--share={self.share:g}: the first step of every stage is computed in full, "
                f"{least:.3g} of all branches here; give more than that, and less than 1"
            )

    @property
    def fixed(self) -> Bool[np.ndarray, "steps depth 2"]:
        """Branches that are always computed."""
        masks = np.zeros(self.of.shape, bool)
        masks[[group[0] for group in self.groups]] = True
        return masks

    @property
    def free(self) -> list[int]:
        """Steps whose branches are chosen."""
        return [i for group in self.groups for i in group[1:]]

    @property
    def budget(self) -> float:
        """Of the free steps."""
        return (self.share - self.spent(self.fixed)) * float(self.of.sum()) * (1 + 1e-9)

    def spent(self, masks: Bool[np.ndarray, "steps depth 2"]) -> float:
        """Share of the cost of all branches."""
        return float(np.sum(self.of, where=masks) / np.sum(self.of))


def price_of(costs: Costs, worth: Float[np.ndarray, "steps depth 2"]) -> float:
    """The worth of a unit of cost at which the budget is spent on branches that are worth more.

    Where fewer branches than the budget pays for are worth anything, the least of their worths.
    Not above 0 if none is.
    """
    each, rates = costs.of[costs.free].ravel(), (worth / costs.of)[costs.free].ravel()
    order = np.argsort(-rates, kind="stable")
    last = int(np.searchsorted(np.cumsum(each[order]), costs.budget))
    paid = rates[order][: last + 1]
    return float(min(paid[paid > 0], default=0.0))


def static_masks(
    costs: Costs,
    logits: Float[np.ndarray, "steps depth 2"],
    worth: Float[np.ndarray, "steps depth 2"],
    most: int,
) -> Bool[np.ndarray, "steps depth 2"]:
    """The branches of the highest scores: one after another, if the budget still pays for it.

    In every group at most `most` masks are different, beside that of its first step. Where scores
    ask for more, steps are put together: the two nearest sets of steps of one group, by Ward's
    distance of their mean logits, get one mask, until they are few enough.

    Args:
      worth: which of two equal logits comes first; most of those that are learned to the end are
        equal.
    """
    sets = [[[i] for i in group[1:]] for group in costs.groups]
    while True:
        masks = _within_budget(costs, [s for group in sets for s in group], logits, worth)
        crowded = [
            number
            for number, group in enumerate(costs.groups)
            if len({masks[i].tobytes() for i in group[1:]}) > most
        ]
        if not crowded:
            return masks
        _, number, a, b = min(
            (_apart(logits, group[a], group[b]), number, a, b)
            for number in crowded
            for group in (sets[number],)
            for a, b in itertools.combinations(range(len(group)), 2)
        )
        sets[number][a] += sets[number].pop(b)


def _apart(logits: Float[np.ndarray, "steps depth 2"], a: list[int], b: list[int]) -> float:
    """What putting two sets together adds to the squared distances from their means."""
    between = logits[a].mean(0) - logits[b].mean(0)
    return float(len(a) * len(b) / (len(a) + len(b)) * np.sum(np.square(between)))


def _within_budget(
    costs: Costs,
    sets: list[list[int]],
    logits: Float[np.ndarray, "steps depth 2"],
    worth: Float[np.ndarray, "steps depth 2"],
) -> Bool[np.ndarray, "steps depth 2"]:
    """The same for given sets of steps."""
    scores, values, prices = (
        np.stack(found)
        for found in zip(*((logits[s].mean(0), worth[s].mean(0), costs.of[s].sum(0)) for s in sets))
    )
    left, chosen = costs.budget, np.zeros(scores.size, bool)
    for i in np.lexsort((-values.ravel() / prices.ravel(), -scores.ravel())):
        chosen[i] = prices.flat[i] <= left
        left -= prices.flat[i] * chosen[i]
    masks = costs.fixed
    for one, mask in zip(sets, chosen.reshape(scores.shape)):
        masks[one] = mask
    return masks
