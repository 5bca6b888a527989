"""Folders of samples: shards, damage, other settings, a full disk, the files at the end."""

import json
import resource

import numpy as np
import pytest
from PIL import Image

from ppflow_jax.errors import InputError, RunError
from ppflow_jax.generate import folder
from ppflow_jax.generate.folder import SampleFolder

SETTINGS = {"num": 10, "save_latents": True, "cfg": (1.0, 2.0), "seed": 0}
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (10, 8, 8, 3), np.uint8)
LATENTS = RNG.normal(size=(10, 4, 4, 4)).astype(np.float32)
LABELS = np.arange(10, dtype=np.int32) % 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(folder, "SHARD", 4)


def begin(path, **changes):
    folder = SampleFolder(path, SETTINGS | changes)
    folder.start(first=True)
    return folder


def write(folder, shards):
    for s in shards:
        part = np.array(folder.shards.records(s))
        folder.write(s, PICTURES[part], LATENTS[part])


def test_files_at_the_end(tmp_path):
    folder = begin(tmp_path)
    assert not folder.complete
    write(folder, [2, 0, 1])
    assert folder.shards.done() == 10
    folder.finish(LABELS, pngs=True, results={"nfe": 7})
    with np.load(tmp_path / "samples.npz") as made:
        np.testing.assert_array_equal(made["arr_0"], PICTURES)
        np.testing.assert_array_equal(made["arr_1"], LABELS)
        assert (made["arr_0"].dtype, made["arr_1"].dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), LATENTS)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), LABELS)
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert len(names) == 10 and names[5] == "000005_class2.png"
    np.testing.assert_array_equal(Image.open(tmp_path / "images" / names[5]), PICTURES[5])
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["complete"] and card["nfe"] == 7 and card["settings"]["cfg"] == [1.0, 2.0]
    assert not (tmp_path / "shards").exists()
    assert SampleFolder(tmp_path, SETTINGS).complete


def test_one_shard_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """The joined file never asks for an array of more than a shard."""
    folder = begin(tmp_path)
    write(folder, range(3))
    sizes, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: sizes.append(len(load(*a, **k))) or load(*a))
    monkeypatch.setattr(np, "concatenate", None)
    folder.finish(LABELS, pngs=False, results={})
    assert max(sizes) == 4


def test_processes_share_the_shards_and_keep_what_is_there(tmp_path):
    folder = begin(tmp_path)
    assert [folder.claim(p, 2) for p in range(2)] == [[0, 2], [1]]
    write(folder, [0, 1])
    again = begin(tmp_path)
    assert [again.claim(p, 2) for p in range(2)] == [[2], []]
    assert again.shards.done() < 10


@pytest.mark.parametrize("damage", ["cut", "empty", "latents gone", "another length"])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    folder = begin(tmp_path)
    write(folder, range(3))
    pictures = tmp_path / "shards" / "000001.npy"
    if damage == "cut":
        pictures.write_bytes(pictures.read_bytes()[:-1])
    elif damage == "empty":
        pictures.write_bytes(b"")
    elif damage == "latents gone":
        (tmp_path / "shards" / "000001.latents.npy").unlink()
    else:
        np.save(pictures, PICTURES[:3])
    assert folder.shards.done() < 10
    assert folder.claim(0, 1) == [1] and not pictures.exists()


def test_other_settings_are_refused_by_name(tmp_path):
    write(begin(tmp_path), [0])
    with pytest.raises(
        InputError, match=r"part of 10 images.*\(cfg: \[1.0, 2.0\] -> .*, seed: 0 -> 1\)"
    ):
        SampleFolder(tmp_path, {**SETTINGS, "seed": 1, "cfg": (1.0, 3.0)})
    with pytest.raises(InputError, match="steps: None -> 4"):
        SampleFolder(tmp_path, SETTINGS | {"steps": 4})
    assert (tmp_path / "shards" / "000000.npy").exists()


def test_a_card_that_cannot_be_read(tmp_path):
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(InputError, match=r"card\.json cannot be read"):
        SampleFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize("moment", ["shard", "end"])
def test_a_full_disk_leaves_what_can_be_gone_on_with(tmp_path, moment):
    folder = begin(tmp_path)
    write(folder, [0] if moment == "shard" else range(3))
    kept = sorted(p.name for p in tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(RunError, match="of 10 are kept: make room, and give the same"):
            if moment == "shard":
                write(folder, [1])
            else:
                folder.finish(LABELS, pngs=False, results={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.rglob("*")) == kept
    again = begin(tmp_path)
    write(again, again.claim(0, 1))
    again.finish(LABELS, pngs=False, results={})
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_0"], PICTURES)
