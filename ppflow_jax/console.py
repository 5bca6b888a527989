"""What a person sees while a command works."""

from __future__ import annotations

import sys

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
