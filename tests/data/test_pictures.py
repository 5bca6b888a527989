import pickle
import sys

import numpy as np
import pytest

from ppflow_jax.data.pictures import UnreadablePicture
from ppflow_jax.data.sources import open_source
from ppflow_jax.data.transforms import center_crop, decode
from ppflow_jax.errors import InputError
from tests.pictures import folder, tfds_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pictures") / "train")


@pytest.fixture(scope="module")
def dataset(root, tmp_path_factory):
    files = sorted(root.glob("*/*.JPEG"))
    labels = [i // 4 for i in range(12)]
    return tfds_dataset(tmp_path_factory.mktemp("tfds"), files, labels, 3)


def names(d):
    return dict(image="picture", label="category") | d


def test_folders_are_numbered_and_ordered_as_imagefolder_does(root, tmp_path):
    tree = folder(tmp_path / "b", classes=2, per_class=1)
    (tree / "Z").mkdir()  # capitals sort first
    (tree / "class0" / "deep").mkdir()
    picture = (tree / "class0" / "0.JPEG").read_bytes()
    for name in ("Z/10.png", "Z/9.webp", "class0/deep/a.jpg", "class0/readme.txt"):
        (tree / name).write_bytes(picture)
    (tree / "list.txt").write_text("not a class")
    source = open_source("folder", str(tree), size=16)
    assert source.files == [
        "Z/10.png",
        "Z/9.webp",
        "class0/0.JPEG",
        "class0/deep/a.jpg",
        "class1/0.JPEG",
    ]
    assert source.labels.tolist() == [0, 0, 1, 1, 2] and source.num_classes == 3


def test_pictures_are_cropped_and_mirrored(root):
    source = open_source("folder", str(root), size=16)
    batch = source.read(np.array([5, 5, 0]), np.array([False, True, False]))
    plain = center_crop(decode((root / "class1" / "1.JPEG").read_bytes()), 16)
    np.testing.assert_array_equal(batch["image"][0], plain)
    np.testing.assert_array_equal(batch["image"][1], plain[:, ::-1])
    assert batch["label"].tolist() == [1, 1, 0] and batch["unreadable"].tolist() == [-1] * 3


def test_tfds_gives_the_same_pictures_without_tensorflow(root, dataset):
    ours = open_source("folder", str(root), size=16)
    theirs = open_source("tfds", dataset, size=16, **names({}))
    assert len(theirs) == 12 and theirs.num_classes == 3
    every = np.arange(12)
    a, b = (s.read(every, every > 99) for s in (ours, pickle.loads(pickle.dumps(theirs))))
    rows = {batch["image"][i].tobytes(): batch["label"][i] for batch in (a,) for i in every}
    assert rows == {b["image"][i].tobytes(): b["label"][i] for i in every} and len(rows) == 12
    assert "tensorflow" not in sys.modules


def test_the_next_readable_picture_stands_in(tmp_path):
    tree = folder(tmp_path / "train")
    for name in ("class0/3", "class1/0", "class2/3"):
        (tree / f"{name}.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    source = open_source("folder", str(tree), size=16)
    batch = source.read(np.array([3, 11, 5, 4]), np.zeros(4, bool))
    good = source.read(np.array([5, 0, 5, 5]), np.zeros(4, bool))
    np.testing.assert_array_equal(batch["image"], good["image"])
    assert batch["label"].tolist() == [1, 0, 1, 1]
    assert batch["unreadable"].tolist() == [3, 11, -1, 4]
    with pytest.raises(UnreadablePicture, match=r"class0/3\.JPEG \(.+\)"):
        source.load(3)
    for file in tree.glob("*/*"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="not one of 12 pictures"):
        source.read(np.array([0]), np.array([False]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: None, "No such file"),
        (lambda d: d.mkdir(), "has no directories"),
        (lambda d: (d / "empty").mkdir(parents=True), "empty has no pictures"),
    ],
)
def test_folders_that_are_refused(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=words) as error:
        open_source("folder", str(tmp_path / "x"), size=16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (names({"split": "test"}), "Unknown split"),
        (names({"image": "image"}), "no feature 'image': it has category, file, picture"),
        (names({"label": "file"}), "no encoded picture and class"),
        (names({"image": "category"}), "split|picture and class"),
    ],
)
def test_tfds_datasets_that_are_refused(dataset, options, words):
    with pytest.raises(InputError, match=words) as error:
        open_source("tfds", dataset, size=16, **options)
    assert "\n" not in str(error.value)


def test_misfits_are_refused(root, tmp_path):
    with pytest.raises(InputError, match="labels from 0 to 2, the model has classes 0 to 1"):
        open_source("folder", str(root), size=16).check_fits((16, 16, 3), 2)
    with pytest.raises(InputError, match="no TFDS dataset"):
        open_source("tfds", str(tmp_path), size=16)
