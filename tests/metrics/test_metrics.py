"""Every metric against the public implementations, in float64 (tests/reference/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.metrics import precision_recall as pr
from ppflow_jax.metrics.frechet import frechet_distance
from ppflow_jax.metrics.inception_score import inception_scores
from ppflow_jax.metrics.kid import draw_subsets, kid, kid_of_subsets, subset_indices
from ppflow_jax.metrics.moments import Moments, Statistics

FOLDER = Path(__file__).parents[1] / "reference" / "metrics"
TORCH = [[15, 17, 9, 12], [7, 6, 16, 11]], [[6, 5, 1, 8], [7, 0, 6, 1]]
FID = {  # case: sets, ranks
    "full_rank": ("ab", (64, 64)),
    "self": ("aa", (64, 64)),
    "few_samples": ("cd", (39, 29)),
    "one_few": ("cb", (39, 64)),
    "few_samples_wide": ("ef", (59, 49)),
    "dead_features": ("AB", (61, 61)),
}


@pytest.fixture(scope="module")
def inputs():
    with np.load(FOLDER / "inputs.npz") as file:
        arrays = dict(file)
    for name in "ab":  # features that are always 0, and two that are equal
        dead = arrays[name].copy()
        dead[:, [5, 17]] = 0
        dead[:, 30] = dead[:, 31]
        arrays[name.upper()] = dead
    return arrays


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "golden.npz") as file:
        return dict(file)


def statistics(x, size=7) -> Statistics:
    moments = Moments()
    for first in range(0, len(x), size):
        moments.add(x[first : first + size])
    return moments.statistics()


def test_mean_and_covariance(inputs, golden):
    found = statistics(inputs["c"])
    np.testing.assert_allclose(found.mean, golden["stats/c/mu"], rtol=1e-12)
    np.testing.assert_allclose(found.covariance, golden["stats/c/sigma"], rtol=1e-9, atol=1e-14)
    assert found.count == 40


def test_parts_order_and_offset_do_not_matter(inputs):
    x = inputs["a"].astype(np.float64)
    whole = statistics(x, len(x)).covariance
    shuffled = np.random.default_rng(0).permutation(x)
    for other in (statistics(x, 1), statistics(shuffled, 13), statistics(x + 1000)):
        np.testing.assert_allclose(other.covariance, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", FID)
def test_frechet_distance(inputs, golden, case):
    (first, second), ranks = FID[case]
    found = frechet_distance(statistics(inputs[first]), statistics(inputs[second]))
    expected = dict(zip(golden["fid/names"].tolist(), golden["fid/values"]))[case]
    assert found.ranks == ranks
    assert found.distance == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_inception_score(inputs, golden):
    logits = inputs["logits"]
    for size in (5000, 250, 200):
        scores = inception_scores(logits, split_size=size)
        assert scores.mean() == pytest.approx(golden[f"is/split_size_{size}"], rel=1e-12)
    for splits in (1, 7, 10):
        scores = inception_scores(logits, splits=splits)
        np.testing.assert_allclose(scores, golden[f"is/splits_{splits}_each"], rtol=1e-12)
        assert scores.std() == pytest.approx(golden[f"is/splits_{splits}_std"], abs=1e-12)
    extreme = inception_scores(logits * np.float64(400))  # probabilities that underflow
    assert extreme.mean() == pytest.approx(golden["is/extreme"], rel=1e-12)


@pytest.mark.parametrize("pair", ["ab", "ba", "aa", "cd", "ef"])
def test_precision_and_recall(inputs, golden, pair, monkeypatch):
    monkeypatch.setattr(pr, "_CHUNK_BYTES", 8 * 400 * 150)  # several blocks
    reference, samples = (inputs[name] for name in pair)
    for k, precision, recall in zip(
        golden["pr/k"], golden[f"pr/{pair}/precision"], golden[f"pr/{pair}/recall"]
    ):
        found = pr.precision_recall(reference, samples, int(k))
        assert found[:2] == (precision, recall)
        if k == 3:
            np.testing.assert_array_equal(found.inside_samples, golden[f"pr/{pair}/sample_inside"])
            np.testing.assert_array_equal(found.inside_reference, golden[f"pr/{pair}/ref_inside"])
    np.testing.assert_allclose(pr.radii(samples), golden[f"pr/{pair}/radii_sample"], rtol=1e-9)


def test_kid(inputs, golden):
    a, b, c, d = (inputs[name] for name in "abcd")
    for name, x, y in (
        ("all_500_400", a, b),
        ("equal_400", a[:400], b),
        ("equal_cd_30", c[:30], d),
        ("halves_of_a", a[:250], a[250:]),
    ):
        assert kid(x, y) == pytest.approx(golden[f"kid/{name}"], rel=1e-10)
    mean, deviation = kid_of_subsets(a, b, inputs["kid_index_a"], inputs["kid_index_b"])
    assert mean == pytest.approx(golden["kid/subsets_mean"], rel=1e-10)
    assert deviation == pytest.approx(golden["kid/subsets_std"], rel=1e-10)


def test_subsets_are_those_of_torch():
    """`torch.manual_seed(7)`, then `torch.randperm(20)[:4]`, `torch.randperm(9)[:4]`, twice."""
    x, y = subset_indices(20, 9, subsets=2, size=4, seed=7)
    assert x.tolist() == TORCH[0] and y.tolist() == TORCH[1]
    again = draw_subsets(np.random.RandomState(7), 20, 9, subsets=1, size=4)
    assert again[0].tolist() == TORCH[0][:1]
    assert all(len(set(rows)) == 50 for rows in subset_indices(50, 50, subsets=3, size=50)[0])


def test_what_is_refused():
    one = Statistics(np.zeros(2), np.eye(2))
    for make, words in (
        (lambda: frechet_distance(one, Statistics(np.zeros(3), np.eye(3))), "2 and of 3 features"),
        (lambda: frechet_distance(one, Statistics(np.zeros(2), -np.eye(2))), "no covariance"),
        (lambda: Statistics(np.zeros(2), np.full((2, 2), np.nan)), "NaN"),
        (lambda: statistics(np.zeros((1, 2))), "at least 2"),
        (lambda: Moments().statistics(), "at least 2"),
    ):
        with pytest.raises(InputError, match=words):
            make()
