"""PPCL: probes and intervals, students in the place of blocks, their distillation, the command."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.errors import InputError
from ppflow_jax.evaluate.probing import Examples
from ppflow_jax.evaluate.pruning import look
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.stack import Taps
from ppflow_jax.models.students import Student, parse, text
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems import registry
from ppflow_jax.systems.linear_probes import (
    Moments,
    chains,
    cka,
    intervals,
    least_loss,
    losses,
    probes_of,
    removable,
    removed,
)
from ppflow_jax.systems.ppcl import (
    Ppcl,
    check_trained,
    direction_loss,
    magnitude_loss,
    normalised_l1,
)
from tests.commands import run
from tests.systems.checks import compiled, random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems" / "ppcl" / "ppcl.npz"
RNG = np.random.default_rng(0)
TEACHER = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=16, depth=5, heads=2, num_classes=4)
MODEL = replace(TEACHER, students=parse("0:1-3,0:ffn4,1:ffn0,1:2-3"))
BASE = FlowObjective(PPFLOW2, Flow(), MODEL.null_label)
APPLY, PLAIN = compiled(MODEL), compiled(TEACHER)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: leaf / 2, random_params(MODEL))


@pytest.fixture(scope="module")
def teacher(params):
    return {name: leaf for name, leaf in params.items() if name != "students"}


@pytest.fixture(scope="module")
def given():
    x = jax.random.normal(jax.random.key(0), (3, *MODEL.shape))
    return x, jnp.array([0.1, 0.2, 0.4]), jnp.arange(3)


def test_it_is_the_authors_code_and_its_restatement():
    rows = list(SYSTEMS["ppcl"](Reference(REFERENCE)))
    assert len(rows) == 18
    within(rows)


def walk(depth=6, width=5, count=400, linear=()):
    """Tokens after blocks, some of which are linear maps."""
    rng = np.random.default_rng(1)
    z = [rng.normal(3, 1, size=(count, width))]
    for i in range(depth):
        kernel = 0.4 * rng.normal(size=(width, width))
        step = z[-1] @ kernel
        z.append(z[-1] + (step + 1 if i in linear else 2 * np.tanh(3 * step) * z[-1][:, ::-1]))
    return np.stack(z)


def test_a_block_that_is_linear_has_a_probe_without_error_and_costs_a_chain_nothing():
    moments = Moments.of(walk(linear=(2, 3)))
    probes = probes_of(moments, ridge=0.0)
    assert max(probes.residual[2:4]) < 1e-6 < min(probes.residual[[0, 1, 4, 5]])
    delta = losses(chains(moments, probes))
    assert abs(delta[1, 2]) < 1e-9 and abs(delta[1, 3]) < 1e-9 and delta[1, 4] > 1e-3
    assert probes_of(moments).residual[2] < 1e-3  # with the ridge


def test_chains_are_what_probes_make_of_the_tokens_one_after_another():
    tokens = walk()
    moments = Moments.of(tokens)
    probes = probes_of(moments)
    found = chains(moments, probes)
    for u in (0, 2):
        x = tokens[u + 1]
        for k in range(u + 1, 6):
            x = x @ probes.kernel[k] + probes.bias[k] + x
            xc, yc = x - x.mean(0), tokens[k + 1] - tokens[k + 1].mean(0)
            assert found[u, k] == pytest.approx(cka(yc.T @ xc, xc.T @ xc, yc.T @ yc), abs=1e-12)
    assert np.isnan(found[3, 2]) and found[3, 3] == pytest.approx(1)


def test_a_rotation_and_a_multiple_are_alike():
    x = RNG.normal(size=(200, 4))
    rotation = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    moments = Moments.of(np.stack([x, 3 * x @ rotation + 7, RNG.normal(size=(200, 4))]))
    alike = lambda i, j: cka(*(moments.covariance(*p) for p in ((i, j), (i, i), (j, j))))
    assert alike(0, 1) == pytest.approx(1) and alike(0, 2) < 0.1
    assert cka(np.zeros((4, 4)), np.zeros((4, 4)), np.eye(4)) == 0


def square(*rows):
    return np.array([[np.nan, *row] for row in rows])


def test_an_interval_ends_before_the_losses_turn_to_rising():
    falls, turns = [0.05, 0.04, 0.03, 0.02, 0.01], [0.05, 0.01, 0.04, 0.01, 0.03]
    assert intervals(square(*[falls] * 6)) == ((0, 5),)
    assert intervals(square(*[turns] * 6)) == ((0, 2), (3, 5))
    assert intervals(square(*[turns] * 6), longest=2) == ((0, 1), (2, 3), (4, 5))
    assert intervals(square(*[falls] * 6), longest=4, shortest=3) == ((0, 3),)


def test_the_intervals_of_least_loss_are_those_of_all_ways():
    cost = RNG.uniform(size=(5, 5))
    pairs = [(u, v) for u in range(5) for v in range(u + 1, 5)]

    def ways(first=0):
        yield ()
        for u, v in pairs:
            if u >= first:
                yield from (((u, v), *rest) for rest in ways(v + 1))

    for count in (0, 1, 2, 3, 4):
        every = [w for w in ways() if removed(w) == count]
        best = min(every, key=lambda w: sum(cost[s] for s in w))
        assert least_loss(cost, count) == best
        assert max(v - u for u, v in least_loss(cost, count, longest=3) or [(0, 0)]) <= 2
    assert least_loss(cost, 5) is None
    floor = 0.4
    most = max(removed(w) for w in ways() if all(cost[s] >= floor for s in w))
    assert removable(cost, floor) == most > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("0:3-1", "at least two"),
        ("0:1-1", "at least two"),
        ("2:0-1", "stages 0 to 1"),
        ("0:3-5", "blocks 0 to 4"),
        ("0:ffn5", "blocks 0 to 4"),
        ("0:1-3,0:3-4", "where another"),
        ("0:1-3,0:ffn2", "where another"),
        ("0:1", "is none: write"),
    ],
)
def test_students_of_nothing_are_refused(words, expected):
    with pytest.raises(InputError, match=expected):
        replace(TEACHER, students=parse(words))
    assert text(parse("1:ffn5, 0:2-4")) == "0:2-4,1:ffn5" and parse("none") == ()


def test_without_students_on_it_is_the_teacher_bit_for_bit(params, teacher, given):
    for stage in (0, 1):
        ours = APPLY(params, *given, stage, on=())
        np.testing.assert_array_equal(ours, PLAIN(teacher, *given, stage))
        assert np.abs(ours - APPLY(params, *given, stage)).max() > 1e-3
    text_of = lambda m, p, **on: str(
        jax.make_jaxpr(lambda p: make_apply(m)(p, *given, 0, **on))(p).jaxpr.eqns[-1]
    )
    assert text_of(MODEL, teacher | {"students": params["students"]}, on=()) == text_of(
        TEACHER, teacher
    )


def by_hand(params, given, stage, students):
    """The same walk, block by block, from plain networks of the teacher's blocks."""
    row = lambda leaf, i: leaf[i : i + 1]
    take = lambda name, i: jax.tree.map(lambda leaf: row(leaf, i), name)
    deep = [s for s in MODEL.students if not s.ffn]
    found, block = [], 0
    starts = {s.first: s for s in students if s.stage == stage and not s.ffn}
    while block < MODEL.depth:
        if block in starts:
            found.append(take(params["students"]["blocks"], deep.index(starts[block])))
            block = starts[block].last + 1
        else:
            found.append(take(params["blocks"], block))
            block += 1
    blocks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
    plain = {n: leaf for n, leaf in params.items() if n not in ("blocks", "students")}
    made = compiled(replace(TEACHER, depth=len(found)))
    return made(plain | {"blocks": blocks}, *given, stage), len(found)


