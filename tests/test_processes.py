"""Two real processes with four fake devices each."""

import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from ppflow_jax.writers import read_metrics
from tests.commands import ROOT, SMALL, train

SHORT = [*SMALL, "--config.train.steps=4", "--config.optim.schedule=constant"]
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def start(arguments_of_each):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(len(arguments_of_each)),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ppflow_jax.main", "--config=configs/digits.py", *arguments],
            cwd=ROOT,
            env=env | {"JAX_PROCESS_ID": str(k)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k, arguments in enumerate(arguments_of_each)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Workdir and outputs of a run of two processes."""
    workdir = tmp_path_factory.mktemp("two")
    both = start([[*SHORT, *MESH, f"--workdir={workdir}"]] * 2)
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return workdir, outputs


def losses(workdir):
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl")]


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
    code, _, error = train(tmp_path, *SHORT, *MESH)
    assert code == 0, error
    assert len(losses(workdir)) == 4
    np.testing.assert_allclose(losses(workdir), losses(tmp_path), rtol=1e-5)


def test_one_process_goes_on_with_another_mesh(two):
    workdir, _ = two
    code, out, err = train(workdir, *SHORT, "--config.train.steps=6", "--config.mesh.fsdp=4")
    assert code == 0 and "going on from step 4" in out, err
    assert len(losses(workdir)) == 6
