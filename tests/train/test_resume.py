"""Going on with a run under settings that are not its own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ppflow_jax.data.sources import ArraySource, open_source
from ppflow_jax.files import checksums
from ppflow_jax.files.store import CONFIG, EXEMPT, find_checkpoint
from ppflow_jax.train.metrics_log import read_metrics
from ppflow_jax.train.resume import changes
from tests import commands
from tests.commands import weights
from tests.pictures import folder

CONSTANT = "--config.optim.schedule=constant"


def written(root, name, labels=range(60), scale=1.0, dtype=np.float32):
    """A folder of 60 random examples."""
    path = root / name
    path.mkdir(parents=True)
    x = np.random.default_rng(0).normal(size=(len(labels), 8, 8, 1)) * scale
    np.save(path / "latents.npy", x.astype(dtype))
    np.save(path / "labels.npy", np.array(labels) % 10)
    return path


def start(workdir, *args, steps=2, data=None):
    more = [f"--config.data.path={data}", "--config.data.source=arrays"] if data else []
    args = [CONSTANT, f"--config.train.steps={steps}", *more, *args]
    return commands.train(workdir, *args, variant=":sit")  # of one stage: compiling is its time


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Step 2 of a run on `data`."""
    root = tmp_path_factory.mktemp("resume")
    code, out, err = start(root / "run", data=written(root, "data"))
    assert code == 0 and "changed since" not in out, err
    return root


@pytest.fixture
def copy(begun, tmp_path):
    return shutil.copytree(begun / "run", tmp_path / "run")


def contents(workdir):
    files = (p for p in workdir.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(workdir): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def history(workdir):
    return json.loads((workdir / "config.json").read_text())["history"]


def refused(result, *words):
    code, _, err = result
    assert code == 1 and len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err
    return err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["seed=1"], "seed: 0 -> 1"),
        (["optim.lr=0.01"], "optim.lr: 0.001 -> 0.01"),
        (["optim.warmup_steps=7"], "optim.warmup_steps: 50 -> 7"),
        (["optim.clip=1.0"], "optim.clip: 0.0 -> 1.0"),
        (["data.batch_size=32"], "data.batch_size: 16 -> 32"),
        (["data.flip=false"], "data.flip: true -> false"),
        (["data.label_feature=other"], "data.label_feature: label -> other"),
        (["flow.label_drop=0.2"], "flow.label_drop: 0.1 -> 0.2"),
        (["flow.stage_times=((0,0.5),)"], "flow.stage_times: [] -> [[0, 0.5]]"),
        (["train.ema=0.9"], "train.ema: 0.99 -> 0.9"),
        (["train.ema_warmup=false"], "train.ema_warmup: true -> false"),
        (["model.dtype=bfloat16"], "model.dtype: float32 -> bfloat16"),
        (["optim.schedule=cosine"], "optim.schedule: constant -> cosine"),
        (["optim.schedule=cosine", "train.steps=8"], "train.steps: 2 -> 8"),
        (["seed=1", "optim.lr=0.01", "sample.count=4"], "(seed: 0 -> 1, optim.lr: 0.001 -> 0.01)"),
        (["model.width=32", "seed=1"], "another model (width: 16 -> 32, seed: 0 -> 1)"),
    ],
)
def test_what_changes_the_numbers_is_refused_in_one_line(begun, args, said):
    workdir, before = begun / "run", contents(begun / "run")
    flags = [f"--config.{arg}" for arg in args]
    err = refused(start(workdir, *flags, steps=4, data=begun / "data"), said)
    assert "another model" in err or "--config.resume_changed=true" in err
    assert contents(workdir) == before


@pytest.mark.long
def test_what_leaves_the_numbers_is_said(begun, copy):
    said = {
        "sample.steps=3": "sample.steps: 2 -> 3",
        "sample.cfg=(1.0,)": "sample.cfg: [2.0] -> [1.0]",
        "train.save_every=4": "train.save_every: 2 -> 4",
        "mesh.data=2": "mesh.data: -1 -> 2",
        "mesh.fsdp=2": "mesh.fsdp: 1 -> 2",
        "mesh.tensor=2": "mesh.tensor: 1 -> 2",
        "model.remat=full": "model.remat: none -> full",
        "train.accumulate=2": "train.accumulate: 1 -> 2",
        "init_from=nowhere": 'init_from: "" -> nowhere',
    }
    flags = [f"--config.{arg}" for arg in said]
    code, out, err = start(copy, *flags, steps=3, data=begun / "data")
    assert code == 0 and "changed since step 2: " in out, err
    assert all(change in out for change in said.values()), out
    assert "train.steps: 2 -> 3" in out and "continuing from step 2" in out
    assert [entry["from_step"] for entry in history(copy)] == [0, 2]


