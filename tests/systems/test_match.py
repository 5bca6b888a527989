import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.systems import token_groups, tome
from tests.acceptance import merge_parity
from tests.systems.checks import within

REFERENCE = Path(__file__).parents[1] / "reference" / "accelerate"
GRID = (16, 8)
TABLE = token_groups.windows(GRID)


@pytest.fixture(scope="module")
def ref():
    return dict(np.load(REFERENCE / "sdtm.npz"))


def test_scores_decisions_tokens_and_counters_are_those_of_the_public_code(ref):
    rows = list(merge_parity.single_calls(ref))
    assert len(rows) == 37
    within(rows)


def test_tome_is_that_of_the_public_code():
    within(merge_parity.tome_calls(dict(np.load(REFERENCE / "tome.npz"))))


def tokens(seed=0, dim=6):
    """Two rows of tokens on the grid; few bits, so that sums and means of four are exact."""
    x = np.random.default_rng(seed).integers(-8, 8, size=(2, GRID[0] * GRID[1], dim))
    return jnp.float32(x / 4)


def counters():
    return jnp.int32(np.random.default_rng(1).integers(0, 9, size=(2, GRID[0] * GRID[1])))


def nearest(x, counter, count):
    x = token_groups.in_windows(x, GRID).reshape(x.shape)
    return token_groups.merge_nearest(x, token_groups.oldest(counter, GRID), TABLE, count)


@jax.jit
def ways(x):
    """Groups of every kind."""
    scores = token_groups.window_scores(x, counters(), GRID, 0.05)
    return {
        "windows": token_groups.merge_windows(scores, GRID, 16),
        "all windows": token_groups.merge_windows(scores, GRID, len(TABLE)),
        "tokens": nearest(x, counters(), 48),
        "tome": tome.match(x, jnp.zeros(len(TABLE), jnp.int32), GRID, 999),
    }


def test_windows_of_a_grid_that_is_not_square():
    assert TABLE.shape == (32, 4)
    assert TABLE[0].tolist() == [0, 1, 8, 9] and TABLE[5].tolist() == [18, 19, 26, 27]
    assert sorted(TABLE.ravel()) == list(range(128))
    with pytest.raises(InputError, match="do not tile a grid of 9x7"):
        token_groups.windows((9, 7))


def test_sizes_rows_and_members_agree():
    merge = jax.jit(token_groups.merge)
    for name, groups in ways(tokens()).items():
        rows = token_groups.sizes(groups).shape[1]
        assert rows == {"windows": 80, "all windows": 32, "tokens": 80, "tome": 32}[name]
        counts = [np.bincount(r, minlength=rows) for r in np.asarray(groups.row)]
        np.testing.assert_array_equal(token_groups.sizes(groups), counts)
        # a mean, counted by the members of each row
        x = tokens(2)
        merged = merge(groups, x)
        total = np.zeros(merged.shape)
        for b in range(2):
            np.add.at(total[b], np.asarray(groups.row[b]), np.asarray(x[b]))
        np.testing.assert_allclose(merged, total / np.array(counts)[:, :, None], atol=1e-6)


def test_merge_then_unmerge_is_the_identity_on_tokens_constant_in_a_window():
    value = np.random.default_rng(3).integers(-8, 8, size=(2, len(TABLE), 6)) / 4
    x = np.zeros((2, TABLE.size, 6), np.float32)
    x[:, TABLE] = value[:, :, None]

    @functools.partial(jax.jit, static_argnums=1)
    def back(x, count):
        groups = token_groups.merge_windows(
            token_groups.window_scores(x, counters(), GRID, 0.05), GRID, count
        )
        return token_groups.unmerge(groups, token_groups.merge(groups, x))

    for count in (0, 5, len(TABLE)):
        np.testing.assert_array_equal(back(jnp.asarray(x), count), x)


def test_merging_twice_changes_nothing_more():
    back = jax.jit(lambda groups, x: token_groups.unmerge(groups, token_groups.merge(groups, x)))
    for groups in ways(tokens()).values():
        once = back(groups, tokens())
        twice = back(groups, once)
        np.testing.assert_allclose(twice, once, atol=1e-6)


def test_permuted_windows_give_permuted_tokens():
    x, counter = tokens(), counters()
    order = np.random.default_rng(4).permutation(len(TABLE))
    move = np.zeros(TABLE.size, int)
    move[TABLE] = TABLE[order]

    @jax.jit
    def both(x, counter):
        scores = token_groups.window_scores(x, counter, GRID, 0.05)
        windows = token_groups.merge_windows(scores, GRID, 12)
        groups = windows, nearest(x, counter, 40)
        return [token_groups.unmerge(g, token_groups.merge(g, x)) for g in groups]

    x = jnp.asarray(np.random.default_rng(5).normal(size=x.shape), jnp.float32)
    for plain, moved in zip(both(x, counter), both(x[:, move], counter[:, move])):
        np.testing.assert_allclose(moved, plain[:, move], atol=1e-6)


def test_rows_of_a_batch_are_matched_on_their_own():
    x = tokens()
    changed = x.at[1].set(tokens(7)[1])
    for name, groups in ways(x).items():
        for before, after in zip(*map(jax.tree.leaves, (groups, ways(changed)[name]))):
            np.testing.assert_array_equal(before[0], after[0])


def test_zero_tokens_give_no_nan():
    x = tokens().at[:, :40].set(0)
    assert np.isfinite(token_groups.window_scores(x, jnp.zeros_like(counters()), GRID, 0.05)).all()
    position = token_groups.oldest(counters(), GRID)
    for small in (x, 1e-30 * x):
        assert not np.isnan(token_groups.nearest(small, position, TABLE)[0]).any()


def test_the_sign_of_the_frequency_term_prefers_or_spares_what_was_merged():
    x = jnp.ones((1, TABLE.size, 4))
    counter = jnp.zeros((1, TABLE.size), jnp.int32).at[0, TABLE[7]].set(5)
    best = [
        int(token_groups.best(token_groups.window_scores(x, counter, GRID, sign * 0.05))[0, place])
        for sign, place in ((1, 0), (-1, -1))
    ]
    assert best == [7, 7]


def test_mixing_touches_only_what_was_merged():
    groups = ways(tokens())["tokens"]
    new, stored = jnp.ones((2, 128, 3)), jnp.full((2, 128, 3), jnp.nan)
    alone = np.asarray(groups.alone)
    mixed = np.asarray(token_groups.mix(groups, new, stored, 0.1))
    assert (mixed[alone] == 1).all() and np.isnan(mixed[~alone]).all()
    np.testing.assert_array_equal(token_groups.mix(groups, new, 0 * new, 1.0), new)
    assert (np.asarray(token_groups.mix(groups, new, 3 * new, 0.0))[~alone] == 3).all()
    np.testing.assert_array_equal(token_groups.count_up(groups, counters())[groups.alone], 0)
    np.testing.assert_array_equal(
        token_groups.count_up(groups, counters())[~groups.alone], counters()[~groups.alone] + 1
    )


def test_no_size_depends_on_the_values():
    for seed in range(3):
        ways(tokens(seed))
    assert ways._cache_size() == 1
    draws = tome.draws(3, GRID)
    assert draws.shape == (3, 32) and set(draws.ravel()) == {0, 1, 2, 3}
