"""The EMA of a chosen length, from the averages that a run kept (see train/posthoc.py)."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.weights import save_weights, stored_weights
from ppflow_jax.console import progress
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.train.posthoc import (
    POSTHOC,
    Profile,
    check_widths,
    combination,
    exponent,
    snapshots_of,
)

FAR = 0.1  # distance of a profile from the one that was asked for, of which a line warns


def make_average(source: str, target: Path, sigma_rel: float) -> None:
    """Run -> checkpoint whose EMA has the width `sigma_rel` at the latest time that was kept.

    Sums are float64, the result float32.

    Raises:
      InputError: a width out of range; no averages were kept, or one is damaged.
    """
    check_widths([sigma_rel], "--posthoc_ema")
    found = snapshots_of(place(source).absolute())
    if not found:
        raise InputError(
            f"no averages in {source}/{POSTHOC}: train with --config.train.posthoc_ema='(0.05, "
            "0.1)', and give the workdir of that run as --source"
        )
    last = max(snapshot.updates for snapshot in found)
    weights, missed = combination(
        [snapshot.profile for snapshot in found], Profile(exponent(sigma_rel), last)
    )
    total = None
    with progress(len(found), 0, "average", "convert") as bar:
        for snapshot, weight in zip(found, weights):
            card = read_card(snapshot.path)
            part = jax.tree.map(
                lambda leaf, w=weight: w * np.float64(leaf),
                stored_weights(snapshot.path, card, "ema"),
            )
            total = part if total is None else jax.tree.map(np.add, total, part)
            bar.update()
    save_weights(target, card, jax.tree.map(np.float32, total))
    print(
        f"EMA of sigma_rel {sigma_rel} after {last} updates, of {len(found)} averages, in "
        f"{target}; its profile is within {missed:.2%} of the one asked for"
    )
    if missed > FAR:
        tracked = sorted({snapshot.sigma_rel for snapshot in found})
        print(
            f"that is far: the run kept sigma_rel {', '.join(map(str, tracked))}; a width between "
            "them, or more averages (config.train.save_every), comes nearer"
        )
