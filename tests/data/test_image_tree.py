"""Image trees as people have them: what counts as a picture, and of which class."""

from __future__ import annotations

import os
import pickle
import re
import subprocess

import numpy as np
import pytest

from ppflow_jax.data.classes import Classes, describe
from ppflow_jax.data.pictures import Folder, UnreadablePicture
from ppflow_jax.errors import InputError
from tests.acceptance.awkward_trees import PAIRS, TREES, ZIPS, make_tree, make_zip, packed, png


def read(path):
    """Labels by class, and what is said, of a source all of whose pictures are read."""
    source = Folder(str(path), 16)
    for index in range(len(source)):
        source.load(index)
    classes = source.classes()
    names = classes.names
    counts = {names[k] if names else k: n for k, n in classes.counts.items()}
    return counts, "\n".join(describe(source))


def expect(path, refused, says, labels):
    if refused:
        with pytest.raises((InputError, UnreadablePicture)) as error:
            read(path)
        text = str(error.value)
        assert "\n" not in text and re.search(says.removeprefix("cannot read "), text), text
    else:
        counts, said = read(path)
        assert counts == labels and re.search(says, said), (counts, said)


@pytest.mark.parametrize("name", TREES)
def test_trees(tmp_path, name):
    files, links, code, says, labels = TREES[name]
    expect(make_tree(tmp_path, files, links), code, says, labels)


@pytest.mark.parametrize("name", ZIPS)
def test_zips(tmp_path, name):
    files, code, says, labels = ZIPS[name]
    expect(make_zip(tmp_path / "a.zip", files), code, says, labels)


def test_a_zip_is_read_by_worker_processes_as_its_folder_is(tmp_path):
    folder = Folder(str(make_tree(tmp_path / "tree", packed(PAIRS), {})), 16)
    archive = Folder(str(make_zip(tmp_path / "a.zip", packed(PAIRS))), 16)
    archive.load(0)
    copy = pickle.loads(pickle.dumps(archive))
    every, flips = np.arange(4), np.zeros(4, bool)
    ours, theirs = folder.read(every, flips), copy.read(every, flips)
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    assert ours["label"].tolist() == theirs["label"].tolist() == [3, 0, 3, 1]
    assert folder.identity()["names_sha256"] == archive.identity()["names_sha256"]


def test_labels_of_a_packed_folder_are_part_of_its_identity(tmp_path):
    other = [[name, label + 1] for name, label in PAIRS]
    a, b = (
        Folder(str(make_tree(tmp_path / str(k), packed(pairs), {})), 16).identity()
        for k, pairs in enumerate((PAIRS, other))
    )
    assert a["names_sha256"] != b["names_sha256"]


def test_pipes_are_not_read(tmp_path):
    root = make_tree(tmp_path, {"cat/a.png": png(), "dog/b.png": png(1)}, {})
    os.mkfifo(root / "cat" / "pipe.png")
    counts, said = read(root)
    assert counts == {"cat": 1, "dog": 1} and "1 pipes, sockets or devices" in said


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path):
    root = make_tree(tmp_path, {"cat/a.png": png()}, {})
    with (root / "cat" / "b.png").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UnreadablePicture, match=r"cat/b\.png \(8,589,934,592 bytes"):
        read(root)


def test_trees_of_any_depth(tmp_path):
    deep = "/".join(["cat"] + ["d"] * 1200)
    here = tmp_path / "data"
    os.makedirs(here / "cat")
    (here / "cat" / "a.png").write_bytes(png())
    folder = os.open(here, os.O_RDONLY)
    try:
        for part in deep.split("/"):
            if part == "d":
                os.mkdir(part, dir_fd=folder)
            inner = os.open(part, os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
    finally:
        os.close(folder)
    try:
        assert read(here)[0] == {"cat": 1}
    finally:
        subprocess.run(["rm", "-rf", str(here)], check=True)  # shutil.rmtree recurses


def test_class_names_and_missing_classes_are_said():
    classes = Classes.of(np.int32([2, 7, 7]), ())
    assert classes.notes(10) == [
        "labels: 2 of the model's 10 classes have examples (2 (1), 7 (2)); 8 are never trained"
    ]
    assert classes.notes(2) == [] and classes.trained(10).tolist() == [2, 7]
    assert Classes().trained(3).tolist() == [0, 1, 2]
    many = Classes.of(np.arange(1000), [f"n{k}" for k in range(1000)])
    assert many.notes(1000)[0].endswith("9 n9 (1) and 990 more")
    assert Classes.from_json(many.to_json()) == many
