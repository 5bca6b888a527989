"""Two real processes with four fake devices each."""

import json
import re

import numpy as np
import pytest

from ppflow_jax.metrics.networks import save_small
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig
from ppflow_jax.train.metrics_log import read_metrics
from tests.commands import SMALL, run, train
from tests.processes import Group

pytestmark = pytest.mark.long
SHORT = [*SMALL, "--config.train.steps=4", "--config.optim.schedule=constant"]
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def start(arguments_of_each):
    group = Group(len(arguments_of_each), devices=4)
    return [group.start(k, "digits.py", *args) for k, args in enumerate(arguments_of_each)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Workdir and outputs of a run of two processes, judged at its end."""
    workdir = tmp_path_factory.mktemp("two")
    net = FeatureNetConfig(8, 1, 10, (8, 16, 12))
    features = workdir.parent / "net"
    save_small(features, net, FeatureNet(net).init(0), {"trained_on": "nothing", "accuracy": 0.1})
    judged = ["--config.eval.every=4", "--config.eval.count=20"]
    judged += [f"--config.eval.features={features}"]
    both = start([[*SHORT, *MESH, *judged, f"--workdir={workdir}"]] * 2)
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return workdir, outputs


def losses(workdir):
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


# What Gloo says on stdout. It writes piece by piece, from several threads at once.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |"
    r"Expected number of connected peer ranks is : |\d|\n"
)


def test_two_processes_train_as_one(two, tmp_path):
    workdir, ((out, _), (other, err)) = two
    assert "parameters; stages" in out and GLOO.sub("", other) == ""  # only process 0 speaks
    assert "img/s" not in err
    assert (workdir / "samples" / "step_0000004.png").exists()
    code, _, error = train(tmp_path, *SHORT, *MESH, "--config.train.save_every=4")
    assert code == 0, error
    assert len(losses(workdir)) == 4
    np.testing.assert_allclose(losses(workdir), losses(tmp_path), rtol=1e-5)


def test_what_two_processes_measure_one_measures_again(two):
    """Of an EMA that was cut among them."""
    workdir, _ = two
    features, out = workdir.parent / "net", workdir / "again.json"
    args = [f"--checkpoint={workdir}", "--num=20", "--reference=digits", f"--features={features}"]
    code, _, err = run("evaluate", *args, "--metrics=fid,kid", f"--out={out}")
    assert code == 0, err
    rows = read_metrics(workdir / "metrics.jsonl")
    (online,) = (r["eval_small_features/fid"] for r in rows if "eval_small_features/fid" in r)
    assert online == pytest.approx(json.loads(out.read_text())["metrics"]["fid"], rel=1e-4)


def test_a_bad_example_in_the_rows_of_one_process_ends_both(tmp_path):
    x = np.zeros((16, 8, 8, 1), np.float32)  # a batch is an epoch
    x[5, 0, 0, 0] = np.nan
    np.save(tmp_path / "latents.npy", x)
    np.save(tmp_path / "labels.npy", np.arange(16) % 10)
    data = [f"--config.data.path={tmp_path}", "--config.data.source=arrays"]
    both = start([[*SHORT, *MESH, *data, f"--workdir={tmp_path / 'run'}"]] * 2)
    said = "".join(process.communicate(timeout=600)[1] for process in both)
    assert all(process.returncode for process in both)
    assert said.count("example 5 (label 5)") == 1 and "x has 1 of 64 values that are NaN" in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_one_process_goes_on_with_another_mesh(two):
    workdir, _ = two
    code, out, err = train(workdir, *SHORT, "--config.train.steps=5", "--config.mesh.fsdp=4")
    assert code == 0 and "continuing from step 4" in out, err
    assert len(losses(workdir)) == 5
