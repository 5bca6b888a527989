"""Compares the systems with arrays that their authors' code computed.

    python -m tests.systems_parity FOLDER

FOLDER has NAME/*.npz for every system, as tests/reference/systems (see its README). Arrays that
are absent are not compared, so the same code serves the selection in the repository and a full set.
Exit code 1 if one is over its bound, or if there is nothing to compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from tests.acceptance.comparison import Row, report
from tests.systems import (
    parity_clear,
    parity_conditions,
    parity_ddae,
    parity_dico,
    parity_dimr,
    parity_dydit,
    parity_guided_distillation,
    parity_harmonica,
    parity_haste,
    parity_linfusion,
    parity_mmd,
    parity_moe,
    parity_peft,
    parity_ppcl,
    parity_rae,
    parity_ras,
    parity_repa,
    parity_rettention,
    parity_switch,
)

SYSTEMS: dict[str, Callable[[Reference], Iterator[Row]]] = {
    "clear": parity_clear.rows,
    "conditions": parity_conditions.rows,
    "dico": parity_dico.rows,
    "dimr": parity_dimr.rows,
    "dit_moe": parity_moe.rows,
    "dydit": parity_dydit.rows,
    "linfusion": parity_linfusion.rows,
    "harmonica": parity_harmonica.rows,
    "mmd_elucd_dualparal": parity_mmd.rows,
    "peft": parity_peft.rows,
    "ppcl": parity_ppcl.rows,
    "ras": parity_ras.rows,
    "rettention": parity_rettention.rows,
    "switch_dit": parity_switch.rows,
    "guided_distillation": parity_guided_distillation.rows,
    "rae": parity_rae.rows,
    "repa": parity_repa.rows,
    "haste": parity_haste.rows,
    "ddae": parity_ddae.rows,
}


class Reference:
    """One file: its arrays by name, its settings, and rows with the bounds of its README."""

    def __init__(self, file: Path):
        self.name = file.stem
        self.arrays = dict(np.load(file))
        settings = "config" if "config" in self.arrays else "args"
        self.config = json.loads(str(self.arrays.get(settings, "{}")))
        names = ("float32_deviation", "f64_deviation")
        found = next((self.arrays[name] for name in names if name in self.arrays), "{}")
        self.deviation = json.loads(str(found))
        stored = self.below("float32_deviation") | self.below("deviation64")
        for name, deviation in stored.items():
            if name in self:
                self.deviation[name] = float(deviation), float(np.max(np.abs(self[name])))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose names begin with `prefix/`, by the rest."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}

    def row(self, name: str, ours: object, times: float = 1, what: str = "") -> Iterator[Row]:
        """Ours beside the array of that name, if it is there; whole numbers must be equal.

        The bound is `times` that of the README: 5 times the deviation of the authors' code in
        float32 and 2e-6 of the largest value.
        """
        if name not in self:
            return
        theirs, ours = self[name], np.asarray(ours)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        text = f"{self.name} {name}{what and f' ({what})'}"
        if theirs.dtype.kind in "biu":
            yield Row(text, int(np.sum(ours != theirs)), 0, "differ")
            return
        error = np.max(np.abs(np.float64(ours) - np.float64(theirs)))
        deviation, largest = self.deviation.get(name, (0.0, float(np.max(np.abs(theirs)))))
        yield Row(text, float(error), times * (5 * deviation + 2e-6 * max(1.0, largest)))


def compare(folder: Path) -> Iterator[Row]:
    for name, rows in SYSTEMS.items():
        for file in sorted((folder / name).glob("*.npz")):
            yield from rows(Reference(file))


def main() -> int:
    folder = Path(sys.argv[1])
    with jax.default_matmul_precision("highest"):
        code = report(compare(folder))
    left = sorted({p.parent.name for p in folder.glob("*/*.npz")} - SYSTEMS.keys())
    if left:
        print(f"not compared: {', '.join(left)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
