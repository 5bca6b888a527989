"""Runs and latent caches that earlier versions wrote: they load, resume and train."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.data.cache import CacheSource
from tests import commands

RUNS = commands.ROOT / "tests" / "reference" / "runs"
OPTIONS = ("--config.optim.schedule=constant", "--config.train.save_every=4")


@pytest.mark.long
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    shutil.unpack_archive(RUNS / "run.zip", tmp_path / "old")
    assert pf.load(tmp_path / "old").sample(2).latents.shape == (2, 8, 8, 1)
    for folder in ("old", "new"):
        code, out, err = commands.train(tmp_path / folder, *OPTIONS)
        assert code == 0, err
        assert ("continuing from step 4" in out) == (folder == "old"), out
    for which in ("params", "ema"):
        old, new = (commands.weights(tmp_path / folder, which) for folder in ("old", "new"))
        assert old.keys() == new.keys()
        for name in old:  # equal bits are for one kind of processor
            np.testing.assert_allclose(old[name], new[name], atol=1e-5, err_msg=name)


@pytest.mark.long
def test_a_cache_is_read_and_trained_on(tmp_path):
    shutil.unpack_archive(RUNS / "cache.zip", tmp_path / "cache")
    source = CacheSource(str(tmp_path / "cache"))
    assert len(source) == 16 and source.classes() is None
    args = ("--config.data.source=cache", f"--config.data.path={tmp_path}/cache")
    args += ("--config.data.space=latents", "--config.model.channels=4")
    args += ("--config.model.latent_size=4", "--config.train.steps=1")
    code, _, err = commands.train(tmp_path / "run", *args, variant=":sit")
    assert code == 0, err
