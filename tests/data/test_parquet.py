"""Parquet shards and folders of Hugging Face `datasets` as sources."""

import json
import pickle
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppflow_jax.data.classes import describe
from ppflow_jax.data.images import open_images
from ppflow_jax.data.pictures import UnreadablePicture
from ppflow_jax.data.pipeline import Stream
from ppflow_jax.data.sources import open_source
from ppflow_jax.data.tables import RowGroups
from ppflow_jax.errors import InputError
from tests import commands, tables
from tests.pictures import folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pictures") / "train")


@pytest.fixture(scope="module")
def rows(root):
    """The pictures of `root` in its order."""
    return tables.table(
        [f.read_bytes() for f in sorted(root.glob("*/*"))], [0] * 4 + [1] * 4 + [2] * 4
    )


def opened(path, **options):
    return open_source("parquet", str(path), size=16, **options)


def everything(source):
    batch = source.read(np.arange(len(source)), np.arange(len(source)) % 2 == 1)
    return batch["image"].tobytes(), batch["label"].tolist(), batch["unreadable"].tolist()


@pytest.mark.parametrize(
    "make",
    [
        tables.pushed,
        tables.saved,
        lambda d, t: tables.saved(d, t, 1, None),
        lambda d, t: tables.saved_splits(d, test=t.slice(0, 2), train=t),
        lambda d, t: tables.pushed(tables.pushed(d, t.slice(0, 3), 1, "test"), t, 5),
        lambda d, t: tables.pushed(d, t) / "data",
        lambda d, t: tables.pushed(d, t) / "data" / "train-0000*.parquet",
        lambda d, t: tables.pushed(d, t, 1) / "data" / "train-00000-of-00001.parquet",
    ],
)
def test_every_layout_gives_the_pictures_of_the_folder(make, root, rows, tmp_path):
    source = opened(make(tmp_path / "d", rows))
    assert everything(source) == everything(open_source("folder", str(root), size=16))
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    assert source.classes().names == ("ant", "bee", "cat") and source.num_classes == 3
    assert source.classes().counts == {0: 4, 1: 4, 2: 4}
    assert describe(source) == ["classes: 0 ant (4), 1 bee (4), 2 cat (4)"]


def test_splits_and_names_of_columns(rows, tmp_path):
    d = tables.saved_splits(tmp_path / "d", train=rows, test=rows.slice(4, 2))
    assert opened(d, split="test").labels.tolist() == [1, 1]
    assert len(opened(d / "test", split="test")) == 2
    bare = rows.rename_columns(["img", "fine"]).replace_schema_metadata({})
    bare = bare.set_column(0, "img", pa.array([c["bytes"] for c in rows["image"].to_pylist()]))
    (tmp_path / "p" / "validation").mkdir(parents=True)
    pq.write_table(bare, tmp_path / "p" / "validation" / "0000.parquet")
    source = opened(tmp_path / "p", split="validation", image="img", label="fine")
    assert source.labels.tolist() == rows["label"].to_pylist() and source.classes().names == ()
    infos = {"default": {"features": {"fine": tables.FEATURES["label"]}}}
    (tmp_path / "p" / "dataset_infos.json").write_text(json.dumps(infos))
    source = opened(tmp_path / "p", split="validation", image="img", label="fine")
    assert source.classes().names == ("ant", "bee", "cat")


def test_the_stream_begins_at_any_step(rows, tmp_path):
    source = opened(tables.pushed(tmp_path / "d", rows))
    stream = Stream(source, batch_size=5, seed=3, num_classes=3, flip=True)
    every = [next(batches) for batches in [stream.batches()] for _ in range(7)]
    later = next(stream.batches(5))
    np.testing.assert_array_equal(later["image"], every[5]["image"])
    assert not np.array_equal(every[4]["image"], every[5]["image"])


