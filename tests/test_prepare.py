import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.autoencoders.encode import Encoder, to_float
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.data.cache import CacheSource, Manifest
from ppflow_jax.data.sources import open_source
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import locked
from ppflow_jax.generate import encoding, latent_cache
from tests import tables
from tests.commands import run
from tests.pictures import folder

TINY_KL = AutoencoderKLConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)
TINY_TAESD = TAESDConfig(width=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with `train` (11 readable pictures of 12), `kl`, `taesd`, and the cache `cache`."""
    root = tmp_path_factory.mktemp("prepare")
    folder(root / "train")
    (root / "train" / "class1" / "2.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    for kind, config in {"vae": TINY_KL, "taesd": TINY_TAESD}.items():
        params = jax.tree.map(np.asarray, Autoencoder(config).init(0))
        save_autoencoder(root / kind, kind, config, params, "float32")
    code, out, err = prepare(root, root / "cache")
    assert code == 0, err
    return root, out, err


def prepare(root, out, *args):
    flags = [f"--path={root}/train", f"--vae=vae:{root}/vae", f"--out={out}", "--size=16"]
    flags += ["--batch=1", "--shard_pictures=5", "--unreadable=skip"]
    return run("prepare", *flags, *args)


def files(folder):
    found = {}
    for p in folder.iterdir():
        if p.is_file() and p.name != ".lock":
            found[p.name] = hashlib.sha256(p.read_bytes()).hexdigest()
    return found


def one_line(result, words):
    code, _, err = result
    lines = [line for line in err.strip().splitlines() if "img" not in line]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    for word in words.split("|"):
        assert word in lines[0], lines[0]


def test_a_cache_holds_what_the_autoencoder_says(made):
    root, out, err = made
    assert "11 pictures (22 records) of 12, 1 unreadable" in out
    assert "left out, cannot be read: class1/2.JPEG" in err and "12/12" in err
    source = CacheSource(str(root / "cache"))
    m = source.manifest
    assert (m.shape, m.std, m.latent_scale, m.size) == ((8, 8, 4), True, 0.5, 16)
    assert [s.records for s in m.shards] == [10, 8, 4]
    assert m.dataset["pictures"] == 12 and m.unreadable[0].startswith("class1/2.JPEG (")
    pictures = open_source("folder", str(root / "train"), size=16)
    every = np.array([i for i in range(12) if i != 6])
    encoder = Encoder.parse(f"vae:{root}/vae", "--vae")
    for flip in (False, True):
        flips = np.full(11, flip)
        images = to_float(jnp.asarray(pictures.read(every, flips)["image"]))
        mean, std = encoder.autoencoder.encode(encoder.params, images)
        got = source.read(np.arange(11), flips)
        np.testing.assert_allclose(got["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(got["std"], std, atol=1e-5)
        assert got["label"].tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert np.std(got["std"]) > 1e-3


def test_without_flips_and_without_standard_deviation(made, tmp_path):
    root = made[0]
    args = [f"--vae=taesd:{root}/taesd", "--flips=one", "--shard_pictures=99"]
    assert prepare(root, tmp_path, *args)[0] == 0
    source = CacheSource(str(tmp_path))
    assert not source.manifest.std and source.manifest.records == 11
    a, b = (source.read(np.array([4]), np.array([flip])) for flip in (False, True))
    assert set(a) == {"x", "label"} and a["x"].shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(a["x"], b["x"])


@pytest.mark.parametrize("moment", ["first record", "second shard", "facts", "manifest"])
def test_killed_anywhere_and_rerun_gives_the_same_bytes(made, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def dies(name, at, module=latent_cache):
        real, calls = getattr(module, name), []

        def function(*args, **options):
            calls.append(args)
            if len(calls) == at:
                # A SIGKILL leaves temporary files behind
                (tmp_path / f".shard-0000{at % 3}-of-00003.array_record.1.partial").write_bytes(
                    b"x"
                )
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(module, name, function)

    {
        "first record": lambda: dies("encode_record", 1, encoding),
        "second shard": lambda: dies("encode_record", 13, encoding),
        "facts": lambda: dies("_write_json", 3),
        "manifest": lambda: dies("write", 1, Manifest),
    }[moment]()
    root = made[0]
    with pytest.raises(Killed):
        prepare(root, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    one_line(run("prepare", f"--out={tmp_path}", "--verify"), "no manifest.json|run that again")
    monkeypatch.undo()
    one_line(prepare(root, tmp_path, "--flips=one"), "made with other settings (flips)")
    code, _, err = prepare(root, tmp_path)
    assert code == 0 and ("continuing" in err) == (moment in ("second shard", "facts"))
    assert files(tmp_path) == files(root / "cache")


def test_parquet_gives_the_records_of_the_folder(made, tmp_path):
    pictures = sorted((made[0] / "train").glob("*/*"))
    labels = [int(path.parent.name[-1]) for path in pictures]
    rows = tables.table([path.read_bytes() for path in pictures], labels)
    pushed = tables.pushed(tmp_path / "hub", rows)
    args = ["--source=parquet", f"--path={pushed}"]
    code, out, err = prepare(made[0], tmp_path / "cache", *args)
    assert code == 0 and "0 ant (4), 1 bee (4), 2 cat (4)" in out, err
    assert "left out, cannot be read: data/train-00001-of-00002.parquet[0] (" in err
    ours, theirs = (files(root / "cache") for root in (tmp_path, made[0]))
    assert ours.pop("manifest.json") != theirs.pop("manifest.json") and ours == theirs


def test_processes_share_the_shards(made, tmp_path, monkeypatch):
    root = made[0]
    monkeypatch.setattr(latent_cache, "_wait", lambda job, what: None)
    encoder = Encoder.parse(f"vae:{root}/vae", "--vae")
    source = open_source("folder", str(root / "train"), size=16)
    jobs = [
        encoding.Job(
            source, encoding.Latents(encoder, 16), tmp_path, "both", 1, 5, i, process_count=2
        )
        for i in range(2)
    ]
    for job in jobs:
        latent_cache.prepare_shards(job, skip_unreadable=True, workers=0)
    assert latent_cache.finish(jobs[1]) is None
    assert latent_cache.finish(jobs[0]).pictures == 11
    assert files(tmp_path) == files(root / "cache")


def test_verify_and_repair(made, tmp_path):
    root, cache = made[0], tmp_path / "cache"
    shutil.copytree(root / "cache", cache)
    verify = ["prepare", f"--out={cache}", "--verify"]
    code, out, _ = run(*verify)
    assert code == 0 and "3 shards, 22 records, as written" in out
    shard = cache / "shard-00001-of-00003.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
    one_line(run(*verify), "shard-00001|other contents|remove that file")
    shard.write_bytes(whole[:-1])
    one_line(run(*verify), "shard-00001|bytes, not the")
    with pytest.raises(InputError, match="bytes, not the"):
        CacheSource(str(cache))
    shard.unlink()
    one_line(run(*verify), "is missing|run the same ppflow_jax.prepare again")
    assert prepare(root, cache)[0] == 0
    assert files(cache) == files(root / "cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    one_line(run(*verify), "not of format 1")
    (cache / "manifest.json").write_text("{")
    one_line(run(*verify), "cannot read|manifest.json")


def test_a_finished_cache_is_left_as_it_is(made):
    root = made[0]
    before = files(root / "cache")
    code, out, _ = prepare(root, root / "cache")
    assert code == 0 and "11 pictures" in out and files(root / "cache") == before
    one_line(prepare(root, root / "cache", "--size=32"), "other settings (size, shape)")
    args = [f"--vae=taesd:{root}/taesd"]
    one_line(prepare(root, root / "cache", *args), "autoencoder")
    assert files(root / "cache") == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--unreadable=error"], "cannot read class1/2.JPEG|--unreadable=skip"),
        (["--size=15"], "must be a multiple of 2"),
        (["--path="], "--path and --vae are required"),
        (["--path=/nowhere"], "cannot read /nowhere"),
        (["--vae=kl"], "write vae:DIR or taesd:DIR"),
        (["--vae=vae:/nowhere"], "no checkpoint in /nowhere"),
        (["--batch=0"], "at least 1"),
    ],
)
def test_refusals(made, tmp_path, args, words):
    one_line(prepare(made[0], tmp_path / "out", *args), words)
    assert not list(tmp_path.glob("out/*.array_record*")) or "unreadable" in words
    assert not list(tmp_path.glob("out/manifest.json"))


def test_a_folder_with_other_files_is_refused(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    one_line(prepare(made[0], tmp_path), "other files (thesis.tex)")
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_two_on_one_folder_are_refused(made, tmp_path):
    with locked(tmp_path):
        one_line(prepare(made[0], tmp_path), "is in use by process")


def test_the_manifest_has_the_classes_and_training_and_sampling_use_them(made):
    root, _, _ = made
    source = CacheSource(str(root / "cache"))
    counts = {"counts": {"0": 4, "1": 3, "2": 4}, "names": ["class0", "class1", "class2"]}
    assert source.manifest.labels == counts
    assert source.classes().trained(5).tolist() == [0, 1, 2]
    assert "left out 1 pictures that could not be read" in source.notes()[0]


def test_a_cache_of_an_earlier_version_is_read_and_gone_on_with(made, tmp_path):
    root, _, _ = made
    old = tmp_path / "cache"
    shutil.copytree(root / "cache", old)
    values = json.loads((old / "manifest.json").read_text())
    labels = values.pop("labels")
    (old / "manifest.json").write_text(json.dumps(values))
    assert CacheSource(str(old)).classes() is None
    lost = next(old.glob("shard-00001*"))
    whole = lost.read_bytes()
    lost.unlink()
    code, _, err = prepare(root, old)
    assert code == 0, err
    assert lost.read_bytes() == whole
    assert json.loads((old / "manifest.json").read_text())["labels"] == labels


@pytest.mark.parametrize(
    ("half", "layer"),
    [("taesd", np.inf), ("vae", np.nan), ("vae", 3e38)],
)
def test_an_encoding_that_is_not_finite_names_picture_and_autoencoder(made, tmp_path, half, layer):
    root, _, _ = made
    config = {"taesd": TINY_TAESD, "vae": TINY_KL}[half]
    params = jax.tree.map(np.array, Autoencoder(config).init(0))
    for leaf in jax.tree.leaves(params["encoder"]):
        leaf.flat[0] = layer
    save_autoencoder(tmp_path / "bad", half, config, params, "float32")
    result = prepare(root, tmp_path / "cache", f"--vae={half}:{tmp_path}/bad")
    sha = Encoder.parse(f"{half}:{tmp_path}/bad", "--vae").identity()["sha256"]
    named = f"class0/0.JPEG of {root}/train: its encoding by the autoencoder ({half} {sha[:12]})"
    one_line(result, named)
    assert not list((tmp_path / "cache").glob("shard*"))
