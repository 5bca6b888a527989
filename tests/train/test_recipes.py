"""docs/recipes.md: one run with Muon, wsd, steps left out, post-hoc EMA and a tracker.

It is made whole, and in pieces: without the step that is left out, stopped, and resumed.
"""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.files.store import find_checkpoint, load_stored, stored_tree
from ppflow_jax.report import page
from ppflow_jax.report.run import open_runs
from ppflow_jax.train import trackers
from ppflow_jax.train.metrics_log import read_metrics
from ppflow_jax.train.posthoc import POSTHOC
from tests import commands
from tests.train.test_train import at_call, same

BAD = 21  # the example that no step survives
SKIP = "--config.train.skip_nonfinite=1"
RECIPES = (
    *("--config.optim.name=muon", "--config.optim.schedule=wsd_sqrt"),
    *("--config.optim.decay_share=0.5", "--config.optim.warmup_steps=1"),
    *("--config.train.posthoc_ema=(0.05,0.1)", "--config.train.trackers=('fake',)"),
    *("--config.train.steps=4", "--config.sample.count=1", "--config.sample.steps=1"),
)


class Fake:
    """A tracker that notes what it is told, and breaks at the step `breaks`."""

    name, where, breaks = "fake", "", 0

    def __init__(self, workdir, known, experiment):
        known.setdefault("fake", "its own id")
        self.told, self.experiment = workdir / "told.txt", experiment

    def note(self, what):
        with self.told.open("a") as file:
            file.write(f"{what}\n")

    def scalars(self, step, values):
        if step == Fake.breaks:
            raise ConnectionError("the wire was cut")
        self.note(f"{step} {values['loss'] if 'loss' in values else ''}")

    def picture(self, step, path):
        assert path.exists()
        self.note(f"{step} {path.name}")

    def close(self):
        self.note("closed")


@pytest.fixture(scope="module", autouse=True)
def tracker():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trackers.TRACKERS, "fake", Fake)
        patch.setattr(trackers, "find_spec", lambda name: SimpleNamespace(origin="somewhere"))
        yield


def data(path, bad=(BAD,)):
    path.mkdir()
    x = np.random.default_rng(0).normal(size=(60, 8, 8, 1)).astype(np.float32)
    x[list(bad)] = 1e30
    np.save(path / "latents.npy", x)
    np.save(path / "labels.npy", np.arange(60) % 10)
    return path