@pytest.mark.long
def test_the_schedule_of_the_steps_that_are_left(small_sit, tmp_path):
    """A longer cosine would lift the learning rate; one that ends here changes nothing."""
    run, longer = shutil.copytree(small_sit, tmp_path / "run"), "--config.train.steps=8"
    refused(commands.train(run, longer, variant=":sit"), "train.steps: 6 -> 8")
    code, out, _ = commands.train(run, longer, "--config.resume_changed=true", variant=":sit")
    assert code == 0 and "changed since step 6: train.steps: 6 -> 8" in out
    # neither needs the word again
    code, out, _ = commands.train(run, longer, variant=":sit")
    assert code == 0 and "changed" not in out and "done: step 8" in out


@pytest.mark.long
def test_settings_that_were_accepted_are_the_next_of_the_history(begun, copy):
    data = begun / "data"
    first = history(copy)
    assert [e["from_step"] for e in first] == [0] and first[0]["experiment"]["optim"]["lr"] == 1e-3
    changed = ["--config.optim.lr=0.01", "--config.resume_changed=true"]
    code, out, err = start(copy, *changed, steps=4, data=data)
    assert code == 0 and "changed since step 2: optim.lr: 0.001 -> 0.01" in out, err
    third = read_metrics(copy / "metrics.jsonl")[2]
    assert third["lr"] == pytest.approx(0.01 * 2 / 50)
    assert history(copy)[:1] == first and len(history(copy)) == 2
    before = (copy / "config.json").read_bytes()
    for word in (changed, changed[:1]):  # the same command, and without the word
        code, out, err = start(copy, *word, steps=4, data=data)
        assert code == 0 and "changed" not in out, err
        assert (copy / "config.json").read_bytes() == before
    refused(start(copy, steps=6, data=data), "optim.lr: 0.01 -> 0.001")
    assert start(copy, "--config.resume_changed=true", steps=6, data=data)[0] == 0
    now = json.loads((copy / "config.json").read_text())
    assert [e["from_step"] for e in now["history"]] == [0, 2, 4]
    assert now["history"][-1]["experiment"] == now["experiment"]
    assert now["experiment"]["optim"]["lr"] == 1e-3 and "resume_changed" not in now["experiment"]


def test_data_that_moved_goes_on_and_its_new_place_is_said(begun, copy):
    moved = shutil.copytree(begun / "data", copy.parent / "moved")
    code, out, err = start(copy, steps=3, data=moved)
    assert code == 0, err
    assert f"data.path: {begun / 'data'} -> {moved}" in out
    assert history(copy)[-1]["experiment"]["trained_on"]["name"] == str(moved)
    assert history(copy)[0]["experiment"]["trained_on"]["name"] == str(begun / "data")


def moved_to(path, run):
    """As if `run` had been trained on the data in `path`."""
    stored = find_checkpoint(run)
    edit(stored, lambda e: e["data"].update(path=str(path)))
    edit(stored, lambda e: e["trained_on"].update(name=str(path)))


@pytest.mark.parametrize("place", ["the same", "another"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(labels=range(61)), "trained_on.examples: 60 -> 61"),
        (dict(labels=[*range(59), 0]), "trained_on.labels_sha256"),
        (dict(dtype=np.float16), "trained_on.dtype: float32 -> float16"),
    ],
)
def test_other_data_is_refused_wherever_it_is(tmp_path, begun, copy, other, said, place):
    path = written(tmp_path, "data", **other)
    if place == "the same":
        moved_to(path, copy)
    before = contents(copy)
    refused(start(copy, steps=4, data=path), said, "--config.resume_changed=true")
    assert contents(copy) == before


@pytest.mark.parametrize("place", ["the same", "another"])
def test_other_data_that_was_accepted_is_trained_on(tmp_path, begun, copy, place):
    path, said = written(tmp_path, "data", scale=1.5), "trained_on.some_sha256"
    if place == "the same":
        moved_to(path, copy)
    refused(start(copy, steps=4, data=path), said)
    steps = 4 if place == "another" else 2
    code, out, err = start(copy, "--config.resume_changed=true", steps=steps, data=path)
    assert code == 0 and said in out and f"done: step {steps}" in out, err


def edit(step, change):
    """Change the experiment that a checkpoint holds, as other code would have written it."""
    values = json.loads((step / CONFIG).read_text())
    change(values["experiment"])
    (step / CONFIG).write_text(json.dumps(values))
    checksums.write(step, exempt=EXEMPT)