@pytest.mark.parametrize("words", ["0:1-3", "1:2-3", "0:1-3,1:2-3"])
def test_any_students_are_on_each_in_its_own_stage(params, given, words):
    on = parse(words)
    for stage in (0, 1):
        expected, blocks = by_hand(params, given, stage, on)
        ours = APPLY(params, *given, stage, on=on)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        few = replace(TEACHER, students=on)
        assert (
            few.blocks_at(stage)
            == blocks
            == 5 - 2 * (stage == 0 and "0:" in words) - (stage == 1 and "1:" in words)
        )
        assert forward_flops(few, stage) == forward_flops(replace(TEACHER, depth=blocks), stage)


def test_a_student_changes_what_is_after_it_alone(params, given):
    taps = Taps(h=(1, 4, 5), mixed=(0, 4))
    both = [APPLY(params, *given, 0, taps=taps, on=on).taps for on in ((), parse("0:1-3"))]
    changed = {name: bool(np.any(both[0][name] != both[1][name])) for name in both[0]}
    assert changed == {"h/1": False, "mixed/0": False, "h/4": True, "h/5": True, "mixed/4": True}
    with pytest.raises(InputError, match=r"taps of \[2\]: student 0:1-3"):
        APPLY(params, *given, 0, taps=Taps(h=(2,)))
    with pytest.raises(InputError, match="no student 0:0-1"):
        APPLY(params, *given, 0, on=parse("0:0-1"))
    with pytest.raises(InputError, match="blocks that are alike"):
        APPLY(params, *given, 0, lambda blocks, h, c: (h, None))


