"""Trackers beside the files of a run: each library for real, without an account or a network."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from PIL import Image

from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.train import trackers as module
from ppflow_jax.train.metrics_log import MetricWriter
from ppflow_jax.train.trackers import (
    FILE,
    PROJECT,
    TRACKERS,
    check_place,
    check_trackers,
    open_trackers,
)
from tests import buckets, commands

EXPERIMENT = {"seed": 3, "optim": {"lr": 0.001, "name": "muon"}}


def needs(name):
    there = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not there, reason=f"the extra {name} is not installed")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    workdir = tmp_path / "my-run"
    workdir.mkdir()
    Image.new("L", (8, 8), 77).save(workdir / "grid.png")
    return workdir


def killed_and_resumed(workdir, name):
    """Steps 1 to 4 of a run that was killed after step 3, with its checkpoint at step 2."""
    writer = MetricWriter(workdir, 0, open_trackers((name,), workdir, EXPERIMENT))
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step, "loss/stage0": 2.0 * step})
    writer.picture(3, workdir / "grid.png")
    writer.close()  # of the libraries, that they have written
    first = (workdir / FILE).read_text()
    writer = MetricWriter(workdir, 2, open_trackers((name,), workdir, EXPERIMENT))
    for step in (3, 4):
        writer.write(step, {"loss": 1 / step, "loss/stage0": 2.0 * step})
    writer.write(4, {"eval/fid": 12.5})
    writer.picture(4, workdir / "grid.png")
    writer.close()
    assert (workdir / FILE).read_text() == first
    return json.loads(first)


@needs("mlflow")
def test_mlflow(offline):
    from mlflow import MlflowClient

    known = killed_and_resumed(offline, "mlflow")
    client = MlflowClient(f"sqlite:///{offline}/mlflow.db")
    run = client.get_run(known["mlflow"])
    kind = client.get_experiment_by_name(PROJECT).experiment_id
    assert [r.info.run_id for r in client.search_runs([kind])] == [known["mlflow"]]
    assert run.info.run_name == "my-run" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "optim.lr": "0.001", "optim.name": "muon"}

    def history(name):
        return [(p.step, p.value) for p in client.get_metric_history(known["mlflow"], name)]

    assert history("loss") == [(s, pytest.approx(1 / s)) for s in (1, 2, 3, 4)]
    assert history("loss/stage0") == [(s, 2.0 * s) for s in (1, 2, 3, 4)]
    assert history("eval/fid") == [(4, 12.5)]
    assert client.list_artifacts(known["mlflow"], "samples")[0].path == "samples/grid.png"
    config = client.download_artifacts(known["mlflow"], "config.json")
    assert json.loads(Path(config).read_text()) == EXPERIMENT


@needs("trackio")
def test_trackio(offline):
    import trackio

    # The library reads TRACKIO_DIR when it is imported, as for a user; here others may have been.
    known = killed_and_resumed(offline, "trackio")
    name = f"my-run-{known['id']}"
    runs = {run.name: run for run in trackio.Api().runs(PROJECT)}
    assert runs[name].config["optim"] == EXPERIMENT["optim"]
    rows = trackio.SQLiteStorage.get_logs(PROJECT, name)
    found = {key: [(r["step"], r[key]) for r in rows if key in r] for key in ("loss", "eval/fid")}
    assert found["loss"] == [(s, pytest.approx(1 / s)) for s in (1, 2, 3, 4)]
    assert found["eval/fid"] == [(4, 12.5)]
    grids = [r["samples"] for r in rows if "samples" in r]
    assert len(grids) == 2
    folder = Path(trackio.utils.MEDIA_DIR) / PROJECT
    assert Image.open(next(folder.rglob("*.png"))).getpixel((0, 0)) == 77


def records(path):
    """What wandb wrote in a file: records of its own type in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    data, start, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while start + 7 <= len(data):
        if 32768 - start % 32768 < 7:  # the rest of a block
            start += 32768 - start % 32768
            continue
        size, kind = struct.unpack("<HB", data[start + 4 : start + 7])
        parts += data[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@needs("wandb")
def test_wandb(offline):
    known = killed_and_resumed(offline, "wandb")
    files = sorted((offline / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.stem for path in files] == [f"run-{known['id']}"] * len(files) and files
    every = [record for path in files for record in records(path)]
    runs = [record.run for record in every if record.HasField("run")]
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {
        (known["id"], PROJECT, "my-run")
    }
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["seed"] == 3 and config["optim"] == EXPERIMENT["optim"]
    found: dict[tuple[int, str], float] = {}
    for record in every:
        items = record.history.item
        row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
        found |= {(row["_step"], k): v for k, v in row.items() if not k.startswith("_")}
    assert {s: v for (s, k), v in found.items() if k == "loss"} == {
        s: pytest.approx(1 / s) for s in (1, 2, 3, 4)
    }
    assert found[4, "eval/fid"] == 12.5
    assert any(key.startswith("samples") for _, key in found)
    picture = next((offline / "wandb").rglob("media/images/samples_3*.png"))
    assert Image.open(picture).getpixel((0, 0)) == 77


class FakeMLflow:
    """The package mlflow with one run in memory; it takes 100 settings at once."""

    def __init__(self):
        self.runs, self.params, self.points, self.state = [], {}, [], ""
        self.entities = SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a)
        self.MlflowClient = lambda uri: self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, place):
        return "1"

    def create_run(self, kind, run_name):
        self.runs.append(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(self.runs)}"))

    def update_run(self, run, status):
        assert run == "id1"
        self.state = status

    def log_batch(self, run, params=(), metrics=()):
        assert run == "id1" and len(params) <= 100 and not set(dict(params)) & set(self.params)
        self.params |= dict(params)
        self.points += [(name, step) for name, _, _, step in metrics]

    def get_metric_history(self, run, name):
        return [SimpleNamespace(step=step) for found, step in self.points if found == name]

    def log_dict(self, *args):
        pass

    log_artifact = log_dict

    def set_terminated(self, run):
        self.state = "FINISHED"


