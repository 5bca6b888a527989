"""HASTE as a run: both terms and their fields until a step, then the plain step; kills between."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ppflow_jax as pf
from configs import digits
from ppflow_jax.data.sources import open_source
from ppflow_jax.devices.sharding import leaf_path, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.metrics_log import read_metrics
from ppflow_jax.train.program import make_program
from tests import commands
from tests.systems.test_repa import REFERENCE
from tests.systems_parity import Reference

STEPS, STOP = 4, 2
TERMS = ("repa:layer=1,dims=6,hidden=8", "haste:layers=0,teacher=1")
FIELDS = ("teacher", "teacher_attention")
WEIGHTS = {"repa": 0.5, "haste": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits with features and attention of a teacher that was drawn."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    source = open_source("digits", "")
    arrays = {
        "latents": source.x,
        "labels": source.labels,
        "teacher": rng.normal(size=(len(source), 4, 4, 6)).astype("f2"),
        "teacher_attention": rng.normal(size=(len(source), 2, 3, 4, 4)).astype("f2"),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def train(run, data):
    flags = ["--config.data.source=arrays", f"--config.data.path={data}"]
    phases = ((STOP, WEIGHTS), (STEPS, {}))
    flags += [f"--config.flow.terms={TERMS}", f"--config.data.fields={FIELDS}"]
    flags += [f"--config.train.phases={phases}", f"--config.train.steps={STEPS}"]
    flags += ["--config.train.save_every=1", "--config.train.keep=9"]
    return commands.train(run, *flags, variant=":sit")  # of one stage: compiling is its time


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run with the checkpoint of every step."""
    run = tmp_path_factory.mktemp("haste") / "run"
    code, _, err = train(run, data)
    assert code == 0, err
    return run


def everything(run):
    """All leaves of the latest checkpoint, those of terms and of the optimizer too."""
    state = ocp.PyTreeCheckpointer().restore(find_checkpoint(run) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {leaf_path(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.long
@pytest.mark.parametrize("last", [STOP - 1, STOP + 1])
def test_a_run_killed_around_the_stop_ends_with_the_same_bits(data, whole, tmp_path, last):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in range(last + 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / str(step))
    code, out, err = train(run, data)
    assert code == 0 and f"continuing from step {last}" in out, err
    ours, theirs = everything(run), everything(whole)
    assert any(name.startswith("params/terms/repa/teacher/") for name in theirs)
    assert ours == theirs


def test_terms_are_logged_until_the_stop_and_their_leaves_stand_still_after_it(whole, tmp_path):
    rows = {r["step"]: r for r in read_metrics(whole / "metrics.jsonl") if "loss" in r}
    aligned = [step for step, row in rows.items() if {"repa", "haste"} <= row.keys()]
    assert aligned == list(range(1, STOP + 1))
    assert all(-1 <= rows[s]["repa"] <= 1 and rows[s]["haste"] > 0 for s in aligned)
    at = {}
    for step in (STOP - 1, STOP, STEPS):
        at[step] = everything(whole / "checkpoints" / str(step))
    own = [name for name in at[STEPS] if "terms/" in name]
    assert {name.split("/")[0] for name in own} == {"params", "opt_state"}
    assert all(at[STOP][name] == at[STEPS][name] for name in own)
    assert any(at[STOP - 1][name] != at[STOP][name] for name in own)


def test_samples_need_nothing_of_it(whole):
    model = pf.load(whole)
    assert "terms" not in model.params
    assert model.sample(2, plan=model.plan(steps=2)).latents.shape == (2, 8, 8, 1)


def programs(data, terms, phases):
    config = digits.get_config()
    config.model.update(dict(width=16, depth=1, heads=2))
    config.data.update(dict(source="arrays", path=str(data), batch_size=16))
    config.data.fields, config.flow.terms, config.train.phases = FIELDS, terms, phases
    return make_program(Experiment.from_config(config), make_mesh())


def text(program, step):
    shapes = {"x": ((16, 8, 8, 1), "f4"), "label": ((16,), "i4")}
    shapes |= {"teacher": ((16, 4, 4, 6), "f2"), "teacher_attention": ((16, 2, 3, 4, 4), "f2")}
    given = {n: jax.ShapeDtypeStruct(*shapes[n]) for n in ("x", "label", *step.fields)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.run.lower(program.abstract, given, key, {}).as_text()


def test_the_second_phase_is_the_plain_step(data):
    """Nothing of teacher or projector is computed; without own leaves it is the same text."""
    plain = programs(data, (), ())
    haste = programs(data, TERMS[1:], ((STOP, {"haste": 0.25}), (STEPS, {})))
    assert [step.fields for step in haste.steps] == [FIELDS[1:], ()]
    first, second = (text(haste, step) for step in haste.steps)
    assert second == text(plain, plain.steps[0]) and first != second
    both = programs(data, TERMS, ((STOP, WEIGHTS), (STEPS, {})))
    assert [step.fields for step in both.steps] == [FIELDS, ()]
    first, second = (text(both, step) for step in both.steps)
    for shape in ("tensor<16x4x4x6xf16>", "tensor<16x2x3x4x4xf16>"):
        assert shape in first and shape not in second
    products = [t.count("stablehlo.dot_general") for t in (second, text(plain, plain.steps[0]))]
    assert products[0] == products[1] < first.count("stablehlo.dot_general")


def test_the_step_of_the_stop_is_the_releases(data):
    """Aligned updates are those before `early_stop_point` (correction 8)."""
    ref = Reference(REFERENCE / "haste" / "haste.npz")
    stop = int(ref["stop/early_stop_point"])
    program = programs(data, TERMS, ((stop, WEIGHTS), (2 * stop, {})))
    aligned = [bool(program.step(int(done)).fields) for done in ref["stop/global_step"]]
    assert aligned == ref["stop/aligned"].tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("repa:layer=1,dims=5,hidden=8", r"field teacher has shape \(4, 4, 6\) .* set dims"),
        ("repa:layer=2,dims=6", "repa: layer 2 of a model with 1 blocks"),
        ("haste:layers=0,teacher=2", "with at least 3 layers"),
        ("haste:layers=1,teacher=0", "haste: layer 1 of a model with 1 blocks"),
        ("haste:layers=0,teacher=0,field=teacher", "a square grid, without a class token"),
    ],
)
def test_terms_that_do_not_fit_are_refused_before_a_step(data, words, settings):
    with pytest.raises(InputError, match=words):
        program = programs(data, (settings,), ((6, {settings.partition(":")[0]: 1.0}),))
        text(program, program.steps[0])


def test_fields_must_be_named(data, monkeypatch):
    monkeypatch.setitem(globals(), "FIELDS", FIELDS[:1])
    with pytest.raises(InputError, match="haste reads the field teacher_attention, "):
        programs(data, TERMS, ((STOP, WEIGHTS), (STEPS, {})))
