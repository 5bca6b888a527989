"""The command, end to end: both ways, what it refuses, and what the other commands make of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from ppflow_jax.autoencoders.autoencoder import Autoencoder, decode_chunked
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.decode import Decoder, load_autoencoder, save_autoencoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.checkpoints.weights import load_weights, save_weights
from ppflow_jax.convert.autoencoder_keys import autoencoder_state
from ppflow_jax.convert.keys import to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.convert.weights_file import read_state
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, Pyramid
from tests.commands import run

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"
MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=4, width=64, depth=2, heads=4, num_classes=10)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def convert(folder: Path, *commands: list[str]) -> list[Result]:
    """Exit codes and outputs of `convert` with each list of flags, where ~ is `folder`."""
    flags = [[f.replace("=~", f"={folder}/") for f in command] for command in commands]
    return [Result(*run("convert.__main__", *command)) for command in flags]


def same(path: Path, expected) -> bool:
    """Whether a file has exactly these tensors, bitwise and with the same dtypes."""
    found = {k: v.read() for k, v in read_state(path).items()}
    return found.keys() == expected.keys() and all(
        found[k].dtype == v.dtype
        and found[k].shape == v.shape
        and found[k].tobytes() == v.tobytes()
        for k, v in expected.items()
    )


@pytest.fixture(scope="module")
def sit():
    return load_file(REFERENCE / "sit" / "model.safetensors")


@pytest.fixture(scope="module")
def ppflow2():
    return load_file(REFERENCE / "ppflow_l2" / "model.safetensors")


def as_dtype(state, dtype, seed=0):
    """The same names with values that need the whole width of `dtype`."""
    rng = np.random.default_rng(seed)
    return {
        k: (v.astype(dtype) if k.startswith("pos") else rng.standard_normal(v.shape).astype(dtype))
        for k, v in state.items()
    }


def test_round_trip_is_bitwise_for_every_dtype(tmp_path, sit, ppflow2):
    to, back, states = [], [], {}
    for state, name in (
        (sit, "float32"),
        (ppflow2, "float64"),
        (sit, "float16"),
        (ppflow2, "bfloat16"),
    ):
        states[name] = as_dtype(state, np.dtype(getattr(ml_dtypes, name, name)))
    # tensors may differ in dtype, and an EMA lets float32 positions drift
    states["mixed"] = {
        k: v.astype(np.float16) if k.startswith("y_") else v for k, v in sit.items()
    } | {"pos_embed": sit["pos_embed"] + np.float32(1e-4)}
    for number, (name, state) in enumerate(states.items()):
        if number % 2:
            save_torch_file(tmp_path / f"{name}.pt", {"ema": state, "args": {"lr": 1e-4}})
        else:
            save_file(state, tmp_path / f"{name}.safetensors")
        ending = "pt" if number % 2 else "safetensors"
        to.append([f"--source=~{name}.{ending}", f"--target=~{name}", "--heads=4"])
        way = "safetensors" if number in (0, 3) else "torch"
        back.append([f"--source=~{name}", f"--target=~{name}.back.{way}", f"--to={way}"])
    results = convert(tmp_path, *to, *back)
    assert [r.code for r in results] == [0] * len(results), results
    assert "differ from the sin-cos values by up to 1.0e-04" in results[len(to) - 1].out
    for name, state in states.items():
        (file,) = tmp_path.glob(f"{name}.back.*")
        assert same(file, state), name
        path = find_checkpoint(tmp_path / name)
        params = load_weights(path, read_card(path), make_mesh())
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("f4")}
        theirs = state["y_embedder.embedding_table.weight"].astype(np.float32)
        assert np.array_equal(params["label"]["embedding"], theirs)


def test_entries_kinds_and_cards(tmp_path, sit, ppflow2):
    other = {k: v if k.startswith("pos") else v + 1 for k, v in ppflow2.items()}
    args = {"model": "PPFlow_S_2", "path_type": "GVP", "prediction": "noise"}
    opt = {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": [{"lr": 1e-4}]}
    tree = {"model": other, "ema": ppflow2, "opt": opt, "args": args}
    save_torch_file(tmp_path / "both.pt", tree)
    save_torch_file(tmp_path / "raw.pth", {"model": {f"module.{k}": v for k, v in other.items()}})
    save_file(sit, tmp_path / "sit.safetensors")
    heads = "--heads=4"
    explicit = "--pyramid=8x8@0.25,4x2@0.75,2x2@1"
    results = convert(
        tmp_path,
        ["--source=~both.pt", "--target=~ema", heads],
        ["--source=~both.pt", "--target=~model", heads, "--weights=model", "--path=linear"],
        ["--source=~raw.pth", "--target=~deep/raw", heads, "--pyramid=4x4@0.25,2x2@1"],
        ["--source=~sit.safetensors", "--target=~three", heads, "--pyramid=ppflow3", "--seed=5"],
        ["--source=~sit.safetensors", "--target=~explicit", heads, explicit, "--space=pixels"],
        ["--source=~sit.safetensors", "--target=~one", heads],
        ["--source=~one", "--target=~again", "--pyramid=ppflow3", "--seed=5"],
        ["--source=~raw.pth", "--target=~none", heads, "--weights=ema"],
        ["--source=~raw.pth", "--target=~none", heads, "--pyramid=ppflow3"],
        ["--source=~raw.pth", "--target=~none"],
        ["--source=~both.pt", "--target=~ema", heads],
        ["--source=~ema", "--target=~none"],
        ["--source=~ema", "--target=~none", "--pyramid=ppflow3"],
        ["--source=~ema", "--target=~none.pt", "--to=torch", "--weights=params"],
        ["--source=~sit.safetensors", "--target=~none", heads, "--kind=ppflow"],
        ["--source=~both.pt", "--target=~none", heads, "--kind=sit", "--latent_size=8"],
        ["--source=~both.pt", "--target=~x/y.pt", heads],
    )
    done, refused = [*results[:7], results[-1]], results[7:-1]
    assert [r.code for r in done] == [0] * 8, done
    assert "left out: model (38 tensors), opt (1 tensor)" in done[0].out
    words = ("no 'ema' weights", "not that of the file", "--heads=N", "exists", "is a folder")
    words += ("only a model of one stage", "no 'params'", "pyramid", "not expected")
    for result, word in zip(refused, words, strict=True):
        assert result.code == 1 and "Traceback" not in result.err, result
        line = result.err.splitlines()[-1]
        assert line.startswith("convert: ") and word in line, result
    assert not list(tmp_path.glob("**/.*")) and not (tmp_path / "none").exists()

    cards = {n: read_card(find_checkpoint(tmp_path / n)) for n in ("ema", "model", "deep/raw")}
    assert cards["ema"] == Card(MODEL, Flow("gvp", "noise"), "latents")
    assert cards["ema"].to_json()["data"] == {"space": "latents", "latent_scale": 0.18215}
    assert cards["model"].flow == Flow("linear", "noise")
    assert cards["deep/raw"].model.pyramid == Pyramid.parse("4x4@0.25,2x2@1")
    for name, state in {"ema": ppflow2, "model": other, "deep/raw": other}.items():
        ours = load_weights(find_checkpoint(tmp_path / name), cards[name], make_mesh())
        jax.tree.map(np.testing.assert_array_equal, ours, from_torch(MODEL, state))
    three = read_card(find_checkpoint(tmp_path / "three"))
    assert three.model.pyramid == PPFLOW3 and three.model.heads == 4
    again = find_checkpoint(tmp_path / "again")
    assert read_card(again) == three
    jax.tree.map(
        np.testing.assert_array_equal,
        load_weights(again, three, make_mesh()),
        load_weights(find_checkpoint(tmp_path / "three"), three, make_mesh()),
    )
    card = read_card(find_checkpoint(tmp_path / "explicit"))
    assert str(card.model.pyramid) == explicit.removeprefix("--pyramid=")
    assert card.space == "pixels" and "latent_scale" not in card.to_json()["data"]


def test_broken_files_leave_nothing(tmp_path, sit):
    """Every kind of hostile file is in test_torch_file; here is what the command makes of some."""
    stolen = tmp_path / "stolen"
    pickle = f"\x80\x02cos\nsystem\nX\x00\x00\x00\x00touch {stolen}".encode()
    (tmp_path / "system.pt").write_bytes(pickle + b"\x85R.")
    save_torch_file(tmp_path / "whole.pt", sit)
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(
        (REFERENCE / "sit/model.safetensors").read_bytes()[:999]
    )
    nan = sit | {"blocks.1.mlp.fc1.weight": np.full_like(sit["blocks.1.mlp.fc1.weight"], np.nan)}
    save_file(nan, tmp_path / "nan.safetensors")
    save_file({**sit, "blocks.0.attn.q_norm.weight": np.ones(16)}, tmp_path / "more.safetensors")
    less = {k: v for k, v in sit.items() if not k.startswith("blocks.1.attn")}
    save_file(less, tmp_path / "less.safetensors")
    swapped = {k.replace("fc1", "FC").replace("fc2", "fc1"): v for k, v in sit.items()}
    swapped = {k.replace("FC", "fc2"): v for k, v in swapped.items()}
    save_file(swapped, tmp_path / "swapped.safetensors")
    save_file({"bert.weight": np.ones(3)}, tmp_path / "bert.safetensors")
    save_file({k: v.astype(np.int32) for k, v in sit.items()}, tmp_path / "int.safetensors")
    save_file(sit | {"pos_embed": sit["pos_embed"][:, ::-1].copy()}, tmp_path / "pos.safetensors")
    words = {
        "system.pt": "",
        "cut.pt": "",
        "text.pt": "Git LFS",
        "empty.bin": "is empty",
        "missing.pt": "No such file",
        "cut.safetensors": "broken",
        "nan.safetensors": "blocks.1.mlp.fc1.weight: has values that are NaN",
        "more.safetensors": "blocks.0.attn.q_norm.weight: not expected",
        "less.safetensors": "blocks.1.attn.qkv.weight: missing",
        "swapped.safetensors": "mlp.fc2.bias: shape",
        "bert.safetensors": "none of SiT, PPFlow",
        "int.safetensors": "dtype int32",
        "pos.safetensors": "pos_embed: differs",
    }
    before = {*tmp_path.iterdir()}
    flags = [[f"--source=~{name}", "--target=~new/out", "--heads=4"] for name in words]
    for result, (name, word) in zip(convert(tmp_path, *flags), words.items(), strict=True):
        assert result.code == 1, (name, result)
        line = result.err.splitlines()[-1]
        assert line.startswith("convert: ") and name in line and word in line, result
        assert "Traceback" not in result.err
    assert {*tmp_path.iterdir()} == before and not stolen.exists()


def test_autoencoders_both_ways(tmp_path):
    vae = load_file(REFERENCE / "vae" / "diffusion_pytorch_model.safetensors")
    tiny = TAESDConfig(width=8)
    params = Autoencoder(tiny).init(0)
    halves = autoencoder_state("taesd", params)
    halves = {k: np.asarray(v).astype(ml_dtypes.bfloat16) for k, v in halves.items()}
    for half in ("encoder", "decoder"):
        part = {k.split(".", 1)[1]: v for k, v in halves.items() if k.startswith(half)}
        save_file(part, tmp_path / f"{half}.safetensors")
    save_torch_file(tmp_path / "vae.bin", {"state_dict": vae})
    save_file({k: v.astype("f8") for k, v in vae.items()}, tmp_path / "vae64.safetensors")
    config = f"--vae_config={REFERENCE / 'vae' / 'config.json'}"
    results = convert(
        tmp_path,
        ["--source=~vae.bin", "--target=~vae", config],
        [f"--source={tmp_path}/encoder.safetensors,{tmp_path}/decoder.safetensors", "--target=~t"],
        ["--source=~decoder.safetensors", "--target=~half"],
        ["--source=~vae", "--target=~vae.pt", "--to=torch"],
        ["--source=~t", "--target=~t.safetensors", "--to=safetensors"],
        ["--source=~vae.bin", "--target=~none"],
        ["--source=~vae64.safetensors", "--target=~none", config],
        [f"--source={tmp_path}/decoder.safetensors,{tmp_path}/vae.bin", "--target=~none"],
        [
            f"--source={tmp_path}/decoder.safetensors,{tmp_path}/decoder.safetensors",
            "--target=~none",
        ],
        ["--source=~decoder.safetensors", "--target=~none", "--pyramid=ppflow2"],
    )
    assert [r.code for r in results[:5]] == [0] * 5, results
    words = ("config.json", "--dtype=float32", "given together", "in both files", "for SiT models")
    for result, word in zip(results[5:], words, strict=True):
        assert result.code == 1 and word in result.err, result
    assert same(tmp_path / "vae.pt", vae) and same(tmp_path / "t.safetensors", halves)
    assert not (tmp_path / "none").exists()

    card = Card(MODEL, Flow(), "latents")
    with pytest.raises(InputError, match="that folder holds a vae; write vae:"):
        Decoder.parse(f"taesd:{tmp_path / 'vae'}", card)
    for text in ("vae", "vae:", "jpeg:x"):
        with pytest.raises(InputError, match="write none, vae:DIR or taesd:DIR"):
            Decoder.parse(text, card)
    with pytest.raises(InputError, match="makes pixels"):
        Decoder.parse(f"vae:{tmp_path / 'vae'}", Card(MODEL, Flow(), "pixels"))
    with pytest.raises(InputError, match="no encoder"):
        load_autoencoder(tmp_path / "half", ("encoder",))
    with pytest.raises(InputError, match="holds an autoencoder"):
        read_card(find_checkpoint(tmp_path / "vae"))


def test_latent_scales_that_differ_are_reconciled(tmp_path):
    config = AutoencoderKLConfig(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
    )
    params = jax.tree.map(np.asarray, Autoencoder(config).init(0))
    save_autoencoder(tmp_path / "vae", "vae", config, params, "float32")
    decoder = Decoder.parse(f"vae:{tmp_path / 'vae'}", Card(MODEL, Flow(), "latents"))
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4), np.float32)
    ours = decoder.pictures(latents * np.float32(0.18215))
    theirs = decode_chunked(Autoencoder(config), params, latents * np.float32(0.5), uint8=True)
    assert np.abs(np.int32(ours) - theirs).max() <= 1 and np.ptp(ours) > 50


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(self, step, args):
        (Path(self.directory) / "half").write_text("")
        raise ValueError('Error writing "x" at local file "y": No space left on device')

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(InputError, match=r"\(No space left on device\): is the disk full"):
        save_weights(tmp_path / "out", Card(MODEL, Flow(), "latents"), {"x": np.ones(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_sample_from_a_converted_file_and_decode(tmp_path, ppflow2):
    ref = np.load(REFERENCE / "convert" / "ode.npz")
    save_torch_file(tmp_path / "model.pt", {"ema": ppflow2, "model": {}, "opt": {}})
    # as a person runs it, in a process of its own
    command = [sys.executable, "-m", "ppflow_jax.convert", f"--source={tmp_path}/model.pt"]
    command += [f"--target={tmp_path}/model", "--heads=4"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "model" in done.stdout, done.stderr
    tiny = TAESDConfig(width=8)
    params = jax.tree.map(np.asarray, Autoencoder(tiny).init(0))
    save_autoencoder(tmp_path / "taesd", "taesd", tiny, params, "float32")
    np.save(tmp_path / "noise.npy", np.moveaxis(ref["z"], 1, -1))
    code, _, err = run(
        "sample",
        f"--checkpoint={tmp_path / 'model'}",
        f"--out={tmp_path / 'out'}",
        f"--noise={tmp_path / 'noise.npy'}",
        f"--labels={','.join(map(str, ref['y']))}",
        f"--cfg={','.join(map(str, ref['scales']))}",
        *("--steps=9", "--grid=reference", "--cfg_channels=3", "--save_latents"),
        f"--decode=taesd:{tmp_path / 'taesd'}",
    )
    assert code == 0, err
    latents = np.load(tmp_path / "out" / "latents.npy")
    theirs = np.moveaxis(ref["heun2_n9_cfg"], 1, -1)
    np.testing.assert_allclose(latents, theirs, rtol=0, atol=2e-5)
    expected = decode_chunked(Autoencoder(tiny), params, latents, uint8=True)
    for k, path in enumerate(sorted((tmp_path / "out" / "images").iterdir())):
        picture = np.int32(Image.open(path))
        assert picture.shape == (64, 64, 3) and np.abs(picture - expected[k]).max() <= 1
    assert Image.open(tmp_path / "out" / "grid.png").size == (132, 66)


@pytest.mark.long
def test_train_from_a_converted_file_and_back(tmp_path):
    """A step with a tiny learning rate changes nothing: the export is what came in."""
    config = ModelConfig(
        Pyramid.parse("2x2@0.5,1x1@1"), 8, 1, 32, 1, 2, 10, mlp_ratio=2.0, learn_sigma=False
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), abstract_params(config)
    )
    save_weights(tmp_path / "start", Card(config, Flow(), "pixels"), params)
    with pytest.raises(InputError, match="exists"):
        save_weights(tmp_path / "start", Card(config, Flow(), "pixels"), params)
    flags = {
        "model.pyramid": config.pyramid,
        "model.width": 32,
        "model.depth": 1,
        "model.heads": 2,
        "model.mlp_ratio": 2.0,
        "optim.lr": 1e-30,
        "train.steps": 1,
        "train.ema": 0.0,
        "data.batch_size": 16,
        "sample.count": 1,
        "sample.solver": "euler",
        "sample.steps": 2,
        "sample.cfg": "(1.0,)",
        "init_from": tmp_path / "start",
    }
    flags = [f"--config.{k}={v}" for k, v in flags.items()]
    config_file = f"--config={ROOT}/configs/digits.py"
    code, _, err = run("main", config_file, f"--workdir={tmp_path / 'run'}", *flags)
    assert code == 0, err
    results = convert(
        tmp_path,
        ["--source=~run", "--target=~ema.safetensors", "--to=safetensors"],
        ["--source=~run", "--target=~model.pt", "--to=torch", "--weights=model"],
        ["--source=~model.pt", "--target=~again", "--heads=2"],
    )
    assert [r.code for r in results] == [0] * 3, results
    ours = to_torch(config, params)
    for name in ("ema.safetensors", "model.pt"):
        tensors = {k: v.read() for k, v in read_state(tmp_path / name).items()}
        assert {tensors.pop(f"pos_embed.{i}").shape for i in (0, 1)} == {(1, 16, 32), (1, 64, 32)}
        jax.tree.map(np.testing.assert_array_equal, tensors, ours)
    again = read_card(find_checkpoint(tmp_path / "again")).model
    assert again == config
    # a converted folder is no run to continue
    code, _, err = run("main", config_file, f"--workdir={tmp_path / 'start'}", *flags[:-1])
    assert code == 1 and "--config.init_from" in err
