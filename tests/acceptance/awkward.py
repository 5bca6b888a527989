"""Awkward image trees, weight files and flag values, each with its expected outcome.

    python -m tests.acceptance.awkward FOLDER [trees] [weights] [flags]

Makes every input in FOLDER (new or empty), gives it to a command, and compares exit code, message
and what was written with what is expected. Ends with the number of cases, tracebacks and wrong
outcomes; exit code 1 if there are any.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_platforms", "cpu")
flags.FLAGS.mark_as_parsed()

from tests.acceptance import awkward_flags, awkward_trees, awkward_weights  # noqa: E402

SETS = {
    "trees": awkward_trees.cases,
    "weights": awkward_weights.cases,
    "flags": awkward_flags.cases,
}


def main(folder: Path, names: list[str]) -> int:
    total, wrong, tracebacks = 0, 0, 0
    for name in names:
        root = folder / name
        root.mkdir(parents=True)
        cases = SETS[name](root)
        for case in tqdm(cases, desc=name, unit="case"):
            if problem := case.problem():
                wrong += 1
                tracebacks += problem.startswith("traceback")
                tqdm.write(f"{name}: {case.name}: {problem}")
        total += len(cases)
        print(f"{name}: {len(cases)} cases")
    print(f"{total} cases, {tracebacks} tracebacks, {wrong} wrong outcomes")
    return int(wrong > 0)


if __name__ == "__main__":
    chosen = sys.argv[2:] or list(SETS)
    sys.exit(main(Path(sys.argv[1]), chosen))
