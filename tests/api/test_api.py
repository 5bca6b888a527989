"""The library as a notebook uses it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import ppflow_jax as pf
from tests import commands
from tests.compilations import compilations


@pytest.fixture(scope="module")
def run(small_run):
    return small_run


@pytest.fixture(scope="module")
def model(run):
    return pf.load(run)


def test_a_model_samples_what_the_command_samples(run, model, tmp_path):
    flags = (f"--checkpoint={run}", f"--out={tmp_path}/out", "--num=6", "--cfg=1,2", "--steps=4")
    code, _, err = commands.run("sample", *flags, "--seed=7", "--save_latents")
    assert code == 0, err
    ours = model.sample(6, plan=model.plan(steps=4, cfg=(1, 2)), seed=7)
    np.testing.assert_array_equal(ours.latents, np.load(tmp_path / "out" / "latents.npy"))
    theirs = np.load(tmp_path / "out" / "samples.npz")
    np.testing.assert_array_equal(ours.pictures, theirs["arr_0"])
    assert ours.labels.tolist() == theirs["arr_1"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("accelerate", ["exact", "forecast.interval=2,forecast.order=1"])
def test_other_numbers_compile_nothing(model, accelerate):
    def plan(cfg):
        return model.plan(steps=8, cfg=cfg, accelerate=accelerate)

    first = model.sample(4, plan=plan(2.0))
    model.sample(noise=first.latents, plan=plan(2.0), labels="uniform")
    with compilations() as found:
        other = model.sample(4, plan=plan(3.5))
        model.sample(4, plan=plan((1.5, 7)), labels=[3, 1], seed=2**32 - 1)
        model.sample(noise=other.latents, plan=plan(2), labels="uniform", seed=5)
        again = model.sample(4, plan=plan(2.0))
    assert not found
    assert (other.latents != first.latents).any()
    np.testing.assert_array_equal(again.latents, first.latents)
    with compilations() as found:
        model.sample(4, plan=plan((1, 3)))  # the first stage is no longer guided
    assert found


def test_a_trajectory_ends_with_the_sample(model):
    plan = model.plan(steps=4, cfg=2)
    states = model.trajectory(3, plan=plan, labels=4, seed=1)
    assert states.shape == (len(plan.times), 3, 8, 8, 1) and plan.nfe == 8
    final = model.sample(3, plan=plan, labels=4, seed=1).latents
    np.testing.assert_allclose(states[-1], final, atol=1e-5)


def test_velocity_and_prediction(model):
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    v = model.velocity(x, 0.3, [1, 2])
    np.testing.assert_array_equal(v, model(x, 0.3, [1, 2]))  # it predicts velocities
    np.testing.assert_array_equal(model(x, np.float32([0.6, 0.9]), 3), model(x, [0.6, 0.9], 3, 1))
    assert np.abs(np.asarray(model(x, 0.3, 1) - model(x, 0.3, 1, stage=1))).max() > 0
    assert model.log_likelihood(x, [1, 2], steps=4).shape == (2,)


def test_a_plan_is_explained(model):
    plan = model.plan(steps=10, cfg=(1, 3), accelerate="balanced")
    assert plan.nfe == 5
    assert "faster by FLOPs" in plan.explain(batch=4) and str(plan)
    assert plan.times[0] == 0 and plan.times[-1] == 1


def test_a_pytorch_file_is_a_model(run, model, tmp_path):
    file = tmp_path / "m.safetensors"
    args = (f"--source={run}", "--to=safetensors", f"--target={file}")
    assert commands.run("convert.__main__", *args)[0] == 0
    reading = pf.Reading(heads=2, space="pixels")
    loaded = pf.load(file, reading=reading)
    ours, theirs = (m.sample(2, plan=m.plan(steps=2)).latents for m in (model, loaded))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(pf.InputError, match="--heads"):
        pf.load(file)


def test_names_and_version():
    assert set(pf.__all__) <= set(dir(pf)) and pf.__version__.count(".") == 2
    for name in pf.__all__:
        assert getattr(pf, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pf.nothing  # noqa: B018


def test_wrong_calls_say_what_to_do(run):
    line = [sys.executable, "-m", "tests.api.wrong_calls", str(run)]
    kept = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, cwd=commands.ROOT, capture_output=True, text=True, env=kept)
    assert done.returncode == 0 and "45 wrong calls, 0 not" in done.stdout, (
        done.stdout + done.stderr
    )


def test_the_script_of_the_docs_runs(run, tmp_path, monkeypatch, capsys):
    text = (commands.ROOT / "docs" / "python.md").read_text()
    script = text.split("```python\n")[1].split("```")[0]
    assert script.count("\n") <= 30
    file = tmp_path / "model.safetensors"
    args = (f"--source={run}", "--to=safetensors", f"--target={file}")
    assert commands.run("convert.__main__", *args)[0] == 0
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.count("faster by FLOPs") == 2
    with Image.open("strip.png") as picture:
        assert picture.size[0] > 1000