def test_a_run_that_is_further_is_left_as_it_is(begun, copy):
    shutil.rmtree(copy / "samples")
    before = contents(copy)
    code, out, err = start(copy, "--config.seed=5", steps=1, data=begun / "data")
    assert (code, out.strip()) == (0, "the run is at step 2, train.steps=1: nothing to do"), err
    assert contents(copy) == before
    config = (copy / "config.json").read_bytes()
    code, out, _ = start(copy, steps=2, data=begun / "data")
    assert code == 0 and "done: step 2" in out
    assert (copy / "config.json").read_bytes() == config


@pytest.mark.long
def test_a_run_of_the_code_before_goes_on_as_it_began(begun, tmp_path):
    """Without warm-up of the EMA, by the same command, however often it is given."""
    data, off = begun / "data", "--config.train.ema_warmup=false"
    for name, steps in (("whole", 6), ("old", 2)):
        assert start(tmp_path / name, off, steps=steps, data=data)[0] == 0
    old = tmp_path / "old"

    def older(experiment):
        del experiment["train"]["ema_warmup"]
        for key in ("dtype", "labels_sha256", "some_sha256"):
            del experiment["trained_on"][key]

    edit(find_checkpoint(old), older)
    (old / "config.json").write_text((find_checkpoint(old) / CONFIG).read_text())
    for steps in (4, 6):
        code, out, err = start(old, steps=steps, data=data)
        assert code == 0, err
        assert "older than config.train.ema_warmup and continues with false" in out
        assert "ema_warmup" not in history(old)[-1]["experiment"]["train"]
    ours, whole = weights(old, "ema"), weights(tmp_path / "whole", "ema")
    assert all(np.array_equal(ours[k], whole[k]) for k in whole)
    assert [e["from_step"] for e in history(old)] == [0, 2, 4]


def test_the_checkpoint_is_believed_not_the_file_beside_it(begun, copy):
    config = json.loads((copy / "config.json").read_text())
    config["experiment"]["optim"]["lr"] = 5.0
    (copy / "config.json").write_text(json.dumps(config))
    code, out, err = start(copy, data=begun / "data")
    assert code == 0 and "optim.lr" not in out, err
    for broken in ("{", "[]", '{"experiment": {}, "history": 3}'):
        (copy / "config.json").write_text(broken)
        before = contents(copy)
        refused(start(copy, steps=4, data=begun / "data"), "config.json", "mend it, or move it")
        assert (copy / "config.json").read_text() == broken
        assert contents(copy).keys() == before.keys()


def test_identities_of_pictures_and_caches_are_compared_without_their_place(tmp_path):
    a = open_source("folder", str(folder(tmp_path / "a")), size=16)
    b = open_source("folder", str(folder(tmp_path / "b")), size=16)
    found = changes(dict(trained_on=a.identity()), dict(trained_on=b.identity()), 1)
    assert [(c.name, c.free) for c in found] == [("trained_on.path", True)]

    def cached(pictures):
        return dict(trained_on={"source": "cache", "dataset": pictures.identity(), "flips": "both"})

    found = changes(cached(a), cached(b), 1)
    assert [(c.name, c.free) for c in found] == [("trained_on.dataset.path", True)]
    (tmp_path / "b" / "class1" / "0.JPEG").rename(tmp_path / "b" / "class1" / "new.JPEG")
    renamed = open_source("folder", str(tmp_path / "b"), size=16)
    found = changes(cached(a), cached(renamed), 1)
    assert {c.name for c in found if not c.free} == {"trained_on.dataset.names_sha256"}
    (tmp_path / "b" / "class1" / "new.JPEG").unlink()
    fewer = open_source("folder", str(tmp_path / "b"), size=16)
    found = {c.name for c in changes(cached(a), cached(fewer), 1) if not c.free}
    assert "trained_on.dataset.pictures" in found


def test_what_an_older_identity_does_not_have_is_not_compared():
    source = ArraySource("a", np.zeros((3, 2, 2, 1), np.float32), np.arange(3))
    old = {"trained_on": {"source": "arrays", "name": "b", "examples": 3}}
    found = changes(old, {"trained_on": source.identity()}, 1)
    assert [(c.name, c.free) for c in found] == [("trained_on.name", True)]


def test_settings_that_only_one_side_has_are_said():
    found = changes({"flow": {"old": 1}}, {"flow": {"new": [2]}}, 1)
    assert [str(c) for c in found] == ["flow.new: none -> [2]", "flow.old: 1 -> none"]
    assert all(c.free for c in found)
