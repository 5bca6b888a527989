"""Off is off, bitwise; all cases: `python -m tests.acceptance.off_parity`."""

import pytest

from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import plan
from ppflow_jax.pyramid import PPFLOW2, SIT
from tests.acceptance import off_parity


@pytest.mark.parametrize("pyramid", off_parity.PYRAMIDS)
@pytest.mark.parametrize("solver", off_parity.SOLVERS)
def test_off_is_the_plain_plan(pyramid, solver):
    cases = list(off_parity.same_plans(pyramid, solver))
    assert len(cases) == 11
    for case in cases:
        assert case.segments == plan(case.config, pyramid, Flow()), case.name


@pytest.mark.parametrize(
    ("pyramid", "solver", "devices"),
    [(SIT, "heun", 1), pytest.param(PPFLOW2, "euler", 8, marks=pytest.mark.long)],
)
def test_engines_with_every_step_full_are_the_plain_sampler(pyramid, solver, devices):
    comparison = off_parity.Comparison(pyramid, devices)
    for case in off_parity.engines(pyramid, solver):
        assert not case.plain and comparison.differing(case) == 0, case.name
