"""Wrong inputs: one clear line, exit code 1 or 2, nothing half-written."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import ROOT, run, train

SAMPLE = ["--batch=8", "--steps=2", "--solver=euler"]


@pytest.fixture(scope="module")
def workdir(small_run):
    return small_run


def one_line(result, words, code=1):
    got, out, err = result
    lines = [line for line in err.strip().splitlines() if line]
    assert got == code, (got, err)
    assert len(lines) == 1 and "Traceback" not in err + out, err
    for word in words.split("|"):
        assert word in lines[0], lines[0]


def sample(workdir, out, *args):
    return run("sample", f"--checkpoint={workdir}", f"--out={out}", *SAMPLE, *args)


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["--config.optim.lrr=1"], "unknown key|lrr|Did you mean", 2),
        (["--config.optim.lr=fast"], "optim.lr", 2),
        (["--nonsense=1"], "nonsense", 2),
        (["stray"], "unexpected argument 'stray'", 2),
        (["--config.model.pyramid=3x3@1"], "8 is not divisible by the 3x3 patch", 1),
        (["--config.model.pyramid=2x2"], "cannot read '2x2'", 1),
        (["--config.data.batch_size=17"], "batch of 17|multiple of 16", 1),
        (["--config.data.batch_size=24"], "8 data shard(s)|multiple of 16", 1),
        (["--config.mesh.data=3"], "8 device(s)", 1),
        (["--config.model.num_classes=9"], "labels from 0 to 9", 1),
        (["--config.model.channels=3"], "model expects (8, 8, 3)", 1),
        (["--config.data.source=arrays"], "config.data.path is empty", 1),
        (["--config.init_from=/nowhere"], "no checkpoint in /nowhere", 1),
        (["--config.train.steps=0"], "at least 1", 1),
        (["--config.sample.cfg=(1.0,2.0,3.0)"], "give 1 or 2", 1),
    ],
)
def test_training_refuses(args, words, code, tmp_path):
    target = tmp_path / "run"
    one_line(train(target, *args), words, code)
    assert not (target / "checkpoints").exists() or not list((target / "checkpoints").iterdir())


def test_unknown_variant_of_a_config(tmp_path):
    one_line(train(tmp_path / "run", variant=":sitt"), "unknown variant 'sitt'", 2)


def test_required_flags():
    one_line(run("main"), "--config is required", 2)
    one_line(run("sample", "--checkpoint=x"), "--out is required", 2)


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    one_line(train(tmp_path / "file" / "run"), "cannot write to")
    assert not list(tmp_path.glob("file/*"))


def test_workdir_of_another_model(workdir):
    before = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    one_line(train(workdir, variant=":sit"), "another model|pyramid: 4x4@0.5,2x2@1 -> 2x2@1")
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == before


def test_init_from_another_model(workdir, tmp_path):
    args = f"--config.init_from={workdir}"
    one_line(train(tmp_path, args, variant=":sit"), "init_from|another model|pyramid")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--labels=1,11"], "--labels has 11|0 to 9"),
        (["--labels=one"], "write numbers"),
        (["--cfg=1,2,3"], "3 guidance scales|2 stage(s)"),
        (["--cfg=high"], "--cfg=high"),
        (["--cfg_channels=-1"], "--cfg_channels"),
        (["--steps=0"], "at least 1"),
        (["--steps=1"], "give at least 2"),
        (["--num=0"], "at least 1"),
        (["--num=1000000000000"], "need at least 64,000.0 GB|GB are free"),
        (["--noise=/nowhere.npy"], "cannot read --noise"),
        (["--cfg=1,2", "--cfg_until=0.5,0.9"], "the last one 1"),
        (["--cfg_until=x"], "--cfg_until=x|write e.g."),
        (["--accelerate=warp"], "unknown preset 'warp'|exact, balanced, fast"),
        (["--accelerate=forecast.interval=4", "--solver=dopri5"], "dopri5 chooses its own steps"),
    ],
)
def test_sampling_refuses(workdir, tmp_path, args, words):
    out = tmp_path / "out"
    one_line(sample(workdir, out, *args), words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "(2, 8, 8, 3)|(N, 8, 8, 1)"),
        (np.zeros((2, 8, 8, 1)), "float64"),
        (np.full((2, 8, 8, 1), np.nan, np.float32), "NaN"),
    ],
)
def test_sampling_refuses_bad_noise(workdir, tmp_path, noise, words):
    np.save(tmp_path / "noise.npy", noise)
    one_line(sample(workdir, tmp_path / "out", f"--noise={tmp_path}/noise.npy"), words)
    assert not (tmp_path / "out").exists()


def test_sampling_refuses_what_is_no_checkpoint(tmp_path):
    one_line(sample(tmp_path, tmp_path / "out"), "no checkpoint in")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    one_line(sample(tmp_path, tmp_path / "out"), "damaged or incomplete")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["config", "state", "truncated", "other arrays"])
def test_damaged_checkpoints(workdir, small_sit, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    step = copy / "checkpoints" / "6"
    if damage in ("config", "state"):
        shutil.rmtree(step / damage)
    elif damage == "truncated":
        for file in (step / "state").rglob("*"):
            if file.is_file() and "/d/" in str(file):
                file.write_bytes(file.read_bytes()[:100])
    else:
        shutil.rmtree(step / "state")
        shutil.copytree(small_sit / "checkpoints" / "6" / "state", step / "state")
    one_line(sample(copy, tmp_path / "out"), "damaged or incomplete|6")
    code, _, err = train(copy, "--config.train.steps=8", "--config.resume_changed=true")
    assert code == 1 and "damaged or incomplete" in err and "Traceback" not in err
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_sampling_writes_pictures_and_latents(workdir, tmp_path):
    args = ["--num=12", "--labels=3,5", "--save_latents", "--cfg=1,2", "--solver=heun"]
    code, out, err = sample(workdir, tmp_path, *args)
    assert code == 0, err
    assert "12 images, 4 NFE each" in out
    labels, latents = np.load(tmp_path / "labels.npy"), np.load(tmp_path / "latents.npy")
    assert labels.tolist() == [3, 5] * 6
    assert latents.dtype == np.float32 and latents.shape == (12, 8, 8, 1)
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert names[0] == "000000_class3.png" and len(names) == 12
    picture = np.asarray(Image.open(tmp_path / "images" / names[1]))
    expected = np.clip(127.5 * latents[1, ..., 0] + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(picture, expected)
    assert Image.open(tmp_path / "grid.png").size == (10 * 66, 2 * 66)


def test_a_plan_is_explained_and_nothing_sampled(workdir, tmp_path):
    forecast = "--accelerate=forecast.interval=2,forecast.order=1"
    args = [forecast, "--steps=12", "--cfg=1,2", "--explain"]
    code, out, err = sample(workdir, tmp_path / "out", *args)
    assert code == 0, err
    assert "0.500-1.000" in out and "x faster by FLOPs" in out and "MiB" in out
    assert not (tmp_path / "out").exists()


def test_a_network_guided_by_itself_is_unguided(workdir, tmp_path):
    for name, args in {"plain": [], "guided": ["--cfg=1,3", f"--weak={workdir}"]}.items():
        code, _, err = sample(workdir, tmp_path / name, "--num=4", "--save_latents", *args)
        assert code == 0, err
    a, b = (np.load(tmp_path / name / "latents.npy") for name in ("plain", "guided"))
    np.testing.assert_allclose(a, b, atol=1e-5)
    # another checkpoint in the same folder is refused: its hash is one of the settings
    code, _, err = sample(workdir, tmp_path / "guided", "--num=4", "--save_latents", "--cfg=1,3")
    assert code == 1 and "weak_sha256" in err


def test_image_k_does_not_depend_on_the_batch_or_the_number_of_images(workdir, tmp_path):
    for name, args in {"a": ["--num=16"], "b": ["--num=20", "--batch=16"]}.items():
        assert sample(workdir, tmp_path / name, "--save_latents", *args)[0] == 0
    a, b = (np.load(tmp_path / name / "latents.npy") for name in "ab")
    np.testing.assert_array_equal(a, b[:16])


def test_given_noise_is_used_in_order(workdir, tmp_path):
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    for name, part in {"all": noise, "last": noise[2:]}.items():
        np.save(tmp_path / "noise.npy", part)
        args = [f"--noise={tmp_path}/noise.npy", "--labels=4", "--save_latents"]
        assert sample(workdir, tmp_path / name, *args)[0] == 0
    a, b = (np.load(tmp_path / name / "latents.npy") for name in ("all", "last"))
    np.testing.assert_allclose(a[2], b[0], atol=1e-5)


def test_as_a_process():
    def call(*args):
        done = subprocess.run(
            [sys.executable, "-m", *args], capture_output=True, text=True, cwd=ROOT, check=False
        )
        return done.returncode, done.stdout, done.stderr

    one_line(call("ppflow_jax.sample", "--checkpoint=/nowhere", "--out=x"), "no checkpoint in")
    assert not (Path(ROOT) / "x").exists()