@pytest.mark.long
def test_a_run_that_is_continued_has_the_same_bits(rows, tmp_path):
    args = [f"--config.data.path={tables.pushed(tmp_path / 'd', rows)}", "--config.data.flip=True"]
    args += ["--config.data.source=parquet", "--config.data.space=pixels"]
    args += ["--config.model.channels=3", "--config.model.num_classes=3"]
    code, out, err = commands.train(tmp_path / "run", *args)
    assert code == 0 and "0 ant (4), 1 bee (4), 2 cat (4)" in out, err
    whole = commands.weights(tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    code, out, err = commands.train(tmp_path / "run", *args)
    assert code == 0 and "continuing from step 2" in out, err
    again = commands.weights(tmp_path / "run")
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_identity_tells_datasets_apart(rows, tmp_path):
    names = {"a": rows, "b": rows.slice(1), "c": rows.set_column(1, "label", pa.array([0] * 12))}
    found = [opened(tables.pushed(tmp_path / n, t)).identity() for n, t in names.items()]
    assert len({f["rows_sha256"] for f in found}) == 3
    assert found[0]["path"] == str(tmp_path / "a") and found[0]["split"] == "train"
    again = opened(tables.pushed(tmp_path / "d", rows)).identity()
    assert again["rows_sha256"] == found[0]["rows_sha256"]


def test_row_groups_are_decoded_once_in_order_and_kept_within_bounds(rows, tmp_path):
    source = opened(tables.pushed(tmp_path / "d", rows, count=1, group=3))
    (table,) = source._tables
    table._groups.most = 1  # one at a time
    read, asked = table._read, []
    table._read = lambda group, name: asked.append(group) or read(group, name)
    for index in range(12):
        source.fetch(index)
    assert asked == [0, 1, 2, 3] and len(table._groups._kept) == 1
    for index in (0, 11, 0):
        source.fetch(index)
    assert asked[4:] == [0, 3, 0]
    table._groups.most = 2**20
    for index in (0, 11, 0):
        source.fetch(index)
    assert asked[7:] == [3]


def test_threads_that_want_the_same_read_it_once():
    groups, calls, inside = RowGroups(), [], threading.Event()

    def slow():
        calls.append(1)
        inside.wait(5)
        return np.zeros(3)

    threads = [threading.Thread(target=groups.get, args=("k", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    inside.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError):
        groups.get("z", lambda: 1 / 0)
    assert groups.get("z", lambda: np.ones(2)).sum() == 2  # a failure is not kept


def test_cells_without_a_picture_are_unreadable(rows, tmp_path):
    pictures = [cell["bytes"] for cell in rows["image"].to_pylist()]
    pictures[1], pictures[2] = None, b"\xff\xd8 no picture"
    source = opened(tables.saved(tmp_path / "d", tables.table(pictures, [0] * 12)))
    batch = source.read(np.array([1, 2, 3]), np.zeros(3, bool))
    assert batch["unreadable"].tolist() == [1, 2, -1]
    assert (batch["image"] == batch["image"][2]).all()
    with pytest.raises(UnreadablePicture, match=r"arrow\[1\] \(no picture in it, only the path 1"):
        source.load(1)


def test_damage_is_found(rows, tmp_path):
    d = tables.pushed(tmp_path / "d", rows, count=1, group=3)
    path = d / "data" / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    picture = rows["image"][4].as_py()["bytes"]
    where = whole.index(picture[-200:-160]) + 20
    path.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    source = opened(d)
    source.load(0)
    with pytest.raises(UnreadablePicture, match=r"parquet\[4\] \(.*CRC"):
        source.load(4)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read data/train-00000-of"):
        opened(d)
    d = tables.saved(tmp_path / "s", rows)
    path = d / "data-00001-of-00002.arrow"
    whole = path.read_bytes()
    for end in (whole[:-8], whole[: len(whole) // 2], b""):  # at the end of a message, and inside
        path.write_bytes(end)
        with pytest.raises(InputError, match="cannot read data-00001-of") as error:
            opened(d)
        assert "\n" not in str(error.value)


def label(values):
    return lambda d, t: tables.pushed(d, t.set_column(1, "label", pa.array(values)), 1)


def mixed(d, t):
    tables.pushed(d, t)
    small = t.set_column(1, "label", pa.array([0] * 12, pa.int16()))
    pq.write_table(small, d / "data" / "train-00001-of-00002.parquet")
    return d


def renamed(d, t):
    tables.pushed(d, t)
    other = tables.table([None], [0], {"label": {"names": ["cat", "ant", "bee"]}})
    pq.write_table(other, d / "data" / "train-00001-of-00002.parquet")
    return d


def without(name):
    def make(d, t):
        made = tables.saved_splits if "dict" in name or "/" in name else tables.saved
        made(d, **{"train": t}) if made is tables.saved_splits else made(d, t)
        (d / name).unlink()
        return d

    return make


def lacking(d, t):
    tables.pushed(d, t, 4)
    (d / "data" / "train-00002-of-00004.parquet").unlink()
    return d


def twice(d, t):
    tables.pushed(d, t, 2)
    return tables.pushed(d, t, 3)


def two_folders(d, t):
    tables.pushed(d / "en", t)
    tables.pushed(d / "fr", t)
    return d


def selected(d, t):
    tables.saved(d, t)
    state = json.loads((d / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (d / "state.json").write_text(json.dumps(state))
    return d


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda d, t: d, {}, "nothing is there"),
        (lambda d, t: d / "x.parquet", {}, "nothing is there"),
        (lambda d, t: tables.pushed(d, t) / "data" / "x*.parquet", {}, "no .parquet files of that"),
        (lambda d, t: folder(d), {}, "no .parquet files and no state.json: it has class0/0.JPEG"),
        (tables.pushed, {"split": "test"}, "no split 'test': it has train"),
        (tables.saved, {"split": "test"}, "is the split train, not test"),
        (tables.pushed, {"image": "picture"}, "no column 'picture': it has image, label; set"),
        (tables.saved, {"label": "class"}, "no column 'class': it has image, label; set"),
        (tables.pushed, {"image": "label"}, "column 'label' of .* is int64, not encoded pictures"),
        (tables.pushed, {"label": "image"}, "column 'image' of .* not whole numbers"),
        (label(["a"] * 12), {}, "is string, not whole numbers or a ClassLabel"),
        (label([0.0] * 12), {}, "is double, not whole numbers"),
        (label([0, None] * 6), {}, r"parquet\[1\] has no label \(6 such in it\)"),
        (label([0] * 11 + [-1]), {}, r"parquet\[11\] has the label -1"),
        (label([0] * 11 + [2**40]), {}, r"parquet\[11\] has the label 1099511627776"),
        (label([0, 1, 2] * 3 + [3] * 3), {}, r"parquet\[9\] has the label 3, .* has 3 names"),
        (lambda d, t: tables.pushed(d, t.slice(0, 0), 1), {}, "no examples"),
        (lambda d, t: tables.saved(d, t.slice(0, 0), 1), {}, "no examples"),
        (mixed, {}, "'label' is int64 in data/train-00000.* and int16 in data/train-00001"),
        (renamed, {}, "train-00001-of-00002.parquet names other classes"),
        (without("data-00001-of-00002.arrow"), {}, "data-00001-of-00002.arrow is missing"),
        (without("train/state.json"), {}, "train has no state.json"),
        (lacking, {}, "has shards 0, 1, 3 of 4 of the split train"),
        (twice, {}, "has two sets of shards of the split train"),
        (two_folders, {}, "the split train in en/data and fr/data"),
        (selected, {}, "a selection of other rows"),
    ],
)
def test_datasets_that_are_refused(make, options, words, rows, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        opened(make(tmp_path / "d", rows), **options)
    assert "\n" not in str(error.value)


def test_large_row_groups_are_said(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("ppflow_jax.data.parquet.LARGE", 1000)
    source = opened(tables.pushed(tmp_path / "d", rows, 1, group=12))
    assert "row groups of 12 pictures" in source.notes()[0]
    assert opened(tables.saved(tmp_path / "s", rows)).notes() == []


def test_files_without_a_split_beside_others_are_said(rows, tmp_path):
    d = tables.pushed(tmp_path / "d", rows)
    pq.write_table(rows.slice(0, 1), d / "stray.parquet")
    (note,) = opened(d).notes()
    assert note.endswith("not read, as their names have no split: stray.parquet")
    assert len(opened(d)) == 12


def test_a_reference_of_pictures(rows, root, tmp_path):
    ours = open_images(str(tables.pushed(tmp_path / "d", rows)), 16)
    theirs = open_images(str(root), 16)
    assert ours.shape == theirs.shape and ours.count == 12
    assert all((a == b).all() for a, b in zip(ours.batches(5), theirs.batches(5)))
    unlabelled = rows.drop_columns(["label"])
    pq.write_table(unlabelled, tmp_path / "x.parquet")
    assert open_images(str(tmp_path / "x.parquet"), 16).count == 12
    with pytest.raises(InputError, match="give --size=N"):
        open_images(str(tmp_path / "d"))
    tables.pushed(tmp_path / "d", rows, 1, "test")
    with pytest.raises(InputError, match="has the splits test, train"):
        open_images(str(tmp_path / "d"), 16)
