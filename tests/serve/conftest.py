"""A small trained model for all tests of the service."""

import pytest

import ppflow_jax as pf
from tests import commands


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "run"
    code, _, err = commands.train(folder)
    assert code == 0, err
    return folder


@pytest.fixture(scope="session")
def model(run):
    return pf.load(run)
