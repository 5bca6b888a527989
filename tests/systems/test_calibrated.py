"""Static schedules from what was measured, against the public code and brute force."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from ppflow_jax.systems.forecast_calibrated import (
    cheapest,
    cheapest_of_all,
    magcache_costs,
    magnitude_ratios,
    relative_changes,
    teacache_costs,
    under_budget,
    under_threshold,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "systems" / "caches.npz"


@pytest.fixture(scope="module")
def ref():
    return dict(np.load(REFERENCE))


def first(k, *others):
    must = np.zeros(k, bool)
    must[[0, *others]] = True
    return must


@pytest.mark.parametrize("case", ["flux/0", "flux/1"])
def test_teacache_is_that_of_the_public_code(ref, case):
    args = json.loads(str(ref[f"{case}/args"]))
    changes = np.polyval(ref["poly/flux"], ref[f"{case}/tea_rel"])
    np.testing.assert_allclose(changes[1:], ref[f"{case}/tea_rescaled"][1:], rtol=1e-9)
    costs, must = teacache_costs(changes), first(args["K"], args["K"] - 1)
    full = under_threshold(costs, args["tea_thresh"], must)
    np.testing.assert_array_equal(full, ref[f"{case}/tea_calc"])
    last = np.maximum.accumulate(np.where(full, np.arange(len(full)), 0))
    together = costs[last, np.arange(len(full))]
    np.testing.assert_allclose(together[~full], ref[f"{case}/tea_acc"][~full], atol=1e-5)


def test_changes_of_the_modulated_input_are_those_of_the_public_code(ref):
    values = ref["flux/0/tea_mod"]
    expected = ref["flux/0/tea_rel"][: len(values)]
    np.testing.assert_allclose(relative_changes(values), expected, rtol=1e-5)


@pytest.mark.parametrize("case", ["flux/0", "flux/1"])
def test_magcache_is_that_of_the_public_code(ref, case):
    args = json.loads(str(ref[f"{case}/args"]))
    k, ratios = args["K"], ref[f"{case}/mag_ratios"]
    # The file for FLUX computes a step that lies at 11/27 of the way, whatever it costs
    pinned = np.flatnonzero(np.round(np.arange(k) * 27 / (k - 1)) == 11)
    must = first(k, *range(int(args["mag_ret"] * k + 0.5)), *pinned)
    threshold = np.nextafter(args["mag_thresh"], 1)  # it skips at the threshold too
    costs = magcache_costs(ratios)
    full = under_threshold(costs, threshold, must, args["mag_K"])
    np.testing.assert_array_equal(full, ref[f"{case}/mag_calc"])
    last = np.maximum.accumulate(np.where(full, np.arange(k), 0))
    error = costs[last, np.arange(k)]
    full[-1] = True  # the account is already closed there
    np.testing.assert_allclose(error[~full], ref[f"{case}/mag_state"][~full, 1], atol=1e-9)


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("kind", ["tea", "tea_ret", "mag"])
def test_the_calls_of_wan_are_those_of_the_public_code(ref, kind, parity):
    """Conditional and unconditional calls in turn, each with its own account."""
    args = json.loads(str(ref["wan/0/args"]))
    k, calls = args["K"], 2 * np.arange(args["K"]) + parity
    if kind == "mag":
        costs = magcache_costs(np.array(args["mag"])[parity::2])
        must, threshold = calls < int(2 * k * args["mag_ret"]), args["mag_thresh"]
        full = under_threshold(costs, threshold, must | (calls < 2), args["mag_K"])
    else:
        late = kind == "tea"
        signal, of = ("e", "") if late else ("e0", "_ret")
        changes = relative_changes(ref[f"wan/0/{signal}"][parity::2])
        costs = teacache_costs(np.polyval(args[f"tea_co{of}"], changes))
        must = (calls < 2 * (1 if late else args["tea_ret"])) | (late & (calls >= 2 * k - 2))
        full = under_threshold(costs, args[f"tea_thresh{of}"], must)
    np.testing.assert_array_equal(full, ref[f"wan/0/{kind}_calc"][parity::2])


def test_ratios_are_means_over_tokens():
    residuals = np.array([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 10.0], [0.0, 0.5]]])
    np.testing.assert_allclose(magnitude_ratios(residuals), [1, (2 + 0.5) / 2])


@pytest.mark.parametrize("make", [teacache_costs, magcache_costs])
@pytest.mark.parametrize("count", [2, 3, 7, 11, 12])
def test_a_budget_is_met_exactly(make, count):
    draw = np.random.default_rng(count)
    costs = make(np.round(draw.uniform(0.5, 1.5, 12), 1))  # with equal costs
    full = under_budget(costs, first(12, 5), count)
    assert full.sum() == count and full[[0, 5]].all()


def brute(errors, count):
    k, found = len(errors), []
    for more in itertools.combinations(range(1, k), count - 1):
        way, total = (0, *more), 0.0
        for n, i in enumerate(way):
            h = way[n - 1] if n else i
            end = way[n + 1] if n + 1 < count else k
            total += errors[h, i, i + 1 : end].sum()
        found.append((total, way))
    return min(found)


def test_the_cheapest_steps_are_those_of_brute_force():
    draw = np.random.default_rng(0)
    for k in (1, 2, 3, 7):
        errors = draw.exponential(size=(k, k, k))
        found = cheapest(errors)
        assert len(found) == k
        for count, (total, way) in enumerate(found, 1):
            expected, best = brute(errors, count)
            assert way == best and np.isclose(total, expected)


def test_groups_share_a_budget_as_brute_force_does():
    draw = np.random.default_rng(1)
    groups = [draw.exponential(size=(k, k, k)) * size for k, size in ((4, 1), (5, 3), (1, 1))]
    for count in range(3, 11):
        shares = [c for c in itertools.product(range(1, 5), range(1, 6), [1]) if sum(c) == count]
        ways = [[brute(e, n) for e, n in zip(groups, share)] for share in shares]
        best = min(ways, key=lambda found: sum(total for total, _ in found))
        expected = [first + i for first, (_, way) in zip((0, 4, 9), best) for i in way]
        assert np.flatnonzero(cheapest_of_all(groups, count)).tolist() == expected
    for count in (2, 11):
        with pytest.raises(ValueError, match="3 groups of 10 steps"):
            cheapest_of_all(groups, count)
