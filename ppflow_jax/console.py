"""What a person sees while a command works."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import jax
from tqdm import tqdm


def progress(total: int, done: int, unit: str, what: str) -> tqdm:
    """Progress bar with rate and ETA on stderr of process 0; sparse when stderr is a file."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=what,
        dynamic_ncols=True,
        disable=jax.process_index() != 0,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )


def say(line: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of text in columns two spaces apart.

    Args:
      rows: equally many cells each; a head is the first of them.
      left: columns that begin at the left, as names do; the others end at the right, as numbers do.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
