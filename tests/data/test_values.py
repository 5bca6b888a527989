"""Latents that cannot be trained on are named before they reach a device."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ppflow_jax.data.cache import CacheSource, Manifest, encode_record
from ppflow_jax.data.pipeline import Stream
from ppflow_jax.data.records import WRITER_OPTIONS, Shard, sha256
from ppflow_jax.data.sources import ArraySource
from ppflow_jax.errors import InputError
from tests.commands import train
from tests.data.test_pipeline import numbered

N = 24


class Moments:
    """Means and deviations in memory, as a cache gives them."""

    name = "moments"

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __len__(self):
        return len(self.mean)

    def read(self, indices, flips):
        label = np.int32(indices % 10)
        return {"mean": self.mean[indices], "std": self.std[indices], "label": label}

    def identity(self):
        return {}

    def check_fits(self, shape, num_classes):
        pass

    def classes(self):
        return None

    def notes(self):
        return []


def flawed(array, value, dtype=np.float32, row=7):
    """A source of `N` examples of which one has one bad value."""
    arrays = {k: np.ones((N, 4, 4, 2), dtype) for k in ("x", "mean", "std")}
    arrays[array][row, 1, 2, 1] = value
    if array == "x":
        return ArraySource("folder", arrays["x"], np.arange(N) % 10)
    return Moments(arrays["mean"], arrays["std"])


def epoch(source, **options):
    options = dict(batch_size=8, seed=0, num_classes=10) | options
    return list(itertools.islice(Stream(source, **options).batches(), 3))


@pytest.mark.parametrize(
    ("array", "value", "dtype", "said"),
    [
        ("x", np.nan, np.float32, "x has 1 of 32 values that are NaN or infinite"),
        ("x", -np.inf, np.float32, "x has 1 of 32"),
        ("x", np.inf, np.float16, "x has 1 of 32"),
        ("x", 1e300, np.float64, "x has 1 of 32"),
        ("mean", np.nan, np.float32, "mean has 1 of 32"),
        ("std", np.inf, np.float32, "std has 1 of 32"),
        ("std", -0.25, np.float32, r"std is negative \(-0.25\)"),
    ],
)
def test_the_example_is_named(array, value, dtype, said, workers=0):
    source = flawed(array, value, dtype)
    words = rf"example 7 \(label 7\) of (folder|moments): {said}.*: mend or remove it"
    with warnings.catch_warnings(), pytest.raises(InputError, match=words) as error:
        warnings.simplefilter("error")
        epoch(source, workers=workers)
    assert "\n" not in str(error.value)


def test_so_it_is_where_other_processes_read():
    test_the_example_is_named("x", np.nan, np.float32, "x has 1 of 32", workers=2)
    test_the_example_is_named("std", -0.25, np.float32, "std is negative", workers=2)


def test_only_the_process_that_reads_it_complains():
    """And it names the example of the dataset, whatever its rows are and where it began."""
    source, blamed = flawed("x", np.nan), 0
    for rows in ([0, 1, 2], [3, 5], [4, 6, 7]):
        for first in range(3):
            stream = Stream(source, 8, seed=0, num_classes=10, rows=np.array(rows)).batches(first)
            try:
                next(stream)
            except InputError as e:
                assert "example 7 (label 7)" in str(e)
                blamed += 1
    assert blamed == 1


def test_good_values_pass(tmp_path):
    assert len(epoch(flawed("x", 9e4))) == 3  # absurd, but trained on until the loss says so
    assert len(epoch(flawed("std", 0.0))) == 3
    assert len(epoch(numbered(tmp_path), num_classes=3)) == 3


@pytest.mark.parametrize(
    ("array", "value", "said"),
    [
        ("x", -3e30, r"example 7 \(label 7\) of folder: x has values as large as 3e\+30"),
        ("mean", 2e4, "mean has values as large as 2e"),
        ("std", 1e20, r"std has values as large as 1e\+20"),
        ("x", 9e3, None),
    ],
)
def test_absurd_values_are_found_when_they_are_looked_for(array, value, said):
    source = flawed(array, value)
    stream = Stream(source, batch_size=8, seed=0, num_classes=10)
    found = [stream.suspect(step) for step in range(3)]
    assert sum(f is not None for f in found) == (said is not None)
    if said:
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(next(f for f in found if f))


def arrays(root, value, dtype=np.float32):
    x = np.random.default_rng(0).normal(size=(20, 8, 8, 1)).astype(dtype)
    x[13, 0, 0, 0] = value
    root.mkdir()
    np.save(root / "latents.npy", x)
    np.save(root / "labels.npy", np.arange(20) % 10)
    return [f"--config.data.path={root}", "--config.data.source=arrays"]


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (np.nan, np.float32, "example 13 (label 3) of {}: x has 1 of 64 values that are NaN"),
        (np.inf, np.float16, "example 13 (label 3) of {}: x has 1 of 64 values that are NaN"),
        (1e30, np.float32, "example 13 (label 3) of {}: x has values as large as 1e+30"),
    ],
)
def test_training_names_the_example_and_not_the_learning_rate(tmp_path, value, dtype, said):
    data = tmp_path / "data"
    code, _, err = train(tmp_path / "run", *arrays(data, value, dtype))
    line = err.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in err and "Warning" not in err
    assert said.format(data) in line and "mend or remove it" in line and "lr" not in line


def cache(folder, mean, std):
    """A latent cache of one shard, as `prepare` writes them."""
    file = folder / "shard-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
    for k in range(N):
        writer.write(encode_record(mean[k], std[k], k % 10))
    writer.close()
    shard = Shard(file.name, file.stat().st_size, sha256(file), N, (0, 9), ())
    whole = dict(dataset={}, autoencoder={}, size=32, flips="one", shape=(4, 4, 2), std=True)
    Manifest(**whole, latent_scale=1.0, batch=1, shard_pictures=N, shards=(shard,)).write(folder)
    return CacheSource(str(folder))


@pytest.mark.parametrize(
    ("array", "value", "said"),
    [("mean", np.nan, "mean has 1 of 32"), ("std", -1.0, "std is negative"), ("std", 0.5, None)],
)
def test_records_of_a_cache(tmp_path, array, value, said):
    arrays = flawed(array, value)
    source = cache(tmp_path, arrays.mean, arrays.std)
    if said is None:
        assert len(epoch(source)) == 3
        return
    with pytest.raises(InputError, match=rf"example 7 \(label 7\) of {tmp_path}: {said}"):
        epoch(source, workers=2)
