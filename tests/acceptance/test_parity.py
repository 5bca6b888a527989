"""The compact selection of reference arrays, through the parity command's own comparisons."""

from pathlib import Path

import jax
import pytest

from tests.acceptance import parity

REFERENCE = Path(__file__).parents[1] / "reference"
GROUPS = parity.groups(REFERENCE)
# What repeats a kind that is compared all the same, and takes long to compile; the command
# compares it too.
_SCORES = ("score_None", "score_velocity", "noise_None", "noise_likelihood")
REPEATED = {
    "ppflow_l2/ode": (
        *("heun2_n51_cfg_traj", "heun2_n250_cfg_final", "exact_nocfg"),
        *("midpoint_n9_cfg_final", "heun3_n9_cfg_final"),  # by their tables: test_solvers.py
    ),
    "ppflow_l3/ode": ("exact_cfg",),
    "sit/ode": ("exact_cfg",),
    "ppflow_l2/likelihood": ("euler_n5_logp",),
    "sit/train": tuple(f"loss_{path}_{s}" for path in ("GVP", "VP") for s in _SCORES),
}
# Kinds that are compared with another number of levels too
_LONG = ("sit/ode", "ppflow_l2/sde", "ppflow_l3/ode", "ppflow_l3/likelihood", "ppflow_l3/train")


def test_nothing_of_the_selection_is_left_out():
    assert len(GROUPS) == 26


@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=[pytest.mark.long] * (g in _LONG)) for g in GROUPS]
)
def test_within_bounds(group, monkeypatch):
    left_out = REPEATED.get(group, ())

    def fewer(file):
        arrays = load(file)
        assert arrays.keys() >= set(left_out)
        return {name: array for name, array in arrays.items() if name not in left_out}

    load = parity.load
    monkeypatch.setattr(parity, "load", fewer)
    with jax.default_matmul_precision("highest"):
        rows = list(GROUPS[group]())
    over = [f"{r.name}: {r.error:.2e} > {r.bound:.1e}" for r in rows if not r.ok]
    assert rows and not over, over


def test_a_difference_is_seen():
    assert not parity.Row("", 1.1, 1.0).ok
    assert not parity.Row("", float("nan"), 1.0).ok


def test_the_command_wants_a_folder(capsys):
    assert parity.main(["parity"]) == 2
    assert "usage" in capsys.readouterr().out
