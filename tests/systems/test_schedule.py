import numpy as np
import pytest

from ppflow_jax.systems.forecast_schedule import full_steps, weight_table
from tests.acceptance.forecast_parity import by_step


def taylor(steps, interval, warmup=2):
    return full_steps("taylor", steps, interval, warmup, 0.3)


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 6])
def test_taylor_full_steps_are_the_published_ones(steps, interval):
    expected = {0, *range(1, steps, interval)}
    assert set(np.flatnonzero(taylor(steps, interval))) == expected


def test_fora_ends_with_a_full_step():
    full = full_steps("fora", 20, 6, 2, 0.3)
    assert np.flatnonzero(full).tolist() == [0, 1, 7, 13, 19]


@pytest.mark.parametrize(("steps", "interval"), [(50, 5), (50, 2), (20, 4), (3, 2), (7, 7)])
def test_deepcache_is_dense_around_its_centre(steps, interval):
    chosen = np.flatnonzero(full_steps("deepcache", steps, interval, 2, 0.3))
    assert len(chosen) == -(-steps // interval) and chosen[0] == 0
    if steps == 50 and interval == 5:
        gaps = np.diff(chosen)
        near = np.argmin(np.abs(chosen - 15))
        assert gaps[near - 1 : near + 1].max() < gaps[0] and gaps[near] < gaps[-1]


@pytest.mark.parametrize("basis", ["taylor", "newton", "adams"])
@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_rows_sum_to_one_and_start_from_what_was_seen(basis, order):
    full = taylor(30, 4)
    table = weight_table(basis, order, full, 2)
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-12)
    weights = by_step(table, full)
    assert not weights[:, ~full].any() and not np.triu(weights, 1).any()
    if basis == "taylor":
        np.testing.assert_array_equal(weights[full], np.eye(30)[full])  # full steps are themselves


@pytest.mark.parametrize("basis", ["taylor", "newton"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_what_is_linear_is_forecast_exactly(basis, order):
    full, i = taylor(30, 4), np.arange(30.0)
    forecast = by_step(weight_table(basis, order, full, 2), full) @ (3 * i - 7)
    np.testing.assert_allclose(forecast, 3 * i - 7, atol=1e-10)


def test_a_quadratic_shows_the_damping_of_taylor_and_newton_does_not_miss_it():
    full, i, gap = taylor(40, 4), np.arange(40.0), 4
    late, since = np.arange(40) > 13, (np.arange(40) - 1) % gap
    newton = by_step(weight_table("newton", 2, full, 2), full) @ i**2
    np.testing.assert_allclose(newton[late], i[late] ** 2, atol=1e-9)
    damped = by_step(weight_table("taylor", 2, full, 2), full) @ i**2
    np.testing.assert_allclose(damped[late], (i**2 - gap * since)[late], atol=1e-9)
    newton = np.abs(weight_table("newton", 4, full, 2)).sum(axis=1).max()
    assert newton > 3 * np.abs(weight_table("taylor", 4, full, 2)).sum(axis=1).max()


def test_orders_grow_by_one_with_every_full_step():
    full = taylor(12, 3)
    used = np.count_nonzero(by_step(weight_table("taylor", 4, full, 2), full), axis=1)
    assert used.tolist() == [1, 1, 2, 2, 1, 3, 3, 1, 4, 4, 1, 5]


def test_adams_weights_are_adams_bashforth():
    for order, last in ((1, [3 / 2, -1 / 2]), (2, [23 / 12, -16 / 12, 5 / 12])):
        weights = by_step(weight_table("adams", order, np.ones(6, bool), 1), np.ones(6, bool))
        np.testing.assert_allclose(weights[-1][::-1][: order + 1], last, atol=1e-12)


def test_hermite_stands_for_powers_and_full_steps_are_themselves():
    """HiCache at s = 0.5: H_1 = 2 y, H_2 = 4 y^2 - 2 at y = s x."""
    full = np.array([True, True, True, False, False])
    taylor, hermite = (weight_table(basis, 2, full, 2) for basis in ("taylor", "hermite"))
    np.testing.assert_array_equal(hermite[:3], taylor[:3])
    value, first, second = np.eye(3)[2], np.array([0, -1.0, 1.0]), None
    for row, x in ((3, 1), (4, 2)):
        powers = 0.5 * x, 0.25 * (x**2 - 2)
        second = (taylor[row] - value - x * first) * 2 / x**2
        np.testing.assert_allclose(
            hermite[row], value + powers[0] * first + powers[1] / 2 * second, atol=1e-12
        )