def test_a_linear_map_stands_in_for_an_ffn(params, given):
    """Against an FFN that is that map: GELU is x for x far above zero."""
    shift, width = 100.0, MODEL.width
    kernel = 0.1 * RNG.normal(size=(width, width))
    bias = RNG.normal(size=width)
    model = replace(TEACHER, students=parse("0:ffn2"), mlp_ratio=1.0)
    own = jax.tree.map(lambda leaf: leaf / 2, random_params(model))
    own["students"]["residual"] = {
        "kernel": jnp.float32(kernel)[None],
        "bias": jnp.float32(bias)[None],
    }
    ours = compiled(model)(own, *given, 0)
    blocks = own["blocks"]
    fc1 = {"kernel": jnp.eye(width), "bias": jnp.full(width, shift)}
    fc2 = {
        "kernel": jnp.float32(kernel + np.eye(width)),
        "bias": jnp.float32(bias - shift * (kernel + np.eye(width)).sum(0)),
    }
    for name, leaf in (("fc1", fc1), ("fc2", fc2)):
        new = jax.tree.map(lambda old, row: old.at[2].set(row), blocks[name], leaf)
        blocks = blocks | {name: new}
    plain = {n: leaf for n, leaf in own.items() if n != "students"} | {"blocks": blocks}
    expected = compiled(replace(model, students=()))(plain, *given, 0)
    np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-3)
    saved = forward_flops(replace(model, students=()), 0) - forward_flops(model, 0)
    assert saved == 2 * 4 * width * width  # of its 4 tokens


def test_losses_are_what_they_are_called():
    a, b = jnp.float32(RNG.normal(size=(2, 3, 7, 5)))
    cos = jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(direction_loss(a, b), 2 - 2 * cos, rtol=1e-5)
    assert np.abs(direction_loss(a, 3 * a)).max() < 1e-12
    assert np.abs(normalised_l1(a, 3 * a)).max() < 1e-6
    np.testing.assert_allclose(magnitude_loss(a, 3 * a), np.log(3) ** 2, rtol=1e-5)
    zero = jax.grad(lambda x: jnp.sum(direction_loss(x, b) + magnitude_loss(x, b)))(0 * a)
    assert np.isfinite(zero).all()


def objective(words="ppcl", model=MODEL):
    return registry.objective(words, BASE, model)


def batch_of(size, seed=0):
    x = jax.random.normal(jax.random.key(seed), (size, *MODEL.shape))
    return {"x": x, "label": jnp.arange(size) % 4}


@pytest.mark.long
def test_every_student_learns_alone_from_what_the_teacher_sees(params, teacher):
    ours, batch = objective(), batch_of(4)
    draws = ours.draw(jax.random.key(1), batch)
    loss = lambda p, o=ours: o.loss(APPLY, p, {}, batch, draws, {})
    (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    names = [f"student/{s}".replace(":", ".") for s in MODEL.students]
    assert set(metrics) == {"loss", *names}
    assert float(total) == pytest.approx(sum(float(metrics[n]) for n in names))
    own, others = grads.pop("students"), grads
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(others))
    sizes = jax.tree.map(lambda leaf: np.abs(leaf).max(), own)
    assert min(jax.tree.leaves(sizes)) > 0
    # by hand, of the student of blocks 1 to 3 of the coarse stage, from taps of the teacher
    views, outs = BASE.predicted(PLAIN, teacher, {}, batch, draws, Taps(h=(1, 4)))
    alone = replace(TEACHER, depth=1)
    student = jax.tree.map(lambda leaf: leaf[:1], params["students"]["blocks"])
    mine = {**teacher, "blocks": student}
    made = []
    make_apply(alone)(
        mine, views[0].xt, views[0].t, views[0].y, 0,
        trunk=lambda blocks, h, c: (h, made.append((blocks, c))),
    )  # fmt: skip
    (blocks, c), taps = made[0], outs[0].taps
    block = jax.tree.map(lambda leaf: leaf[0], blocks)
    s, h = block(taps["h/1"], c), taps["h/4"]
    value = jnp.mean(direction_loss(s, h)) + 0.1 * jnp.mean(magnitude_loss(s, h))
    assert float(metrics["student/0.1-3"]) == pytest.approx(float(value), rel=1e-4)
    bare = loss(params, objective("ppcl:magnitude=0"))[1]["student/0.1-3"]
    assert float(bare) == pytest.approx(float(jnp.mean(direction_loss(s, h))), rel=1e-4)
    # another student that moves changes nothing for it
    moved = jax.tree.map(lambda leaf: leaf.at[1].add(1), params["students"]["blocks"])
    moved = params | {"students": params["students"] | {"blocks": moved}}
    after = loss(moved)[1]
    assert after["student/0.1-3"] == metrics["student/0.1-3"]
    assert after["student/1.2-3"] != metrics["student/1.2-3"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="the model has none"):
        objective(model=TEACHER)
    with pytest.raises(InputError, match="at least 0"):
        Ppcl(magnitude=-1.0)
    with pytest.raises(InputError, match="trains students alone"):
        check_trained(objective(), MODEL, (".*",))
    check_trained(objective(), MODEL, ("students/.*",))
    assert objective().settings.notes(SamplerConfig("euler", 4)) == ()


