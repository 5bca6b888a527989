"""How long a program's collectives take at least if every link of a TPU slice helps."""

from __future__ import annotations

import numpy as np

from ppflow_jax.cost.collectives import Collective
from ppflow_jax.cost.dry_run import Compiled, Report


def seconds_by_all_links(report: Report, program: Compiled) -> float:
    """As `Report.seconds`' links, but each collective by just the axes that its group spans.

    A group of chips that is spread over several axes of the slice sends along all of them at once
    (J. Austin et al., "How to scale your model", Google DeepMind 2025, part 3: bandwidth times the
    number of axes). `Report.seconds` does not look where the chips of a group are: one axis, or all
    if all chips take part.
    """
    return sum(c.sent / _rate(c, report) for c in program.network)


def _rate(collective: Collective, report: Report) -> float:
    """Bytes/s out of a chip along all axes that the group spans, both ways where it closes."""
    chip, devices = report.target.chip, list(report.mesh.devices.flat)
    sizes = [int(size) for size in report.target.name.split(":")[-1].split("x")]
    torus = not any(size % chip.wraps for size in sizes)
    where = np.array([devices[k].coords for k in collective.group])
    ways = 0
    for size, values in zip(sizes, where.T):
        spanned = len(set(values.tolist()))
        if spanned > 1:
            ways += 2 if torus and spanned == size else 1
    if collective.kind == "collective-permute":  # from one neighbour to the next
        ways = min(ways, 2 if torus else 1)
    return chip.link_rate * max(ways, 1)
