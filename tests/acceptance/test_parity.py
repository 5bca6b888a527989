"""The compact selection of reference arrays, through the parity command's own comparisons."""

from pathlib import Path

import jax
import pytest

from tests.acceptance import parity

REFERENCE = Path(__file__).parents[1] / "reference"
GROUPS = parity.groups(REFERENCE)


def test_nothing_of_the_selection_is_left_out():
    assert len(GROUPS) == 26


@pytest.mark.parametrize("group", GROUPS)
def test_within_bounds(group):
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
