"""Metrics during training."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.digits import get_config
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.data.sources import digits
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.metrics.train_small_network import train_features
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.train import validate
from ppflow_jax.train.metrics_log import read_metrics
from tests.commands import run, train

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=16, depth=1, heads=2, num_classes=10)
EVAL = ["--config.eval.every=4", "--config.optim.schedule=constant"]


def labels(count):
    return np.arange(count, dtype=np.int32) % 10


def evaluations(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {r["step"]: r for r in rows if "eval_small_features/fid" in r}


@pytest.mark.long
def test_metrics_are_written_beside_the_others_and_evaluate_finds_the_same(tmp_path, monkeypatch):
    """Whatever the precision of training and its seed; of a mesh: devices/test_processes.py."""
    calls = []

    def short(source, classes, seed):
        calls.append(seed)
        return train_features(source, classes, seed=seed, steps=3)

    monkeypatch.setattr(validate, "train_features", short)
    changes = ["--config.seed=3", "--config.sample.solver=sde-euler", "--config.eval.count=20"]
    code, out, err = train(tmp_path, *EVAL, *changes, "--config.model.dtype=bfloat16")
    assert code == 0 and calls == [0], err
    assert "fid, kid of 20 EMA samples against digits" in out
    assert "not comparable with Inception FID" in out
    found = evaluations(tmp_path)
    assert sorted(found) == [4, 6]  # and at the end
    assert all(np.isfinite(v) for row in found.values() for v in row.values())
    made_by = json.loads((tmp_path / "evaluations" / "step_0000004.json").read_text())
    assert made_by["metrics"]["fid"] == found[4]["eval_small_features/fid"]
    assert made_by["samples"]["count"] == 20 and made_by["reference"]["count"] == 1797
    assert any("not comparable" in note for note in made_by["notes"])
    assert found[4] != found[6]  # of the EMA of that step

    # resumed: the network that the run has is taken
    config = get_config()
    config.eval.every = 4
    card = Card(MODEL, Flow(), "pixels")
    assert validate.make_judge(config, card, digits(), make_mesh(), tmp_path, labels)
    assert calls == [0]

    # and the command, on the checkpoint that this run left
    args = [f"--checkpoint={tmp_path}", "--num=20", "--reference=digits"]
    args += [f"--features={tmp_path / 'features'}", "--metrics=fid,kid", f"--out={tmp_path}/e.json"]
    code, _, err = run("evaluate", *args)
    assert code == 0, err
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["samples"]["card"]["settings"]["steps"] == 2
    for name in ("fid", "kid"):
        assert result["metrics"][name] == found[6][f"eval_small_features/{name}"]
    assert run("evaluate", *args, "--seed=1")[0] == 0
    other = json.loads((tmp_path / "e.json").read_text())
    assert other["metrics"]["fid"] != result["metrics"]["fid"]


@pytest.mark.parametrize(
    ("space", "settings", "words"),
    [
        ("pixels", {"count": 1}, "count at least 2"),
        ("pixels", {"every": -1}, "every must be at least 0"),
        ("latents", {}, r"set config\.eval\.decode"),
        ("pixels", {"features": "nowhere"}, "no checkpoint in"),
        ("pixels", {"reference": "nowhere"}, "does not exist"),
    ],
)
def test_bad_settings_stop_before_the_first_step(tmp_path, space, settings, words):
    config = get_config()
    config.eval.update({"every": 4} | settings)
    card = Card(MODEL, Flow(), space)
    with pytest.raises(InputError, match=words):
        validate.make_judge(config, card, digits(), make_mesh(), tmp_path, labels)
