"""Seeds and addresses that no command takes."""

import pytest

from ppflow_jax.errors import InputError, check_address, check_seed
from tests.commands import ROOT, run


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, -(2**31)])
def test_seeds_out_of_range(seed):
    with pytest.raises(InputError, match="0 to 4294967295"):
        check_seed(seed, "--seed")


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_seeds_in_range(seed):
    check_seed(seed, "--seed")


@pytest.mark.parametrize(
    "text",
    ["gs://b/x", "s3://b", "hf://a/b", "http://h/x", "HTTPS://h", "vae:gs://b/x", "a,s3://b",
     "gs:/b/x", "vae:gs:/b", "file:///tmp/x", "abfss://c@a/x", "memory://x", "--a=gs://b"],
)  # fmt: skip
def test_addresses(text):
    with pytest.raises(InputError, match="not supported"):
        check_address(text, "--out", stores=False)


@pytest.mark.parametrize("text", ["gs:/bucket/x", "gs://", "s3:///x", "vae:gs:/b", "gs://ab/x"])
def test_addresses_without_a_bucket(text):
    with pytest.raises(InputError, match=r"write (gs|s3)://BUCKET/NAME"):
        check_address(text, "--workdir", stores=True)


@pytest.mark.parametrize("text", ["gs://bucket/x", "vae:gs://bucket/vae", "a,s3://bucket"])
def test_addresses_in_object_stores(text):
    check_address(text, "--workdir", stores=True)


@pytest.mark.parametrize("text", ["hdfs://a/b", "http://h/x", "abfss://c@a/x", "file:///x"])
def test_addresses_of_other_stores(text):
    with pytest.raises(InputError, match="not supported"):
        check_address(text, "--workdir", stores=True)


@pytest.mark.parametrize(
    "text", ["runs/b2", "/a/b", "vae:/a/b", "taesd:weights", "4x4@0.5,2x2@1", "a:b", "C:/x", ""]
)
def test_paths(text):
    check_address(text, "--out", stores=False)


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("main", ["--config=configs/digits.py", "--workdir=gs:/bucket/run"]),
        ("main", ["--config=configs/digits.py", "--workdir=x", "--config.seed=-1"]),
        ("main", ["--config=configs/digits.py", "--workdir", "hdfs://b/run"]),
        ("sample", ["--checkpoint=x", "--out=hf:owner/repo"]),
        ("bench", ["--json", "gs://bucket/x.json"]),
        ("main", ["--config=configs/digits.py", "--workdir=x", "--config.data.path=hf://a"]),
        ("sample", ["--checkpoint=x", "--out=x", "--seed=4294967296"]),
        ("sample", ["--checkpoint=x", "--out=x", "--decode=vae:s3://b/vae"]),
        ("evaluate", ["--reference=x", "--seed=-1"]),
        ("evaluate", ["--reference=http://host/x.npz"]),
        ("prepare", ["--out=gs://b/cache"]),
        ("convert.__main__", ["--source=hf://a/b.pt", "--target=x"]),
        ("convert.__main__", ["--source=a.pt", "--target=x", "--seed=-1"]),
        ("bench", ["--json=gs://b/x.json"]),
        ("report.__main__", ["gs://b/run"]),
        ("report.__main__", ["x", "--seed=4294967296"]),
    ],
)
def test_commands_refuse_them_and_write_nothing(tmp_path, monkeypatch, command, args):
    args = [a.replace("configs/", f"{ROOT}/configs/") for a in args]
    monkeypatch.chdir(tmp_path)
    code, _, err = run(command, *args)
    assert (
        code == 1 and err.count("\n") == 1 and ("://" in err or "a seed is" in err or "hub" in err)
    ), err
    assert not list(tmp_path.iterdir())
