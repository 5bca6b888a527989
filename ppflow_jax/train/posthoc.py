"""Averages of power functions, whose length can be chosen after training.

Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2,
arXiv 2312.02696), section 3 and appendix C. After t updates an average of exponent g has weights
in proportion to tau^g at tau in (0, t]; its width relative to t, a standard deviation, is
sigma_rel. Two of them, kept from time to time, span those of other widths:

    RUN/posthoc_ema/SIGMA_REL/step_0000100    as converted weights, see `files.store`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.console import say
from ppflow_jax.devices.sharding import fetch
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import remove_tree
from ppflow_jax.files.store import find_checkpoint, read_json, readable, write_checkpoint
from ppflow_jax.flow.terms import network_leaves
from ppflow_jax.models.network import Params
from ppflow_jax.models.trees import leaves, put
from ppflow_jax.train.skip import SKIPPED

POSTHOC = "posthoc_ema"  # in the state, by sigma_rel; in the workdir; in the JSON of a snapshot
WIDEST = 0.28  # the mean of all updates alike has sigma_rel 1 / sqrt(12) = 0.289

Averages = dict[str, Params]


def check_widths(values: Sequence[Any], name: str) -> tuple[float, ...]:
    """sigma_rel of averages as numbers.

    Raises:
      InputError: one that is none, is out of (0, `WIDEST`], or is there twice.
    """
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError) as e:
        raise InputError(f"{name} must be numbers as (0.05, 0.10), got {values}") from e
    if not all(0 < sigma <= WIDEST for sigma in found) or len(set(found)) < len(found):
        raise InputError(
            f"{name} are standard deviations relative to the length of training, all different "
            f"and in (0, {WIDEST}], got {', '.join(map(str, found))}"
        )
    return found


def exponent(sigma_rel: float) -> float:
    """The exponent g of a width: (g + 2)^2 (g + 3) sigma_rel^2 = g + 1, its largest root."""
    a = sigma_rel**-2
    return float(np.max(np.roots([1, 7, 16 - a, 12 - a]).real))


def rate(sigma_rel: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Share of the new parameters in the average after `updates`, these included.

    1 - beta with beta = (1 - 1 / t)^(g + 1), equation 127 for times of whole updates; the first
    is 1, so nothing of the initial parameters stays.
    """
    power = exponent(sigma_rel) + 1
    return -jnp.expm1(power * jnp.log1p(-1 / updates.astype(jnp.float32)))


def begin(params: Params, widths: Sequence[float]) -> Averages:
    """Averages before the first update, of the network alone, by sigma_rel."""
    return {str(sigma): jax.tree.map(jnp.copy, network_leaves(params)) for sigma in widths}


def updated(state: Mapping[str, Any], params: Params) -> dict[str, Averages]:
    """The averages of a state after a step to `params`; nothing where it has none."""
    if POSTHOC not in state:
        return {}
    updates = state["step"] + 1 - (state[SKIPPED]["total"] if SKIPPED in state else 0)

    def one(sigma: str, average: Params) -> Params:
        share = rate(float(sigma), updates)
        return jax.tree.map(lambda a, p: a + share * (p - a), average, network_leaves(params))

    return {POSTHOC: {sigma: one(sigma, average) for sigma, average in state[POSTHOC].items()}}


class Profile(NamedTuple):
    """Weights in proportion to tau^`exponent` at tau in (0, `time`]."""

    exponent: float
    time: float


def _product(a: Profile, b: Profile) -> float:
    """The inner product of two profiles, each of integral 1 (appendix C.2)."""
    total = a.exponent + b.exponent + 1
    logarithm = (
        total * np.log(min(a.time, b.time))
        - (a.exponent + 1) * np.log(a.time)
        - (b.exponent + 1) * np.log(b.time)
    )
    return (a.exponent + 1) * (b.exponent + 1) / total * float(np.exp(logarithm))


def combination(given: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " n"], float]:
    """Weights of the profiles `given` that come nearest to `wanted`, and how far they stay from it.

    Least squares over all tau (appendix C.3); other than there, the weights sum to 1, so that
    parameters which never changed come out as they are. The distance is relative to `wanted`.
    """
    n = len(given)
    system, right = np.ones((n + 1, n + 1)), np.ones(n + 1)
    system[:n, :n] = [[_product(a, b) for b in given] for a in given]
    system[n, n] = 0
    right[:n] = [_product(a, wanted) for a in given]
    weights = np.linalg.lstsq(system, right, rcond=None)[0][:n]
    weights /= weights.sum()
    square = _product(wanted, wanted)
    missed = weights @ system[:n, :n] @ weights - 2 * weights @ right[:n] + square
    return weights, float(np.sqrt(max(missed, 0) / square))


class Snapshot(NamedTuple):
    """One average at one time.

    Attributes:
      path: of the checkpoint.
      updates: that it has seen.
    """

    path: Path
    sigma_rel: float
    updates: int

    @property
    def profile(self) -> Profile:
        return Profile(exponent(self.sigma_rel), self.updates)


def _kept(folder: Path) -> list[Path]:
    """Folders of single averages, also of one that was being written."""
    widths = [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
    return [path for width in widths for path in width.iterdir()]


def snapshots_of(workdir: Path) -> list[Snapshot]:
    """All snapshots of a run.

    Raises:
      InputError: one is damaged.
    """
    found = []
    for folder in sorted(path for path in _kept(workdir / POSTHOC) if path.name[0] != "."):
        path = find_checkpoint(folder)
        values = read_json(path)
        with readable(path):
            facts = values[POSTHOC]
            found.append(Snapshot(path, float(facts["sigma_rel"]), int(facts["updates"])))
    return found


class Snapshots:
    """Writes the averages of a run, whole and at once; all processes call it."""

    def __init__(self, workdir: Path, card: Card, widths: Sequence[float], first: int):
        """
        Args:
          first: step that the run continues from; what was kept later is made again.
        """
        self._folder, self._card, self._widths = workdir / POSTHOC, card, widths
        if not widths or jax.process_index():
            return
        for path in _kept(self._folder):
            number = path.name.removeprefix("step_")
            half = path.name.startswith(".") and path.name.endswith(".partial")
            if half or (number.isdigit() and int(number) > first):
                remove_tree(path)
        say(f"post-hoc EMA of sigma_rel {', '.join(map(str, widths))}: kept in {self._folder}")

    def write(self, step: int, state: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
        """The averages in the state after `step`, with what is not trained.

        Raises:
          InputError: the disk is full.
        """
        skipped = int(state[SKIPPED]["total"]) if SKIPPED in state else 0
        for sigma in map(str, self._widths):
            params: Params = {}
            for tree in (state[POSTHOC][sigma], frozen.get("base", {})):
                for path, leaf in leaves(tree):
                    put(params, path, fetch(leaf))
            if jax.process_index():
                continue
            facts = {"sigma_rel": float(sigma), "updates": step - skipped}
            card = self._card.alone.to_json()
            target = self._folder / sigma / f"step_{step:07d}"
            if not target.exists():
                write_checkpoint(target, {"ema": params}, card | {POSTHOC: facts})