def small_model(tmp_path, model, params):
    from ppflow_jax.checkpoints.card import Card
    from ppflow_jax.checkpoints.weights import save_weights

    save_weights(tmp_path / "model", Card(model, Flow(), "pixels"), params)
    return pf.load(tmp_path / "model")


def test_a_stage_is_looked_at_by_tokens_of_its_own_times(tmp_path, teacher):
    """Batches, the last of which is filled up, give the moments of all tokens at once."""
    model = small_model(tmp_path, TEACHER, teacher)
    x = np.float32(RNG.normal(size=(10, *TEACHER.shape)))
    examples = Examples(x, np.arange(10) % 4, np.arange(10))
    found = look(model, examples, 0, batch=4, seed=3)
    assert found.times == (0.0, 0.5) and found.tokens == 10 * 4
    times = np.float32(0.5 * (np.random.default_rng(3).permutation(10) + 0.5) / 10)
    noise, _ = image_noise(np.uint32(3), np.arange(10), TEACHER.shape)
    xt = times[:, None, None, None] * x + (1 - times[:, None, None, None]) * np.asarray(noise)
    taps = PLAIN(
        teacher,
        jnp.float32(xt),
        jnp.array(times),
        jnp.arange(10) % 4,
        0,
        taps=Taps(h=(1, 2, 3, 4, 5)),
    ).taps
    tokens = np.stack([np.float64(taps[f"h/{i}"]).reshape(40, -1) for i in range(1, 6)])
    moments = Moments.of(tokens)
    probes = probes_of(moments)
    np.testing.assert_allclose(found.probes.kernel[1:], probes.kernel, rtol=0.02, atol=0.02)
    later = chains(moments, probes)
    np.testing.assert_allclose(found.similarity[1:, 1:], later, atol=1e-3)


def test_the_command_writes_intervals_a_picture_and_students(tmp_path):
    """That of docs/ppcl.md."""
    config = replace(TEACHER, num_classes=10)
    weights = jax.tree.map(lambda leaf: leaf / 2, random_params(config))
    source = small_model(tmp_path, config, weights)
    out, target = tmp_path / "a.json", tmp_path / "students"
    flags = [f"--checkpoint={tmp_path / 'model'}", "--source=digits", f"--out={out}"]
    flags += ["--num=40", "--batch=16"]
    asked = ("--remove=2,0", "--ffns=0,1", f"--target={target}")
    code, said, err = run("evaluate.prune", *flags, *asked)
    assert code == 0, err
    found, model = json.loads(out.read_text()), pf.load(target)
    students = model.config.students
    assert text(students) == found["students"] and "1:ffn" in found["students"]
    assert [s["blocks"] for s in found["stages"]] == [3, 5]
    assert found["stages"][0]["flops"] < 0.8 and out.with_suffix(".png").stat().st_size > 5000
    assert "3 of 5" in said and found["students"] in said
    deep = [s for s in students if not s.ffn]
    own = jax.tree.map(lambda leaf: leaf[0], model.params["students"]["blocks"])
    start = jax.tree.map(lambda leaf: leaf[deep[0].start], source.params["blocks"])
    jax.tree.map(np.testing.assert_array_equal, own, start)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(model.config))
    assert jax.tree.map(jnp.shape, model.params) == shapes
    residuals = found["stages"][1]["ffn_residual"]
    assert students[-1] == Student(1, *[int(np.argmin(residuals))] * 2, ffn=True)
    kernel = model.params["students"]["residual"]["kernel"]  # fitted to data
    assert 0 < min(residuals) < 1 and np.abs(kernel).max() > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--remove=9", "0 to 4 of the 5 blocks"),
        ("--remove=1,1,1", "one of each of the 2 stages"),
        ("--remove=1.5", "one whole number"),
        ("--ffns=99", "0 to 5 of the 5 blocks"),
        ("--shortest=1", "at least 2"),
    ],
)
def test_what_cannot_be_asked_leaves_nothing(tmp_path, wrong, words):
    config = replace(TEACHER, num_classes=10)
    small_model(tmp_path, config, random_params(config))
    flags = [f"--checkpoint={tmp_path / 'model'}", "--source=digits", "--num=20", "--batch=16"]
    code, _, err = run("evaluate.prune", *flags, wrong, f"--target={tmp_path / 'none'}")
    assert code == 1 and words in err and "Traceback" not in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
