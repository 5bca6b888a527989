"""Learned caching fitted to a model (HarmoniCa, arXiv 2410.01723): a router, then static masks.

The router is trained on the rollouts of its own steps, for a plan of Euler's method whose memory
begins anew in every stage. What the paper sets by hand, the price of computing a branch, is moved
until the branches above the threshold cost what the budget allows. The loss is divided by it, which
AdamW does not see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.console import progress, table
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files.copies import borrowed
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.place import place
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.systems.harmonica import THRESHOLD, Router, router_of, step_weights
from ppflow_jax.systems.routed import RoutedTables, branch_flops
from ppflow_jax.tune.asked import Asked
from ppflow_jax.tune.calibrate import Trajectories
from ppflow_jax.tune.calibrated_steps import groups
from ppflow_jax.tune.fit import distance
from ppflow_jax.tune.forecasts import euler, evenly
from ppflow_jax.tune.masks import Costs, price_of, static_masks
from ppflow_jax.tune.mixtures import Mixtures

EPOCHS = 150  # rollouts
BATCH = 16  # trajectories of a rollout
RATE = 0.1  # of AdamW; with ten times the paper's, a tenth of the rollouts
GAIN = 0.05  # the price is multiplied by (computed share / asked share)^GAIN after every rollout
RENEWED = 500  # updates after which the weights of the steps are measured again
MOST = 4  # masks of a stage, beside the full one: each is compiled


class Training(NamedTuple):
    """Where training stands.

    Attributes:
      epoch: rollouts that are done.
      price: of a branch of mean cost, in the unit of the weights.
      weights: of the error of every step: lambda, whose mean is 1.
      worth: of every branch, in these weights times the error, when they were measured.
    """

    epoch: int
    router: Router
    price: float
    weights: Float[np.ndarray, " steps"]
    worth: Float[np.ndarray, "steps depth 2"]


def tune_router(model: Model, asked: Asked) -> str:
    """Writes the plan; returns a table of its error beside those of other plans.

    Raises:
      InputError: flags that do not go together, or numbers out of range.
      RunError: trajectories or states that are not finite, or branches that add nothing.
    """
    steps, share = asked.check_router(len(model.config.pyramid))
    cfg = asked.scales(model)
    plan = euler(model, cfg, steps)
    mixtures = Mixtures(model, asked.cfg_channels, plan, RATE)
    costs = Costs(_branch_costs(mixtures), groups(plan), share)
    out = asked.target()
    fit, held_out = asked.trajectories(model, cfg, out)
    file = _file_of(model, asked, out)
    training = trained(mixtures, costs, fit, asked.seed, file)
    logits = np.asarray(training.router.logits)
    computed = static_masks(costs, logits, training.worth, MOST)
    rows = {"plan": (steps, costs.spent(computed), error(mixtures, computed, held_out))}
    for name, other, masks in _rivals(mixtures, costs, cfg):
        spent = float(_branch_costs(other).sum(where=masks) / costs.of.sum())
        rows[name] = len(masks), spent, error(other, masks, held_out)
    errors = {name: row[-1] for name, row in rows.items()}
    made = asked.made(
        model,
        errors,
        budget={"steps": steps, "share": share},
        computed=costs.spent(computed),
        patterns=[len({mask.tobytes() for mask in computed[list(g)]}) for g in costs.groups],
        epochs=EPOCHS,
    )
    tables = RoutedTables(model.config.depth, computed)
    pyramid, flow = model.config.pyramid, model.card.flow
    PlanFile(plan, pyramid, flow, cfg, asked.cfg_channels, made, tables).write(out)
    return _said(rows, out)


def error(
    mixtures: Mixtures, masks: Bool[np.ndarray, "steps depth 2"], given: Trajectories
) -> float:
    """Distance of the end states from the fine ones, as a share of these (root mean squares).

    Raises:
      RunError: states that are not finite.
    """
    ends = mixtures.ends(masks, given)
    if not np.isfinite(ends).all():
        raise RunError("states of a plan are not finite: try --dtype=float32 or a lower --cfg")
    return distance(ends, given)


def trained(
    mixtures: Mixtures, costs: Costs, given: Trajectories, seed: int, file: Path
) -> Training:
    """A router after `EPOCHS` rollouts; a killed call continues from what `file` keeps.

    Raises:
      InputError: a damaged file.
      RunError: branches that add nothing.
    """
    logits = jax.random.normal(jax.random.key(np.uint32(seed)), costs.of.shape)
    steps = np.zeros(len(costs.of), np.float32)
    now = Training(0, router_of(logits, RATE), 0.0, steps, np.zeros(costs.of.shape, np.float32))
    if file.exists():
        now = _read(file, now)
    every = max(1, RENEWED // len(costs.of))
    with progress(EPOCHS, now.epoch, "rollout", "router") as bar:
        while now.epoch < EPOCHS:
            x, y = _batch(given, now.epoch)
            if now.epoch % every == 0:
                _write(file, now)
                now = renewed(mixtures, costs, now, x, y)
            router, _ = _rollout(mixtures, costs, now, x, y)
            above = np.asarray(jax.nn.sigmoid(router.logits)) > THRESHOLD
            price = now.price * (costs.spent(costs.fixed | above) / costs.share) ** GAIN
            now = now._replace(epoch=now.epoch + 1, router=router, price=price)
            bar.update(1)
    _write(file, now)
    return now


def renewed(
    mixtures: Mixtures, costs: Costs, now: Training, x: Float[Array, "n h w c"], y: Int[Array, " n"]
) -> Training:
    """With the weights of the steps and the worths of the branches as the router is now."""
    step = lambda i, x, memory, scores: mixtures.step(i, x, y, memory, scores)
    scores = jax.nn.sigmoid(now.router.logits)
    found, _ = step_weights(step, range(len(costs.of)), mixtures.fixed, x, scores)
    weights = np.array([float(found.get(i, 0)) for i in range(len(costs.of))])
    mean = weights.sum() / len(found)
    if not 0 < mean < np.inf:
        raise RunError(
            "a rollout with mixed branches does not differ from one without, or is not finite: "
            "train the model, or try --dtype=float32"
        )
    weights = np.float32(weights / mean)
    _, worth = _rollout(mixtures, costs, now._replace(weights=weights, price=1.0), x, y)
    price = now.price or price_of(costs, worth) * float(costs.of.mean())
    if not price > 0:
        raise RunError("no branch is worth computing: train the model, or give a larger --share")
    return now._replace(weights=weights, worth=worth, price=price)


def _rollout(
    mixtures: Mixtures, costs: Costs, now: Training, x: Float[Array, "n h w c"], y: Int[Array, " n"]
) -> tuple[Router, Float[np.ndarray, "steps depth 2"]]:
    """The router after a rollout, and the worth of every branch."""
    router, memory, prices = now.router, None, costs.of / costs.of.mean()
    ones, worth = jnp.ones(costs.of.shape[1:]), np.zeros(costs.of.shape, np.float32)
    for i in range(len(costs.of)):
        if i in mixtures.fixed:
            x, memory = mixtures.step(i, x, y, None, ones)
            continue
        weight = float(now.weights[i]) / now.price
        x, found = mixtures.update(router, i, x, y, memory, weight, prices[i])
        router, memory, worth[i] = found.router, found.memory, found.worth
    return router, worth


def _batch(given: Trajectories, epoch: int) -> tuple[Float[Array, "n h w c"], Int[Array, " n"]]:
    """Noises and labels of a rollout: all trajectories in turn."""
    count = min(BATCH, len(given.labels))
    rows = (epoch * count + np.arange(count)) % len(given.labels)
    return jnp.asarray(given.states[0, rows]), jnp.asarray(given.labels[rows])


def _branch_costs(mixtures: Mixtures) -> Float[np.ndarray, "steps depth 2"]:
    """FLOPs of every branch for one image under its guidance."""
    plan, model = mixtures.plan, mixtures.model.config
    pairs = [
        np.float64(branch_flops(model, stage)) * (2 if scale != 1 else 1)
        for stage, scale in zip(plan.stages, plan.scales)
    ]
    return np.repeat(np.stack(pairs)[:, None], model.depth, axis=1)


def _rivals(
    mixtures: Mixtures, costs: Costs, cfg: tuple[float, ...]
) -> Iterator[tuple[str, Mixtures, Bool[np.ndarray, "steps depth 2"]]]:
    """Plans of whole steps with at most the same cost, where there are any, and Euler's of all.

    Name, what walks it, and its masks: Euler's method with fewer steps, and full steps spread
    evenly whose branches the others use again.
    """
    steps, limit = len(costs.of), costs.share * costs.of.sum()
    fewer = [mixtures.on(euler(mixtures.model, cfg, n)) for n in range(len(cfg), steps)]
    cheap = [other for other in fewer if _branch_costs(other).sum() <= limit]
    for other in (*cheap[-1:], mixtures):
        whole = np.ones(_branch_costs(other).shape, bool)
        yield f"euler, {len(whole)} steps", other, whole
    full = [evenly(mixtures.plan, n) for n in range(len(costs.groups), steps)]
    masks = [costs.fixed | chosen[:, None, None] for chosen in full]
    for mask in [mask for mask in masks if costs.spent(mask) <= costs.share][-1:]:
        yield f"{mask.all(axis=(1, 2)).sum()} full steps, reused", mixtures, mask


def _file_of(model: Model, asked: Asked, out: Path) -> Path:
    """Where the training is kept: beside the calibration, under all that decides it."""
    known = {**asdict(asked), "out": "", "calibration": "", "model": asked.made(model, {})}
    known |= dict(epochs=EPOCHS, batch=BATCH, rate=RATE, gain=GAIN, renewed=RENEWED)
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    return place(asked.calibration or out.parent).absolute() / f"router-{name}.npz"


def _write(file: Path, now: Training) -> None:
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(now))}
    with atomic(file) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **leaves)


def _read(file: Path, like: Training) -> Training:
    leaves, tree = jax.tree.flatten(like)
    try:
        with borrowed(file) as local, np.load(local, allow_pickle=False) as arrays:
            found = [arrays[str(i)] for i in range(len(leaves))]
        for a, b in zip(found, leaves):
            if a.shape != np.shape(b) or not np.isfinite(a).all():
                raise ValueError(f"an array of {a.shape}, not {np.shape(b)}")
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as e:
        raise InputError(f"{file} is damaged ({e}): remove it, and it is made again") from e
    now = tree.unflatten(found)
    router = jax.tree.map(jnp.asarray, now.router)
    return now._replace(epoch=int(now.epoch), router=router, price=float(now.price))


def _said(rows: dict[str, tuple[int, float, float]], out: Path) -> str:
    """A row for every plan: steps, the share of the branches that is computed, error."""
    lines = [["", "steps", "computed", "error"]]
    lines += [[name, str(n), f"{spent:.1%}", f"{e:.4f}"] for name, (n, spent, e) in rows.items()]
    others = [e for name, (n, spent, e) in rows.items() if name != "plan" and spent < 1]
    text = f"{table(lines)}\nerrors on held-out noise"
    if others:
        share = rows["plan"][-1] / min(others)
        text += f": {share:.2f} of that of the best plan of whole steps at this cost"
    return f"{text}; the plan is {out}"
