import itertools

import numpy as np
import pytest

from ppflow_jax.data.pipeline import batches
from ppflow_jax.data.sources import ArraySource, digits, open_source
from ppflow_jax.errors import InputError


def counting(n):
    """Source whose label is the index."""
    x = np.zeros((n, 2, 2, 1), np.float32)
    return ArraySource("counting", x, np.arange(n))


def labels(count, **options):
    options = dict(batch_size=4, seed=0, first_step=0) | options
    stream = batches(counting(10), **options)
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
    assert len(source) == 1797 and source.shape == (8, 8, 1)
    assert source.x.min() == -1 and source.x.max() == 1
    source.check_fits((8, 8, 1), 10)


def test_arrays_are_read_from_a_folder(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float16)
    np.save(tmp_path / "latents.npy", x)
    np.save(tmp_path / "labels.npy", np.arange(5))
    source = open_source("arrays", str(tmp_path))
    assert source[3]["x"].dtype == np.float32 and source[3]["label"] == 3
    np.testing.assert_array_equal(source[3]["x"], x[3].astype(np.float32))


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
