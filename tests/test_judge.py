"""Metrics during training."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ppflow_jax import judge
from ppflow_jax.feature_training import train_features
from ppflow_jax.writers import read_metrics
from tests.commands import train

EVAL = ["--config.eval.every=4", "--config.eval.count=24", "--config.optim.schedule=constant"]


def evaluations(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {r["step"]: r for r in rows if "eval_small_features/fid" in r}


def test_metrics_are_written_beside_the_others(tmp_path, monkeypatch):
    calls = []

    def short(source, seed):
        calls.append(seed)
        return train_features(source, seed=seed, steps=3)

    monkeypatch.setattr(judge, "train_features", short)
    code, out, err = train(tmp_path, *EVAL, "--config.train.steps=5")
    assert code == 0, err
    assert "fid, kid of 24 EMA samples against digits" in out
    assert "not comparable with Inception FID" in out
    found = evaluations(tmp_path)
    assert sorted(found) == [4, 5]  # and at the end
    assert all(np.isfinite(v) for row in found.values() for v in row.values())
    made_by = json.loads((tmp_path / "evaluations" / "step_0000004.json").read_text())
    assert made_by["metrics"]["fid"] == found[4]["eval_small_features/fid"]
    assert made_by["samples"]["count"] == 24 and made_by["reference"]["count"] == 1797
    assert any("not comparable" in note for note in made_by["notes"])
    assert found[4] != found[5]  # of the EMA of that step

    # resumed: the network of the run is taken, and it gives the numbers of the first time
    (tmp_path / "metrics.jsonl").write_text("")
    code, _, err = train(tmp_path, *EVAL, "--config.train.steps=6")
    assert code == 0 and calls == [0], err
    assert sorted(evaluations(tmp_path)) == [6]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.eval.count=1"], "count at least 2"),
        (["--config.eval.every=-1"], "every must be at least 0"),
        (["--config.data.space=latents"], "set config.eval.decode"),
        (["--config.eval.features=nowhere"], "no checkpoint in"),
        (["--config.eval.reference=nowhere"], "does not exist"),
    ],
)
def test_bad_settings_stop_before_the_first_step(tmp_path, args, words):
    code, _, err = train(tmp_path, *EVAL, *args)
    assert code == 1 and words in err.strip().splitlines()[-1]
    assert not read_metrics(tmp_path / "metrics.jsonl")
