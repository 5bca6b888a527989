"""REPA and HASTE: the losses, the grids of coarse stages, and their authors' numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.terms import View
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import Output
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import PPFLOW3, SIT
from ppflow_jax.systems.haste import AttentionAlign, attention, cross_entropy
from ppflow_jax.systems.repa import Repa, alignment, pooled, project, shares
from tests.systems.checks import within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
SMALL = ModelConfig(PPFLOW3, 16, 4, width=16, depth=3, heads=2, num_classes=5)


@pytest.mark.parametrize(("name", "count"), [("repa", 36), ("haste", 4)])
def test_losses_and_gradients_are_the_authors(name, count):
    ref = Reference(REFERENCE / name / f"{name}.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS[name](ref))
    assert len(rows) >= count
    within(rows)


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def test_the_cosine_is_one_alike_and_minus_one_opposite_at_any_length():
    h = draw(2, 5, 7)
    for scale in (1e-3, 1.0, 1e3):
        np.testing.assert_allclose(alignment(scale * h, h), -1, atol=1e-6)
        np.testing.assert_allclose(alignment(-scale * h, h), 1, atol=1e-6)
    loss = lambda h, z: jnp.sum(alignment(h, z))
    to_student, to_teacher = jax.grad(loss, (0, 1))(h.at[0, 0].set(0), draw(2, 5, 7, seed=1))
    assert float(jnp.abs(to_teacher).max()) == 0 and np.isfinite(to_student).all()
    assert float(jnp.abs(to_student).max()) > 0


def test_pooling_is_the_mean_over_the_area_of_every_cell():
    z = draw(2, 4, 6, 3)
    cells = np.asarray(z).reshape(2, 2, 2, 3, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(pooled(z, (2, 3)), cells.reshape(2, 6, 3), atol=1e-6)
    np.testing.assert_array_equal(pooled(z, (4, 6)), z.reshape(2, 24, 3))
    fine = np.asarray(z).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(pooled(z, (8, 12)), fine.reshape(2, 96, 3), atol=1e-6)
    np.testing.assert_allclose(shares(2, 3), np.array([[1, 0.5, 0], [0, 0.5, 1]]) / 1.5, atol=1e-7)
    for pair in ((2, 17), (16, 17), (5, 3)):
        np.testing.assert_allclose(shares(*pair).sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(shares(*pair).sum(axis=0), pair[0] / pair[1], atol=1e-6)


def views(stage, **batch):
    grid = PPFLOW3.grid(stage, 16)
    return View(*[None] * 6, batch, {}, stage, grid)


@pytest.mark.parametrize("stage", range(3))
def test_the_term_is_its_formula_in_every_stage(stage):
    term = Repa(2, (6, 5), 9, ("a", "b"))
    own = term.init(SMALL, jax.random.key(0))
    teachers = {"a": jnp.float16(draw(2, 8, 8, 6)), "b": jnp.float16(draw(2, 4, 4, 5, seed=1))}
    rows, columns = PPFLOW3.grid(stage, 16)
    h = draw(2, rows * columns, 16, seed=2)
    ours = term(own, Output(None, {}, {"h/2": h}), views(stage, **teachers))
    losses = []
    for field, z in teachers.items():
        side = z.shape[1]
        cells = np.zeros((2, rows, columns, z.shape[-1]))
        for r in range(rows):
            for c in range(columns):
                top, left = r * side / rows, c * side / columns
                below = slice(int(top), max(int((r + 1) * side / rows), int(top) + 1))
                right = slice(int(left), max(int((c + 1) * side / columns), int(left) + 1))
                cells[:, r, c] = np.float64(z[:, below, right]).mean(axis=(1, 2))
        x = np.float64(h)
        for name in ("fc1", "fc2", "fc3"):
            x = x @ np.float64(own[field][name]["kernel"]) + np.float64(own[field][name]["bias"])
            x = x / (1 + np.exp(-x)) if name != "fc3" else x
        unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
        losses.append(-(unit(x) * unit(cells.reshape(2, -1, z.shape[-1]))).sum(-1).mean(-1))
    np.testing.assert_allclose(ours, np.mean(losses, axis=0), atol=1e-5)


def test_projectors_have_the_published_sizes():
    for size, count in (("B", 7_344_896), ("L", 7_869_184), ("XL", 8_131_328)):
        model = ModelConfig(SIT, 32, 4, **SIZES[size], num_classes=1000)
        own = jax.eval_shape(lambda m=model: Repa().init(m, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(own)) == count
    kernel = Repa(1, (6,), 64).init(SMALL, jax.random.key(0))["teacher"]["fc2"]["kernel"]
    assert float(jnp.abs(kernel).max()) <= (6 / 128) ** 0.5 < 1.1 * float(jnp.abs(kernel).max())


def by_query(student, teacher):
    """Cross entropy of one query over its keys, mean over heads that both have."""
    heads = min(student.shape[1], teacher.shape[1])
    s, p = np.float64(student[:, :heads]), np.float64(teacher[:, :heads])
    top = s.max(-1, keepdims=True)
    log_s = s - top - np.log(np.exp(s - top).sum(-1, keepdims=True))
    return -(p * log_s).sum(-1).mean(axis=(1, 2))


@pytest.mark.parametrize("heads", [2, 5])
def test_the_keys_of_one_query_are_one_softmax_whatever_their_number(heads):
    """The release cuts keys into rows of 256, so that 64 tokens mix four queries (correction 7)."""
    student, logits = 3 * draw(2, heads, 64, 64), 3 * draw(2, 3, 64, 64, seed=1)
    maps = attention(logits, (8, 8))
    expected = by_query(student, maps)
    np.testing.assert_allclose(cross_entropy(student, maps), expected, rtol=1e-5)
    mixed = jax.nn.log_softmax(student[:, :2].reshape(-1, 256))
    target = jax.nn.softmax(logits[:, :2].reshape(-1, 256))
    assert float(-jnp.mean(jnp.sum(target * mixed, -1))) > expected.mean() + 1


def test_far_logits_stay_finite():
    """The release takes the log of a softmax, which underflows (correction 8)."""
    student, maps = 300 * draw(1, 2, 4, 16), attention(draw(1, 2, 16, 16, seed=1), (4, 4))[:, :, :4]
    ours = cross_entropy(student, maps)
    np.testing.assert_allclose(ours, by_query(student, maps), rtol=1e-5)
    assert not np.isfinite(jnp.sum(maps * jnp.log(jax.nn.softmax(student))))
    ref = Reference(REFERENCE / "haste" / "haste.npz")
    assert np.isinf(ref["direct/attention_student_times60_release_f32"])
    assert np.isfinite(ref["direct/attention_student_times60"])


def test_equal_maps_have_the_teachers_entropy_and_no_gradient():
    logits = draw(2, 3, 16, 16)
    maps = jax.nn.softmax(logits)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(cross_entropy(s, maps)))(logits)
    entropy = -jnp.sum(maps * jnp.log(maps)) / (3 * 16)
    assert float(value) == pytest.approx(float(entropy), rel=1e-5)
    assert float(jnp.abs(gradient).max()) < 1e-7
    to_teacher = jax.grad(lambda m: jnp.sum(cross_entropy(2 * logits, m)))(maps)
    assert float(jnp.abs(to_teacher).max()) == 0


@pytest.mark.parametrize("grid", [(4, 4), (8, 4), (16, 16), (8, 8)])
def test_maps_between_cells_are_means_over_queries_and_sums_over_keys(grid):
    logits = 2 * draw(2, 3, 64, 64)
    found = attention(logits, grid)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    maps = np.asarray(jax.nn.softmax(logits))
    rows, columns = grid
    if grid == (16, 16):  # four cells inside one token of the teacher
        inside = np.arange(64).reshape(8, 8).repeat(2, 0).repeat(2, 1).reshape(-1)
        np.testing.assert_allclose(found, maps[:, :, inside][..., inside] / 4, atol=1e-6)
        return
    cell = (np.arange(8)[:, None] * rows // 8) * columns + np.arange(8)[None] * columns // 8
    owner = np.eye(rows * columns)[cell.reshape(-1)]  # [tokens, cells]
    expected = np.einsum("qQ,bhqk,kK->bhQK", owner / owner.sum(0), maps, owner)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("stage", range(3))
def test_the_attention_term_pairs_layers(stage):
    term = AttentionAlign((0, 2), (1, 0))
    assert term.init(SMALL, jax.random.key(0)) == {} and term.taps == Taps(logits=(0, 2))
    rows, columns = grid = PPFLOW3.grid(stage, 16)
    n = rows * columns
    taps = {"logits/0": draw(2, 2, n, n), "logits/2": draw(2, 2, n, n, seed=1)}
    field = jnp.float16(2 * draw(2, 2, 3, 64, 64, seed=2))
    ours = term({}, Output(None, {}, taps), views(stage, teacher_attention=field))
    pairs = [by_query(taps["logits/0"], attention(field[:, 1], grid))]
    pairs.append(by_query(taps["logits/2"], attention(field[:, 0], grid)))
    np.testing.assert_allclose(ours, np.mean(pairs, axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Repa(0), "at least 1"),
        (lambda: Repa(dims=(3, 4)), "one entry for each teacher"),
        (lambda: Repa(4).init(SMALL, jax.random.key(0)), "choose 1 to 3"),
        (lambda: AttentionAlign((0, 1), (0,)), "one entry for each pair"),
        (lambda: AttentionAlign((0, 0), (0, 1)), "must be different"),
        (lambda: AttentionAlign((3,), (0,)).init(SMALL, jax.random.key(0)), "choose 0 to 2"),
    ],
)
def test_terms_that_do_not_fit_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_projector_is_linear_silu_linear_silu_linear():
    own = Repa(1, (3,), 4).init(SMALL, jax.random.key(1))["teacher"]
    h = draw(1, 2, 16)
    silu = lambda x: x * jax.nn.sigmoid(x)
    hidden = silu(silu(h @ own["fc1"]["kernel"]) @ own["fc2"]["kernel"])
    np.testing.assert_allclose(project(own, h), hidden @ own["fc3"]["kernel"], atol=1e-5)
