"""A small trained model for all tests of the service."""

import pytest

import ppflow_jax as pf


@pytest.fixture(scope="session")
def run(small_run):
    return small_run


@pytest.fixture(scope="session")
def model(run):
    return pf.load(run)
