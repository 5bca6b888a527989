"""Weights of the Hugging Face hub, from a server on loopback."""

import numpy as np
import pytest
from huggingface_hub import constants

import ppflow_jax as pf
from ppflow_jax.data.sources import open_source
from ppflow_jax.errors import InputError, check_address
from ppflow_jax.files import hub as hubs
from ppflow_jax.report import publish
from tests import commands, fake_hub, tables
from tests.fake_hub import TOKEN
from tests.pictures import folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, a cache of its own, and a token in the environment of those that ask for it."""
    with fake_hub.hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hubs.fetched.cache_clear()
        yield server


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:a/b", ("a/b", "", None)),
        ("hf:a/b@v1", ("a/b", "", "v1")),
        ("hf:a/b.c/x/model.safetensors@refs/pr/1", ("a/b.c", "x/model.safetensors", "refs/pr/1")),
    ],
)
def test_addresses(text, parts):
    address = hubs.Address.parse(text)
    assert (address.repo, address.file, address.revision) == parts and str(address) == text


@pytest.mark.parametrize("text", ["hf:a", "hf:a/b@", "hf:", "hf:a/b/../c", "hf:a b/c"])
def test_what_is_no_address(text):
    with pytest.raises(InputError, match="write hf:OWNER/REPO"):
        hubs.Address.parse(text)


def test_where_addresses_are_taken():
    check_address("hf:a/b", "--checkpoint", stores=True, hub=True)
    with pytest.raises(
        InputError, match="weights and Parquet datasets are read from the hub, and nothing else"
    ):
        check_address("hf:a/b", "--out", stores=True)


def test_which_file_of_a_repository(hub, capsys):
    small, large = b"s" * 10, b"l" * 2000
    commit = hub.put("a/b", {"README.md": b"x", "m.pt": small, "m.safetensors": large})
    hub.put("a/b", {"README.md": b"x", "m.pt": small})
    assert hubs.fetched("hf:a/b").read_bytes() == small
    assert hubs.fetched(f"hf:a/b@{commit}").read_bytes() == large
    assert "m.safetensors: SHA-256 " in capsys.readouterr().err
    assert hubs.fetched("hf:a/b/m.pt").name == "m.pt"
    hub.put("a/c", {"x.pt": small, "y.pt": small})
    for text, words in {
        "hf:a/c": "several files of weights: give one of x.pt, y.pt",
        "hf:a/b/z.pt": "there is no z.pt in a/b, which has README.md, m.pt",
        "hf:a/nothing": "no such repository, or a private one",
        "hf:a/b@v9": "no such revision",
    }.items():
        with pytest.raises(InputError, match=words):
            hubs.fetched(text)


def test_what_the_hub_has_not_is_refused(hub):
    hub.put("a/b", {"m.pt": b"m" * 10, "large.pt": b"l" * 2000})
    for name in ("m.pt", "large.pt"):
        path = hubs.fetched(f"hf:a/b/{name}")
        data = path.read_bytes()
        path.resolve().write_bytes(data[:-1] + b"?")
        hubs.fetched.cache_clear()
        with pytest.raises(InputError, match=f"{name} is not what the hub has"):
            hubs.fetched(f"hf:a/b/{name}")


def test_a_dataset(hub, tmp_path):
    root = folder(tmp_path / "pictures")
    pictures = [path.read_bytes() for path in sorted(root.glob("*/*"))]
    made = tables.pushed(tmp_path / "d", tables.table(pictures, [0] * 12))
    files = {str(p.relative_to(made)): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    commit = hub.put("a/b", files)
    source = open_source("parquet", "hf:a/b", size=16)
    assert [source.fetch(k)[0] for k in range(12)] == pictures
    assert source.identity()["path"] == f"hf:a/b@{commit}"
    hub.put("a/b", {"README.md": b"x"})
    again = open_source("parquet", f"hf:a/b/data/train-*.parquet@{commit}", size=16)
    assert len(again) == 12 and again.identity()["path"] == f"hf:a/b/data@{commit}"
    with pytest.raises(InputError, match=r"has no \.parquet files"):
        open_source("parquet", "hf:a/b", size=16)
    with pytest.raises(InputError, match="hf:a/c: no such repository"):
        open_source("parquet", "hf:a/c", size=16)
    with pytest.raises(InputError, match="source folder does not read the hub"):
        open_source("folder", "hf:a/b", size=16)
    shard = next((tmp_path / "cache").rglob("snapshots/*/data/train-00001*"))
    shard.resolve().write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"train-00001.* is not what the hub has"):
        open_source("parquet", f"hf:a/b@{commit}", size=16)


def test_a_private_repository_and_its_token(hub, capsys, monkeypatch, tmp_path):
    hub.put("a/b", {"m.pt": b"m"}, private=True)
    with pytest.raises(InputError, match="or a private one") as raised:
        hubs.fetched("hf:a/b")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hubs.fetched("hf:a/b").read_bytes() == b"m"
    monkeypatch.setenv("HF_TOKEN", TOKEN + "wrong")
    with pytest.raises(InputError) as wrong:
        hubs.fetched("hf:a/b@main")
    said = "".join(map(str, (raised.value, wrong.value, *capsys.readouterr())))
    assert TOKEN not in said
    found = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert found and not any(TOKEN.encode() in p.read_bytes() for p in found)


def test_no_server_and_no_package(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        hubs.fetched("hf:a/b")
    monkeypatch.setattr(hubs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ppflow_jax\[hub\]'"):
        hubs.fetched("hf:a/b@x")


def test_folders_of_this_machine_are_not_published():
    given = {"path": "/a/data", "all": ["vae:gs://b/k/vae", "a=/x/y,b=s3://b/c/d"], "n": 3}
    said = {"path": "data", "all": ["vae:vae", "a=y,b=d"], "n": 3}
    assert publish._without_folders(given) == said
    assert publish._without_folders("4x4@0.5,2x2@1") == "4x4@0.5,2x2@1"


def test_a_run_is_pushed_and_read_by_its_name(hub, small_run, tmp_path, monkeypatch):
    code, _, err = commands.run("report.push", str(small_run), "hf:me/digits")
    assert code == 1 and "401" in err and err.count("\n") == 1, err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for again in (False, True):  # the second replaces the first
        if again:
            left = ("checkpoints/0/x", "evaluations/07.json", "plan.json", "LICENSE")
            hub.put("me/digits", hub.files("me/digits") | dict.fromkeys(left, b"earlier"))
        code, out, err = commands.run("report.push", str(small_run), "hf:me/digits")
        assert code == 0 and "hf:me/digits@" in out, err
    files = hub.files("me/digits")
    assert [name for name in left if name in files] == ["LICENSE"]  # which is not ours
    page = files["README.md"].decode()
    assert "library_name: ppflow_jax" in page and "4x4@0.5,2x2@1" in page and "samples.png" in files
    named = [n for n, data in files.items() if str(small_run.parent).encode() in data]
    assert not named and not any(TOKEN.encode() in data for data in files.values())
    model = pf.load("hf:me/digits")
    ours = commands.weights(small_run, "ema")
    whole = commands.weights(hubs.fetched("hf:me/digits"), "ema")
    assert ours.keys() == whole.keys() and all(np.array_equal(ours[k], whole[k]) for k in ours)
    args = ["--num=4", "--steps=2", "--solver=euler"]
    for name, checkpoint in {"run": str(small_run), "hub": "hf:me/digits"}.items():
        code, _, err = commands.run(
            "sample", f"--checkpoint={checkpoint}", f"--out={tmp_path / name}", *args
        )
        assert code == 0, err
    pictures = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("run", "hub")]
    assert np.array_equal(*pictures)
    code, _, err = commands.run(
        "convert.__main__", "--source=hf:me/digits", f"--target={tmp_path / 'x.safetensors'}",
        "--to=safetensors",
    )  # fmt: skip
    assert code == 0, err
    data = (tmp_path / "x.safetensors").read_bytes()
    hub.put("me/torch", {"model.safetensors": data, "README.md": b""})
    reading = pf.Reading(space="pixels", heads=2)
    again = pf.load("hf:me/torch", reading=reading)
    assert again.config.pyramid == model.config.pyramid
