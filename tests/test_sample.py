"""The same samples in one go, stopped and continued, batched otherwise, by two processes."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import save_weights
from ppflow_jax.files.disk import locked
from ppflow_jax.files.store import digest
from ppflow_jax.flow.path import Flow
from ppflow_jax.generate.folder import SampleFolder
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import Pyramid
from tests.commands import ROOT, run

MODEL = ModelConfig(Pyramid.parse("4x4@0.5,2x2@1"), 8, 1, 16, 1, 2, 10, learn_sigma=False)
FLAGS = ["--num=300", "--solver=euler", "--steps=2", "--cfg=1,2", "--save_latents"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("weights") / "model", np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract_params(MODEL)
    )
    save_weights(folder, Card(MODEL, Flow(), "pixels"), params)
    return folder


def flags(model, out, *more):
    return [f"--checkpoint={model}", f"--out={out}", *FLAGS, "--nopngs", *more]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    code, said, err = run("sample", *flags(model, out))
    assert code == 0 and "300 images, 2 NFE each" in said, err
    return out


def assert_same(folder, whole):
    assert (folder / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    for name in ("latents.npy", "labels.npy"):
        np.testing.assert_array_equal(np.load(folder / name), np.load(whole / name))


def test_files_and_card(model, whole):
    names = {p.name for p in whole.iterdir()}
    assert names == {
        *("samples.npz", "latents.npy", "labels.npy", "grid.png", "card.json", ".lock")
    }
    made, latents = np.load(whole / "samples.npz"), np.load(whole / "latents.npy")
    expected = np.clip(127.5 * latents + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(made["arr_0"], expected)
    assert made["arr_1"].tolist() == [k % 10 for k in range(300)]
    card = json.loads((whole / "card.json").read_text())
    assert card["settings"]["checkpoint_sha256"] == digest(model)
    assert card["settings"]["cfg"] == [1.0, 2.0] and card["settings"]["labels"] == "balanced"
    assert card["settings"]["pyramid"] == "4x4@0.5,2x2@1" and card["settings"]["steps"] == 2
    assert (card["nfe"], card["images_in_these_seconds"], card["devices"]) == (2, 300, 8)
    assert card["versions"]["jax"] == jax.__version__ and card["seconds"] > 0


def test_stopped_and_gone_on_with_in_other_batches(model, whole, tmp_path, monkeypatch):
    write, shards = SampleFolder.write, []

    def stop(folder, shard, *arrays):
        if shards:
            raise KeyboardInterrupt
        shards.append(shard)
        write(folder, shard, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", stop)
        assert run("sample", *flags(model, tmp_path))[0] == 130
    assert shards and not (tmp_path / "samples.npz").exists()
    code, said, err = run("sample", *flags(model, tmp_path, "--batch=500"))
    assert code == 0 and "for the last 44" in said, err
    assert_same(tmp_path, whole)


@pytest.mark.long
def test_two_processes_of_one_device(model, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "ppflow_jax.sample", *flags(model, tmp_path)],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(k),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(2)
    ]
    said = [p.communicate(timeout=300)[0] for p in runs]
    assert [p.returncode for p in runs] == [0, 0], said
    assert ["300 images" in text for text in said] == [True, False]
    assert_same(tmp_path, whole)
    assert json.loads((tmp_path / "card.json").read_text())["processes"] == 2


def test_a_complete_folder_is_left_alone(model, whole):
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    code, said, _ = run("sample", *flags(model, whole))
    assert code == 0 and "were complete" in said
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed=1"], "holds 300 images of other settings (seed: 0 -> 1)"),
        (["--labels=uniform"], "labels: balanced -> uniform"),
        (["--cfg=1,3"], "cfg: [1.0, 2.0] -> [1.0, 3.0]"),
        (["--num=299"], "num: 300 -> 299"),
        (["--num=301", "--seed=1"], "seed: 0 -> 1, num: 300 -> 301"),
        (["--microbatch=8"], "microbatch: 16 -> 8"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(model, whole, more, words):
    before = (whole / "card.json").read_bytes()
    code, _, err = run("sample", *flags(model, whole, *more))
    assert code == 1 and words in err and len(err.strip().splitlines()) == 1
    assert (whole / "card.json").read_bytes() == before


def test_a_folder_grows(model, whole, tmp_path, monkeypatch):
    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    shutil.copytree(whole, grown)
    made = []
    write = SampleFolder.write
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", lambda f, s, *a: (made.append(s), write(f, s, *a)))
        code, said, err = run("sample", *flags(model, grown, "--num=520"))
    assert code == 0 and "520 images" in said and "for the last 264" in said, err
    assert made == [1, 2]  # the first 256 images were there
    assert run("sample", *flags(model, fresh, "--num=520"))[0] == 0
    assert_same(grown, fresh)
    for num in (4, 8):  # with the microbatch that the folder was begun with
        code, said, err = run("sample", *flags(model, tmp_path / "few", f"--num={num}"))
        assert code == 0 and f"{num} images" in said, err
    assert json.loads((tmp_path / "few" / "card.json").read_text())["settings"]["microbatch"] == 4
    assert run("sample", *flags(model, tmp_path / "eight", "--num=8", "--microbatch=4"))[0] == 0
    assert_same(tmp_path / "few", tmp_path / "eight")


def test_growth_that_was_killed_continues(model, whole, tmp_path, monkeypatch):
    grown = tmp_path / "grown"
    shutil.copytree(whole, grown)

    def stop(folder, shard, *arrays):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", stop)
        assert run("sample", *flags(model, grown, "--num=310"))[0] == 130
    assert json.loads((grown / "card.json").read_text())["complete"] is False
    code, said, err = run("sample", *flags(model, grown, "--num=310"))
    assert code == 0 and "for the last 54" in said, err
    assert run("sample", *flags(model, tmp_path / "fresh", "--num=310"))[0] == 0
    assert_same(grown, tmp_path / "fresh")


def test_a_folder_in_use_is_refused(model, tmp_path):
    with locked(tmp_path):
        code, _, err = run("sample", *flags(model, tmp_path))
    assert code == 1 and "is in use by process" in err and len(err.strip().splitlines()) == 1


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.long
def test_requests_have_the_bits_of_commands_of_their_own(model, tmp_path):
    asked = [
        {"label": 3, "seed": 7, "guidance": [1, 2.5]},
        {"label": "4", "seed": 2**32 - 1},
        {"label": 10, "guidance": 1},  # without a class
        {"label": 3, "seed": 8, "guidance": [1, 2.5]},
    ]
    file = write_lines(tmp_path / "asked.jsonl", *asked)
    common = [f"--checkpoint={model}", "--solver=sde-euler", "--steps=4", "--cfg=1,2"]
    common += ["--microbatch=2", "--nopngs"]
    code, said, err = run("sample", *common, f"--out={tmp_path / 'all'}", f"--requests={file}")
    assert code == 0 and "4 images" in said, err
    with np.load(tmp_path / "all/samples.npz") as made:
        pictures, labels = made["arr_0"], made["arr_1"]
    assert labels.tolist() == [3, 4, 10, 3]
    for k, line in enumerate(asked):
        own = [f"--out={tmp_path / str(k)}", f"--labels={line['label']}", "--num=2"]
        own += [f"--seed={line.get('seed', 0)}"]
        scales = np.atleast_1d(line.get("guidance", [1, 2]))
        own += ["--cfg=" + ",".join(map(str, scales))]
        code, _, err = run("sample", *common, *own)
        assert code == 0, err
        with np.load(tmp_path / str(k) / "samples.npz") as alone:
            np.testing.assert_array_equal(pictures[k], alone["arr_0"][0])
    write_lines(file, *asked[:3], asked[3] | {"seed": 9})
    code, _, err = run("sample", *common, f"--out={tmp_path / 'all'}", f"--requests={file}")
    assert code == 1 and "requests_sha256" in err, "other requests in the same folder"


def test_requests_that_were_killed_continue(model, tmp_path, monkeypatch):
    asked = [{"label": k % 10, "seed": k, "guidance": [1, 2 + k % 2]} for k in range(300)]
    file = write_lines(tmp_path / "asked.jsonl", *asked)
    flags = [f"--checkpoint={model}", "--solver=euler", "--steps=2", f"--requests={file}"]
    flags += ["--nopngs", "--save_latents"]
    code, _, err = run("sample", *flags, f"--out={tmp_path / 'whole'}")
    assert code == 0, err
    monkeypatch.setattr(SampleFolder, "finish", lambda *args: sys.exit(9))
    assert run("sample", *flags, f"--out={tmp_path / 'killed'}")[0] == 9
    monkeypatch.undo()
    (tmp_path / "killed/shards/000000.npy").unlink()
    code, said, err = run("sample", *flags, f"--out={tmp_path / 'killed'}")
    assert code == 0 and "for the last 256" in said, err
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    "lines, words",
    [
        ('{"label": 1}\n{"label": 77}', "line 2: label=77: give a class from 0 to 9"),
        ('{"label": "cat"}', "line 1: no class is called"),
        ('{"seed": 1}', "line 1: label is missing"),
        ('{"label": 1, "seed": -1}', "line 1: seed=-1"),
        ('{"label": 1, "guidance": [1, 2, 3]}', "line 1: guidance has 3 scales"),
        ('{"label": 1, "guidance": NaN}', "line 1: this is no JSON"),
        ('{"label": 1, "steps": 9}', 'line 1: no field "steps"'),
        ('\n\n{"label": 1', "line 3: this is no JSON"),
        ("7", "line 1: this must be an object"),
        ("\x00\xff", "line 1: this is no JSON"),
        ("[" * 100_000, "line 1: the JSON is nested too deeply"),
        ("\n", "holds no request"),
    ],
)
def test_a_wrong_request_is_named(model, tmp_path, lines, words):
    file = tmp_path / "asked.jsonl"
    file.write_text(lines)
    flags = [f"--checkpoint={model}", f"--out={tmp_path / 'out'}", f"--requests={file}"]
    code, _, err = run("sample", *flags)
    assert code == 1 and words in err and not (tmp_path / "out").exists(), err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--labels=1"], "leave out --labels"),
        (["--num=1", "--seed=0"], "leave out --num, --seed"),
        (["--cfg=1,2", "--cfg_until=0.5,1"], "leave out --cfg_until"),
    ],
)
def test_requests_and_flags_that_say_the_same(model, tmp_path, more, words):
    file = write_lines(tmp_path / "asked.jsonl", {"label": 1, "guidance": 2})
    flags = [f"--checkpoint={model}", f"--out={tmp_path / 'out'}", f"--requests={file}"]
    code, _, err = run("sample", *flags, *more)
    assert code == 1 and words in err, err