def train(workdir, source, *args):
    given = ["--config.data.source=arrays", f"--config.data.path={source}", *RECIPES, *args]
    return commands.train(workdir, *given, variant=":sit")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of the run, its data, what it said)"""
    root = tmp_path_factory.mktemp("recipes")
    source = data(root / "data")
    code, out, err = train(root / "run", source, SKIP)
    assert code == 0 and "done: step 4" in out, err
    return root / "run", source, err


def counts(workdir):
    folder = find_checkpoint(workdir)
    stored = load_stored(folder, {"skipped": stored_tree(folder)["skipped"]})["skipped"]
    return {name: int(value) for name, value in stored.items()}


def snapshots(folder):
    return sorted(str(p.relative_to(folder / POSTHOC)) for p in (folder / POSTHOC).glob("*/*"))


def state_of(workdir):
    folder = find_checkpoint(workdir)
    return load_stored(folder, stored_tree(folder))


def test_a_step_that_is_left_out_is_told(whole):
    folder, source, err = whole
    rows = read_metrics(folder / "metrics.jsonl")
    (note,) = [row for row in rows if "not_finite" in row]
    assert BAD in note["examples"] and len(note["examples"]) == 16 and note["skipped"] == 1
    assert note["step"] == 2 and {"loss", "grad_norm"} <= set(note["not_finite"])
    assert counts(folder) == {"total": 1, "row": 0}
    assert re.search(r"step 2 is left out, .*loss.* not finite .1 in a row, at most 1; 1 in", err)
    assert f"example {BAD} (label {BAD % 10}) of {source}" in err
    logged = [row for row in rows if "lr" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    # the optimizer has done one step less: warm-up of one, then the decay from step 2 on
    rates = [row["lr"] for row in logged]
    assert rates == pytest.approx([0, 0, 1e-3, 1e-3], rel=1e-5)


def test_the_report_draws_what_is_a_number(whole):
    text = page._curves(open_runs([str(whole[0])]))
    assert text.count("<figcaption>skipped<") == 1 and "<figcaption>loss<" in text
    assert "examples<" not in text and "not_finite<" not in text


def test_a_run_keeps_averages_that_every_reader_loads(whole):
    folder = whole[0]
    expected = [f"{s}/step_000000{n}" for s in (0.05, 0.1) for n in (2, 4)]
    assert snapshots(folder) == expected
    early, late = (commands.weights(folder / POSTHOC / expected[n], "ema") for n in (0, 1))
    assert not same(early, late)
    assert pf.load(folder / POSTHOC / expected[-1]).sample(1).latents.shape == (1, 8, 8, 1)
    path = folder / POSTHOC / "0.1" / "step_0000004" / "checkpoints/0/config/metadata"
    assert json.loads(path.read_text())[POSTHOC] == {"sigma_rel": 0.1, "updates": 3}


@pytest.mark.long
def test_in_pieces_it_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    folder, source, _ = whole
    run = tmp_path / "run"
    # without the setting it ends at the step, with it goes on from the checkpoint before
    code, _, err = train(run, source, "--config.train.save_every=1")
    assert code == 1 and "not finite at step 2; the checkpoint of step 1 is good" in err
    known = json.loads((run / trackers.FILE).read_text())
    assert known["fake"] == "its own id" and len(known["id"]) == 8
    monkeypatch.setattr(Fake, "breaks", 3)
    at_call(monkeypatch, "to_global", 2)
    code, out, err = train(run, source, SKIP)
    assert code == 75 and "train.skip_nonfinite: 0 -> 1" in out, err
    assert err.count("fake failed at step 3 (the wire was cut): the run goes on without it") == 1
    monkeypatch.undo()
    # as one that was killed between averages and checkpoint, or while it wrote averages
    assert counts(run) == {"total": 1, "row": 0}
    for name in ("0.05/step_0000004", "0.1/.step_0000004.123.partial"):
        (run / POSTHOC / name).mkdir()
        (run / POSTHOC / name / "mark").touch()
    code, out, err = train(run, source, SKIP)
    assert code == 0 and "continuing from step 3" in out, err
    leaves = [jax.tree_util.tree_leaves_with_path(state_of(path)) for path in (run, folder)]
    assert len(leaves[0]) > 100
    for (name, ours), (other, theirs) in zip(*leaves, strict=True):
        assert name == other
        np.testing.assert_array_equal(ours, theirs, err_msg=str(name))
    shutil.rmtree(run / POSTHOC / "0.05" / "step_0000001")
    shutil.rmtree(run / POSTHOC / "0.1" / "step_0000001")
    assert snapshots(run) == snapshots(folder)
    for name in snapshots(run):
        assert same(*(commands.weights(f / POSTHOC / name, "ema") for f in (run, folder)))
    losses = [
        [r["loss"] for r in read_metrics(f / "metrics.jsonl") if "loss" in r] for f in (run, folder)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert json.loads((run / trackers.FILE).read_text()) == known
    told = [line.split() for line in (run / "told.txt").read_text().splitlines()]
    assert [line[0] for line in told] == ["1", "closed", "2", "4", "4", "closed"]
    assert told[4] == ["4", "step_0000004.png"] and float(told[3][1]) == losses[0][-1]

    # what would change the arrays is refused, leaving steps out may end
    refused = {
        "optim.name=adamw": "the state of another optimizer (optim.name: muon -> adamw)",
        "train.posthoc_ema=(0.2,)": "other averages (train.posthoc_ema: [0.05, 0.1] -> ",
    }
    for arg, words in refused.items():
        code, _, err = train(run, source, f"--config.{arg}", "--config.resume_changed=true")
        assert code == 1 and f"holds {words}" in err and "--config.init_from" in err
    code, out, err = train(run, source, "--config.train.steps=5", "--config.resume_changed=true")
    assert "train.skip_nonfinite: 1 -> 0" in out and "continuing from step 4" in out, err


def test_too_many_in_a_row_end_the_run(tmp_path):
    source = data(tmp_path / "data", range(60))
    code, _, err = train(tmp_path / "run", source, SKIP)
    line = err.strip().splitlines()[-1]
    assert code == 1 and "at step 2, 2 steps in a row (config.train.skip_nonfinite=1)" in line
    assert str(source) in line


def convert(source, target, *args):
    return commands.run("convert", f"--source={source}", f"--target={target}", *args)


def test_the_command_makes_an_average_of_another_length(whole, tmp_path):
    code, out, err = convert(whole[0], tmp_path / "a", "--posthoc_ema=0.1")
    assert code == 0 and "sigma_rel 0.1 after 3 updates, of 4 averages" in out, err
    ours = commands.weights(tmp_path / "a", "ema")
    theirs = commands.weights(whole[0] / POSTHOC / "0.1" / "step_0000004", "ema")
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-7, err_msg=name)
    code, out, err = convert(whole[0], tmp_path / "b", "--posthoc_ema=0.25")
    assert code == 0 and "that is far: the run kept sigma_rel 0.05, 0.1" in out, err
    code, out, err = commands.run(
        "sample", f"--checkpoint={tmp_path}/b", f"--out={tmp_path}/s", "--num=1", "--steps=1"
    )
    assert code == 0 and "the weights that the run began with" not in out, err


def test_what_the_command_refuses(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    for source, args, words in (
        (tmp_path, ["--posthoc_ema=0.1"], "train with --config.train.posthoc_ema"),
        (run, ["--posthoc_ema=0.5"], "in (0, 0.28]"),
        (run, ["--posthoc_ema=0.1", "--merge"], "in a second command"),
        (run, ["--posthoc_ema=0.1", "--to=torch"], "in a second command"),
    ):
        code, _, err = convert(source, tmp_path / "x", *args)
        assert code == 1 and words in err and err.strip().count("\n") == 0, err
    state = next((run / POSTHOC / "0.05" / "step_0000002").glob("checkpoints/0/state/d/*"))
    state.write_bytes(b"x" * state.stat().st_size)
    code, _, err = convert(run, tmp_path / "x", "--posthoc_ema=0.07")
    assert code == 1 and "step_0000002" in err and "damaged" in err, err
    assert not (tmp_path / "x").exists()
