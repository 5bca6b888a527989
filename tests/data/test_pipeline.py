import itertools

import numpy as np
import pytest
from PIL import Image

from ppflow_jax.data.pipeline import Stream
from ppflow_jax.data.sources import ArraySource, digits, open_source
from ppflow_jax.errors import InputError
from tests.pictures import encoded


def counting(n):
    """Source whose label is the index."""
    x = np.zeros((n, 2, 2, 1), np.float32)
    return ArraySource("counting", x, np.arange(n))


def labels(count, **options):
    options = dict(batch_size=4, seed=0, first_step=0, num_classes=10) | options
    first = options.pop("first_step")
    stream = Stream(counting(10), **options).batches(first)
    return [b["label"].tolist() for b in itertools.islice(stream, count)]


def test_an_epoch_has_every_example_once_and_the_next_another_order():
    flat = list(itertools.chain(*labels(5)))
    assert sorted(flat[:10]) == list(range(10)) == sorted(flat[10:])
    assert flat[:10] != flat[10:]
    assert labels(5, seed=1) != labels(5)


def test_resuming_continues_the_stream():
    assert labels(9)[4:] == labels(5, first_step=4)


@pytest.mark.parametrize("rows", [([0, 1], [2, 3]), ([0, 3], [1, 2])])
def test_processes_share_the_global_batch(rows):
    whole = labels(5, first_step=3)
    parts = [labels(5, first_step=3, rows=np.array(r)) for r in rows]
    for batch, *shared in zip(whole, *parts):
        assert [[batch[i] for i in r] for r in rows] == shared


def test_digits_are_in_range():
    source = digits()
    assert len(source) == 1797
    assert source.x.min() == -1 and source.x.max() == 1
    source.check_fits((8, 8, 1), 10)


def test_arrays_are_read_from_a_folder(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float16)
    np.save(tmp_path / "latents.npy", x)
    np.save(tmp_path / "labels.npy", np.arange(5))
    source = open_source("arrays", str(tmp_path))
    batch = source.read(np.array([3, 1]), np.array([True, False]))
    assert batch["x"].dtype == np.float32 and batch["label"].tolist() == [3, 1]
    np.testing.assert_array_equal(batch["x"], x[[3, 1]].astype(np.float32))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda d: (d / "latents.npy").unlink(), "latents.npy"),
        (lambda d: (d / "latents.npy").write_bytes(b"\x93NUMPY"), "cannot read"),
        (lambda d: np.save(d / "latents.npy", np.zeros((3, 4, 4, 2), np.uint8)), "floating point"),
        (lambda d: np.save(d / "latents.npy", np.zeros((3, 4, 5, 2), np.float32)), "size, size"),
        (lambda d: np.save(d / "latents.npy", np.zeros((0, 4, 4, 2), np.float32)), "no examples"),
        (lambda d: np.save(d / "labels.npy", np.zeros(4, int)), "labels must be integers"),
        (lambda d: np.save(d / "labels.npy", np.zeros(3)), "labels must be integers"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, write, words):
    np.save(tmp_path / "latents.npy", np.zeros((3, 4, 4, 2), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(3, int))
    write(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        open_source("arrays", str(tmp_path))
    assert "\n" not in str(error.value)


def test_misfits_are_refused():
    with pytest.raises(InputError, match="labels from 0 to 9, the model has classes 0 to 4"):
        counting(10).check_fits((2, 2, 1), 5)
    with pytest.raises(InputError, match="model expects"):
        counting(10).check_fits((4, 4, 1), 10)
    with pytest.raises(InputError, match=r"config\.data\.path"):
        open_source("arrays", "")
    with pytest.raises(InputError, match="unknown data source"):
        open_source("imagenet", "")


def numbered(tmp_path, broken=()):
    """A folder of 12 flat pictures whose grey level is ten times their index."""
    for i in range(12):
        file = tmp_path / f"class{i // 4}" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        image = np.full((8, 8), 10 * i, np.uint8)
        image[:, :4] += 5  # brighter on the left
        data = encoded(Image.fromarray(image), "png")
        file.write_bytes(data[:30] if i in broken else data)
    return open_source("folder", str(tmp_path), size=8)


def take(source, count, **options):
    options = dict(batch_size=4, seed=0, first_step=0, num_classes=3) | options
    given = options.pop("first_step"), options.pop("report", print)
    return list(itertools.islice(Stream(source, **options).batches(*given), count))


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
    )


def test_worker_processes_do_not_change_the_stream(tmp_path):
    source = numbered(tmp_path)
    plain = take(source, 7, first_step=2, flip=True)
    assert same(plain, take(source, 7, first_step=2, flip=True, workers=2))


def test_flips_belong_to_the_position_in_the_stream(tmp_path):
    source = numbered(tmp_path)
    whole = take(source, 30, flip=True)
    assert same(whole[4:], take(source, 26, first_step=4, flip=True))
    parts = [take(source, 30, flip=True, rows=np.array(r)) for r in ([0, 3], [1, 2])]
    for batch, first, second in zip(whole, *parts):
        np.testing.assert_array_equal(batch["image"][[0, 3]], first["image"])
        np.testing.assert_array_equal(batch["image"][[1, 2]], second["image"])
    mirrored = np.array([b["image"][:, 0, 0, 0] < b["image"][:, 0, -1, 0] for b in whole]).ravel()
    assert 40 < mirrored.sum() < 80
    plain = take(source, 30)
    for a, b in zip(whole, plain):
        np.testing.assert_array_equal(a["image"].mean((1, 2, 3)), b["image"].mean((1, 2, 3)))
    # An example is not mirrored at every visit, nor at none
    visits = {}
    for flipped, value in zip(
        mirrored, np.concatenate([b["image"].mean((1, 2, 3)) for b in plain])
    ):
        visits.setdefault(float(value), set()).add(bool(flipped))
    assert all(kinds == {True, False} for kinds in visits.values()) and len(visits) == 12


def test_unreadable_pictures_stop_the_stream_or_are_named_once(tmp_path):
    source = numbered(tmp_path, broken=(3, 7))
    with pytest.raises(InputError, match=r"cannot read class\d/0[37]\.png \(.+unreadable=skip"):
        take(source, 3)
    said = []
    first = take(source, 9, skip_unreadable=True, report=said.append)
    assert len(said) == 2 and {"class0/03.png", "class1/07.png"} == {s.split()[2] for s in said}
    assert "(1 of 12 so far)" in said[0] and "(2 of 12 so far)" in said[1]
    again = take(source, 5, first_step=4, skip_unreadable=True, report=said.append)
    assert same(first[4:], again)
    # In every epoch pictures 4 and 8 are seen twice, in place of 3 and 7
    seen = sorted(int(v) // 10 for b in first[:3] for v in b["image"][:, 0, -1, 0])
    assert seen == [0, 1, 2, 4, 4, 5, 6, 8, 8, 9, 10, 11]


def test_labels_are_checked_as_they_come():
    with pytest.raises(InputError, match="the model has classes 0 to 4"):
        labels(3, num_classes=5)
