"""Students: they start as their teacher, learn its guided velocity, and take two of its steps in
one."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.grids import aligned_grid
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.conditions import Scalar
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Output, make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT
from ppflow_jax.systems.distillation_rows import Rows, counts
from ppflow_jax.systems.guided_distillation import Guided, Halved
from tests.systems.checks import random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems" / "guided_distillation"
TEACHER = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)
STUDENT = replace(TEACHER, conditions=(Scalar("guidance"),))
BASE = FlowObjective(PPFLOW2, Flow(), TEACHER.null_label, label_drop=0.0)


def test_targets_steps_and_the_embedding_of_the_scale_are_the_authors():
    with jax.default_matmul_precision("highest"):
        found = [r for f in REFERENCE.glob("*.npz") for r in _rows(Reference(f))]
    assert len(found) == 43
    within(found)


def _rows(ref):
    return SYSTEMS["guided_distillation"](ref)


def batch(objective, size=8):
    x = jax.random.normal(jax.random.key(0), (size, *TEACHER.shape))
    given = {"x": x, "label": jnp.arange(size) % 5}
    return given, objective.draw(jax.random.key(1), given)


def test_a_student_starts_as_the_teacher_and_learns_its_guidance():
    """Of the whole network: the first error is (s - 1) (c - u), three channels of four guided."""
    objective = Guided(low=1.0, high=3.0, channels=3).on(BASE, STUDENT)
    given, draws = batch(objective)
    teacher = random_params(TEACHER)
    zero = {"guidance": {"kernel": jnp.zeros((256, 256))}}
    apply, plain = make_apply(STUDENT), make_apply(TEACHER)

    @jax.jit
    def loss(params, draws):
        return objective.loss(apply, params, {"teacher": params}, given, draws, {})

    total, metrics = loss(teacher | {"conditions": zero}, draws)
    errors = []
    for stage in range(2):
        rows = slice(stage, None, 2)
        x0, x1, t, y = (a[rows] for a in (draws.noise, given["x"], draws.t, draws.labels))
        z = t[:, None, None, None] * x1 + (1 - t)[:, None, None, None] * x0
        c, u = (jax.jit(plain, static_argnums=4)(teacher, z, t, k, stage) for k in (y, 5 + 0 * y))
        error = (draws.scale[rows] - 1)[:, None, None, None] * (c - u)
        errors.append(float(np.mean(np.square(error.at[..., 3].set(0)))))
        assert metrics[f"loss/stage{stage}"] == pytest.approx(errors[-1], rel=1e-4)
    assert total == pytest.approx(np.mean(errors), rel=1e-4)
    assert 1 <= draws.scale.min() < draws.scale.max() <= 3
    # With a scale of 1 there is nothing to learn
    total, _ = loss(teacher | {"conditions": zero}, draws._replace(scale=jnp.ones(8)))
    assert total < 1e-9


def field(params, zs, ts, ys, stages):
    """A velocity that depends on everything, in closed form."""

    def one(z, t, y, stage):
        more = y["label"] + y.get("guidance", 0 * t) + stage
        return jnp.sin(z + (3 * t + more)[:, None, None, None])

    return tuple(Output(one(*each), {}) for each in zip(zs, ts, ys, stages))


@pytest.mark.parametrize("pyramid", [SIT, PPFLOW2, PPFLOW3], ids=["sit", "levels 2", "levels 3"])
def test_a_step_of_a_student_ends_where_two_of_the_teacher_do(pyramid):
    base = replace(BASE, pyramid=pyramid)
    steps, y, scale = 8, jnp.arange(3), jnp.full(3, 2.5)
    objective = Halved(steps).on(base, replace(STUDENT, pyramid=pyramid))
    z = jax.random.normal(jax.random.key(0), (3, *TEACHER.shape))

    def apply(params, x, t, y, stage):
        return field(params, (x,), (t,), (y,), (stage,))[0].prediction

    config = SamplerConfig("euler", 2 * steps, cfg=(2.5,))
    sampler = Sampler(apply, replace(STUDENT, pyramid=pyramid), Flow(), config)
    way = sampler({}, z, y, trajectory=True)
    grid = aligned_grid(0.0, 1.0, steps, pyramid)
    for i in range(steps):
        t, end = (jnp.full(3, grid[k]) for k in (i, i + 1))
        stage = pyramid.stage_from(grid[i])
        rows = [Rows(way[2 * i], t, end, y, scale)] * len(pyramid)
        v = objective.settings.targets(base, field, {}, tuple(rows))[stage]
        step = way[2 * i] + (end - t)[:, None, None, None] * v
        np.testing.assert_allclose(step, way[2 * i + 2], atol=5e-6, err_msg=f"step {i}")


def test_times_are_starts_of_steps_of_the_stage():
    for pyramid, steps in ((PPFLOW2, 4), (PPFLOW3, 8)):
        settings, base = Halved(steps), replace(BASE, pyramid=pyramid)
        pattern = base.pattern
        u = jnp.float32(np.random.default_rng(0).random(256 * len(pattern))).at[0].set(1 - 2**-24)
        t, end = (np.asarray(a) for a in settings.times(base, u))
        grid = aligned_grid(0.0, 1.0, steps, pyramid)
        assert sorted(set(t.tolist())) == grid[:-1].tolist()
        numbers = np.searchsorted(grid, t)
        np.testing.assert_array_equal(end, grid[numbers + 1])
        stages = np.tile(pattern, 256)
        np.testing.assert_array_equal([pyramid.stage_from(x) for x in t], stages)
        share = np.bincount(numbers[stages == 0]) / np.sum(stages == 0)
        np.testing.assert_allclose(share, 1 / counts(steps, pyramid)[0], atol=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Guided(low=3.0, high=2.0), "0 <= low <= high"),
        (lambda: Guided(channels=-1), "channels must be at least 0"),
        (lambda: Halved(0), "steps must be at least 1"),
        (lambda: Guided().on(BASE, TEACHER), "'scalar:name=guidance',"),
        (lambda: Guided(channels=5).on(BASE, STUDENT), "the model has 4 channels"),
        (lambda: Halved(3).on(BASE, STUDENT), "6 steps are not twice 3 in every stage"),
        (lambda: Halved(1).on(BASE, STUDENT), "give at least 2"),
        (
            lambda: Halved().on(replace(BASE, flow=Flow("gvp")), STUDENT),
            "path linear and prediction velocity",
        ),
        (
            lambda: Halved().on(replace(BASE, stage_times=((0.0, 1.0), (0.0, 1.0))), STUDENT),
            "leave flow.stage_times empty",
        ),
        (lambda: Halved(4).notes(SamplerConfig("heun", 4)), "euler and steps=4, not heun and 4"),
        (lambda: Halved(4).notes(SamplerConfig("euler", 8)), "euler and steps=4, not euler and 8"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_scales_that_were_not_learned_are_noted():
    assert Guided().notes(SamplerConfig(cfg=(1.0, 2.0))) == ()
    (note,) = Halved(4).notes(SamplerConfig("euler", 4, cfg=(1.0, 5.0)))
    assert note == "guidance 5 is outside 1 to 4, on which the model was distilled"
