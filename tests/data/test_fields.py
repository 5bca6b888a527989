"""Fields: arrays of the examples besides latent and label, in arrays and in latent caches."""

import hashlib
import shutil

import jax
import numpy as np
import pytest

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.data.cache import CacheSource
from ppflow_jax.data.sources import ArraySource, open_source
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.generate import fields as writing
from ppflow_jax.metrics.inception import Inception
from ppflow_jax.metrics.networks import (
    digest,
    inception_features,
    load_features,
    save_small,
    small_features,
)
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig
from ppflow_jax.train.inputs import make_inputs
from tests.commands import run
from tests.pictures import folder

GREY = FeatureNetConfig(8, 1, 10, (4, 6))
COLOUR = FeatureNetConfig(16, 3, 3, (4, 6))


def small(path, config):
    save_small(path, config, FeatureNet(config).init(0), {"trained_on": "nothing"})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures of which one is unreadable, a network `net`, `cache` with the field `teacher`."""
    root = tmp_path_factory.mktemp("fields")
    folder(root / "train")
    (root / "train" / "class1" / "2.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    config = TAESDConfig(width=4)
    params = jax.tree.map(np.asarray, Autoencoder(config).init(0))
    save_autoencoder(root / "taesd", "taesd", config, params, "float32")
    small(root / "net", COLOUR)
    flags = [f"--vae=taesd:{root}/taesd", "--size=16", "--shard_pictures=5", "--unreadable=skip"]
    code, _, err = prepare(root, root / "cache", *flags, f"--fields=teacher={root}/net")
    assert code == 0, err
    assert "field teacher: 22 records of shape (8, 8, 6)" in err
    return root


def prepare(root, out, *args):
    return run("prepare", f"--path={root}/train", f"--out={out}", "--batch=2", *args)


def seen(network, pictures):
    return jax.jit(network.tokens)(network.params, pictures)


def one_line(result, words):
    code, _, err = result
    assert code == 1 and "Traceback" not in err, err
    for word in words.split("|"):
        assert word in err.splitlines()[-1], err


def test_a_mirrored_latent_has_the_field_of_the_mirrored_picture(made):
    source = CacheSource(str(made / "cache"), ("teacher",))
    pictures = open_source("folder", str(made / "train"), size=16)
    network = load_features(made / "net", "tf1")
    every = np.array([i for i in range(12) if i != 6])
    for flip in (False, True):
        flips = np.full(11, flip)
        tokens = seen(network, pictures.read(every, flips)["image"])
        batch = source.read(np.arange(11), flips)
        assert batch["teacher"].dtype == np.float16 and batch["teacher"].shape == (11, 8, 8, 6)
        np.testing.assert_allclose(batch["teacher"], tokens, rtol=2e-3, atol=1e-4)
    plain = CacheSource(str(made / "cache")).read(np.arange(11), flips)
    assert {*batch} - {*plain} == {"teacher"}
    np.testing.assert_array_equal(plain["x"], batch["x"])


def test_a_cache_is_what_it_was_and_the_field_has_an_identity_of_its_own(made):
    plain, with_field = (CacheSource(str(made / "cache"), f) for f in ((), ("teacher",)))
    identity = with_field.identity()
    field = identity.pop("fields")["teacher"]
    assert identity == plain.identity()
    assert field["network"]["digest"] == digest(FeatureNet(COLOUR).init(0))
    assert len(field["shards_sha256"]) == 64


def files(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("[!.]*")}


@pytest.mark.parametrize("moment", [1, 11])
def test_killed_anywhere_and_rerun_gives_the_same_bytes(made, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    cache, calls, real = tmp_path / "cache", [], writing.field_record
    shutil.copytree(made / "cache", cache, ignore=shutil.ignore_patterns("fields"))

    def dies(*args):
        calls.append(args)
        if len(calls) == moment:
            raise Killed
        return real(*args)

    monkeypatch.setattr(writing, "field_record", dies)
    with pytest.raises(Killed):
        prepare(made, cache, f"--fields=teacher={made}/net")
    monkeypatch.undo()
    with pytest.raises(InputError, match="no field, or not complete"):
        CacheSource(str(cache), ("teacher",))
    CacheSource(str(cache))
    code, _, err = prepare(made, cache, f"--fields=teacher={made}/net")
    assert code == 0 and ("continuing" in err) == (moment == 11), err
    assert files(cache / "fields" / "teacher") == files(made / "cache" / "fields" / "teacher")


def test_fields_that_do_not_belong_are_refused(made, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(made / "cache", cache)
    with pytest.raises(InputError, match="has no field other: add it with"):
        CacheSource(str(cache), ("other",))
    folder(tmp_path / "train", per_class=3)
    net = f"--fields=second={made}/net"
    one_line(prepare(tmp_path, cache, net), "is not what|pictures differ|give the pictures")
    one_line(prepare(made, tmp_path / "none", net), "no latent cache, or not complete")
    wrong = small(tmp_path / "wrong", FeatureNetConfig(32, 3, 3, (4, 6)))
    one_line(prepare(made, cache, f"--fields=second={wrong}"), "the feature network takes 32x32")
    one_line(prepare(made, cache, "--fields=second"), "write NAME=FOLDER")
    one_line(prepare(made, cache, f"--fields=label={made}/net"), "none of x, label")
    one_line(
        prepare(made, cache, f"--fields=teacher={small(tmp_path / 'o', COLOUR_3)}"),
        "holds a field made with other settings (shape, network)",
    )
    shard = next((cache / "fields" / "teacher").glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    one_line(run("prepare", f"--out={cache}", "--verify"), "other contents than were written")
    code, out, _ = run("prepare", f"--out={made}/cache", "--verify")
    assert code == 0 and "cache/fields/teacher: 3 shards, 22 records, as written" in out


COLOUR_3 = FeatureNetConfig(16, 3, 3, (4, 6, 3))


def test_a_field_of_other_labels_is_found_when_it_is_read(made):
    field = CacheSource(str(made / "cache"), ("teacher",)).fields[0]
    assert field.read(np.array([0, 21]), np.array([0, 2])).shape == (2, 8, 8, 6)
    with pytest.raises(InputError, match="record 21 of field teacher has label 2, its latent 1"):
        field.read(np.array([0, 21]), np.array([0, 1]))


def test_digits_become_arrays_with_a_field(tmp_path):
    """As in docs/data.md and docs/repa.md, with a network that was not trained."""
    net = small(tmp_path / "net", GREY)
    out = tmp_path / "digits"
    given = ["--source=digits", f"--out={out}", "--batch=256"]
    code, _, err = run("prepare", *given, f"--fields=teacher={net}")
    assert code == 0 and "field teacher: (1797, 4, 4, 6)" in err, err
    digits = open_source("digits", "")
    source = open_source("arrays", str(out), fields=("teacher",))
    index, network = np.array([0, 5, 1796]), load_features(net, "tf1")
    batch = source.read(index, np.zeros(3, bool))
    np.testing.assert_array_equal(batch["x"], digits.read(index, np.zeros(3, bool))["x"])
    pictures = np.uint8(((batch["x"] + 1) * 127.5 + 0.5).clip(0, 255))
    tokens = seen(network, pictures)
    np.testing.assert_allclose(batch["teacher"], tokens, rtol=5e-2, atol=2e-2)
    one_line(run("prepare", *given), "takes --fields, and no --vae")
    with pytest.raises(InputError, match="source digits has no fields"):
        open_source("digits", "", fields=("teacher",))


def test_arrays_have_the_rows_of_their_fields():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(9, 4, 4, 2)).astype("f4"), np.arange(9)
    teacher = rng.normal(size=(9, 2, 2, 5)).astype("f2")
    source = ArraySource("some", x, labels, {"teacher": teacher})
    batch = source.read(np.array([7, 2]), np.array([True, False]))
    np.testing.assert_array_equal(batch["teacher"], teacher[[7, 2]])
    assert batch["teacher"].dtype == np.float16
    assert "fields" not in ArraySource("some", x, labels).identity()
    other = ArraySource("some", x, labels, {"teacher": teacher + 1})
    assert other.identity() != source.identity()
    for wrong in (teacher[:8], np.int32(teacher)):
        with pytest.raises(InputError, match="field teacher must be floating point of shape"):
            ArraySource("some", x, labels, {"teacher": wrong})


@pytest.mark.parametrize("batch", [("x",), ("mean", "std"), ("image",)])
def test_fields_reach_the_step_as_they_are(batch):
    rng = np.random.default_rng(0)
    shape = (8, 4, 4, 2)
    arrays = {name: rng.normal(size=shape).astype("f4") for name in batch}
    if "image" in arrays:
        arrays["image"] = rng.integers(0, 256, shape).astype("u1")
    teacher = rng.normal(size=(8, 2, 2, 5)).astype("f2")
    given = arrays | {"label": np.arange(8, dtype="i4"), "teacher": teacher}
    found = make_inputs(None, make_mesh(), 0)(jax.device_put(given), 3)
    assert {*found} == {"x", "label", "teacher"}
    np.testing.assert_array_equal(found["teacher"], teacher)
    np.testing.assert_array_equal(found["label"], np.arange(8))


def test_tokens_are_what_the_features_are_the_means_of():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype("u1")
    network = small_features(COLOUR, FeatureNet(COLOUR).init(1), {})
    images = jax.numpy.asarray(pictures)
    features = network.function(network.params, images, ("features",))["features"]
    tokens = seen(network, pictures)
    np.testing.assert_allclose(tokens.mean(axis=(1, 2)), features, atol=1e-5)
    config = Inception().config
    inception = inception_features(config, Inception().abstract_params(), "tf1", "768")
    shape = jax.eval_shape(inception.tokens, inception.params, pictures).shape
    assert shape == (2, 17, 17, 768)