def test_mlflow_is_told_every_step_and_setting_once(offline, monkeypatch):
    fake, many = FakeMLflow(), {"model": {f"k{n}": n for n in range(250)}}
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", fake.entities)
    monkeypatch.setitem(globals(), "EXPERIMENT", many)
    known = killed_and_resumed(offline, "mlflow")
    assert known["mlflow"] == "id1" and fake.runs == ["my-run"] and fake.state == "FINISHED"
    assert fake.params == {f"model.k{n}": str(n) for n in range(250)}
    losses = [("loss", n) for n in (1, 2, 3, 4)]
    assert [point for point in fake.points if point[0] == "loss"] == losses
    assert [point for point in fake.points if point[0] == "eval/fid"] == [("eval/fid", 4)]


@pytest.fixture
def bucket(offline, tmp_path, monkeypatch):
    """The workdir of a run in an object store, and the folder that the command is run in."""
    monkeypatch.chdir(tmp_path)
    with buckets.gcs() as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)
        workdir = place(f"gs://{buckets.BUCKET}/my-run")
        (workdir / "grid.png").upload(offline / "grid.png")
        yield workdir


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in TRACKERS])
def test_a_workdir_in_a_bucket(bucket, name, tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    if name == "wandb":
        import wandb

        wandb.teardown()  # which remembers in which folder it was first used
    known = killed_and_resumed(bucket, name)
    said = capsys.readouterr().err
    assert f"{name} keeps its files on this machine, in " in said and f"go to {bucket}" in said
    assert not list(bucket.rglob(f"*{name}*")) and (bucket / "metrics.jsonl").exists()
    if name == "wandb":
        found = list((tmp_path / "wandb").glob(f"offline-run-*/run-{known['id']}.wandb"))
        assert found and str(found[0].parent.parent) in said
    elif name == "mlflow":
        from mlflow import MlflowClient

        history = MlflowClient(uri).get_metric_history(known["mlflow"], "loss")
        assert [point.step for point in history] == [1, 2, 3, 4] and uri in said
    else:
        import trackio

        rows = trackio.SQLiteStorage.get_logs(PROJECT, f"my-run-{known['id']}")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_a_database_in_a_bucket_is_refused(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_place(("mlflow",), "runs/b2")
    check_place(("wandb",), "gs://bucket/b2")
    with pytest.raises(InputError, match="which gs://bucket/b2 cannot hold: set MLFLOW_TRACKING"):
        check_place(("wandb", "mlflow"), "gs://bucket/b2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    check_place(("mlflow",), "gs://bucket/b2")


def test_where_one_keeps_its_files_is_said(monkeypatch, tmp_path, capsys):
    there = SimpleNamespace(name="wandb", where="/data/wandb", scalars=0, picture=0, close=0)
    monkeypatch.setitem(module.TRACKERS, "wandb", lambda *_: there)
    monkeypatch.setattr(module, "is_object", lambda path: "bucket" in str(path))
    for workdir, count in ((tmp_path / "bucket", 1), (tmp_path / "disk", 0)):
        workdir.mkdir()
        assert open_trackers(("wandb",), workdir, {}) == (there,)
        assert (
            capsys.readouterr().err.count("wandb keeps its files on this machine, in /data/")
            == count
        )


def test_one_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(InputError, match=rf"pip install 'ppflow_jax\[{name}\]'"):
            check_trackers((name,))
    code, _, err = commands.train(tmp_path / "run", "--config.train.trackers=('wandb',)")
    assert code == 1 and "pip install 'ppflow_jax[wandb]'" in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_of_logs_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    only = functools.partial(importlib.machinery.PathFinder.find_spec, path=[str(tmp_path)])
    monkeypatch.setattr(module, "find_spec", only)
    with pytest.raises(InputError, match="is not installed"):
        check_trackers(("wandb",))


@pytest.mark.parametrize(
    ("names", "words"),
    [(("neptune",), "unknown 'neptune', expected some of wandb, mlflow"), (("x", "x"), "unknown")],
)
def test_unknown_names(names, words):
    with pytest.raises(InputError, match=words):
        check_trackers(names)


def test_one_that_does_not_open_is_said(monkeypatch, tmp_path):
    def broken(workdir, known, experiment):
        raise RuntimeError("no key")

    monkeypatch.setitem(module.TRACKERS, "wandb", broken)
    with pytest.raises(InputError, match=r"\(no key\): log in .wandb login., or set WANDB_MODE"):
        open_trackers(("wandb",), tmp_path, {})
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match="mend it, or remove it"):
        open_trackers(("wandb",), tmp_path, {})
