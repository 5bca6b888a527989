"""The evaluator and its command: what numbers depend on, what is said beside them, bad input."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from ppflow_jax.data.images import array_images, open_images
from ppflow_jax.data.sources import digits
from ppflow_jax.data.transforms import to_uint8
from ppflow_jax.errors import InputError
from ppflow_jax.generate.folder import SampleFolder
from ppflow_jax.metrics import feature_cache
from ppflow_jax.metrics.evaluator import Evaluator, Reference, open_reference
from ppflow_jax.metrics.extract import extract, read_statistics, save_statistics
from ppflow_jax.metrics.frechet import frechet_distance
from ppflow_jax.metrics.networks import load_features, save_small, small_features
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig
from tests.commands import run

CONFIG = FeatureNetConfig(8, 1, 10, (8, 16, 12))
ORIGIN = {"trained_on": "nothing", "accuracy": 0.1}


@pytest.fixture(scope="module")
def network():
    """Random: distances in its features are as lawful as any."""
    return small_features(CONFIG, FeatureNet(CONFIG).init(0), ORIGIN)


@pytest.fixture(scope="module")
def pictures():
    return to_uint8(digits().x)


def noisy(pictures, level, seed=0):
    noise = np.random.default_rng(seed).normal(size=pictures.shape) * level
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network, pictures):
    """A feature network, samples as an npz and as pictures, an ADM-style reference batch."""
    path = tmp_path_factory.mktemp("evaluate")
    save_small(path / "net", CONFIG, network.params, ORIGIN)
    np.savez(path / "samples.npz", arr_0=noisy(pictures[:300], 40))
    (path / "card.json").write_text('{"seed": 5}')
    (path / "images").mkdir()
    for k, picture in enumerate(pictures[:20, ..., 0]):
        Image.fromarray(picture).save(path / "images" / f"{k:02}.png")
    return path


def evaluate(folder, *args):
    return run("evaluate", *[a.replace("=~", f"={folder}/") for a in args])


def last_line(err):
    return err.strip().splitlines()[-1]


def test_batch_devices_and_order_do_not_matter(network, pictures):
    assert jax.device_count() == 8
    samples = noisy(pictures, 40)
    known = extract(array_images("digits", pictures), network).statistics["features"]

    def distance(images, **options):
        found = extract(array_images("noisy", images), network, **options)
        return frechet_distance(known, found.statistics["features"]).distance

    first = distance(samples)
    shuffled = np.random.default_rng(0).permutation(samples)
    for images, options in (
        (samples, dict(batch=1000)),
        (samples, dict(batch=17, devices=jax.devices()[:1])),
        (shuffled, dict(batch=100, devices=jax.devices()[:3])),
    ):
        assert distance(images, **options) == pytest.approx(first, rel=1e-6)


@pytest.mark.long
def test_a_set_is_next_to_itself_and_noise_takes_it_away(network, pictures):
    pictures = pictures[:600]
    evaluator = Evaluator(network, Reference("digits", array_images("digits", pictures)))
    assert evaluator.metrics == ("fid", "is", "precision", "recall", "kid")
    results = [
        evaluator(array_images("noisy", noisy(pictures, level)))["metrics"] for level in (0, 8, 60)
    ]
    assert 0 <= results[0]["fid"] + 1e-9 and results[0]["fid"] < 1e-6
    assert results[0]["precision"] == results[0]["recall"] == 1
    for metric, sign in (("fid", 1), ("kid", 1), ("precision", -1)):
        values = [sign * result[metric] for result in results]
        assert values == sorted(values) and values[0] < values[-1]


def test_statistics_of_the_file_come_before_its_images(network, pictures, tmp_path):
    """As in ADM: mu and sigma are of the whole dataset, arr_0 is some of it."""
    whole = extract(array_images("digits", pictures), network).statistics
    save_statistics(tmp_path / "whole.npz", whole, {})
    with np.load(tmp_path / "whole.npz") as file:
        arrays = {key: file[key] for key in ("mu", "sigma")}
    np.savez(tmp_path / "adm.npz", arr_0=pictures[:100], **arrays)
    reference = open_reference(str(tmp_path / "adm.npz"))
    result = Evaluator(network, reference)(array_images("digits", pictures))
    assert result["metrics"]["fid"] < 1e-6  # against all 1,797
    assert result["metrics"]["precision"] < 1  # against 100
    assert result["reference"]["statistics_of_the_file"] == ["features"]
    only = open_reference(str(tmp_path / "whole.npz"))
    left_out = Evaluator(network, only).left_out
    assert set(left_out) == {"sfid", "precision", "recall", "kid"}
    with pytest.raises(InputError, match=r"no kid: .* has statistics only"):
        Evaluator(network, only, ("fid", "kid"))


def test_the_command_says_what_made_the_numbers(folder):
    code, out, err = evaluate(
        folder, "--samples=~samples.npz", "--reference=digits", "--features=~net", "--batch=200"
    )
    assert code == 0, err
    result = json.loads((folder / "samples.evaluation.json").read_text())
    assert set(result["metrics"]) == {"fid", "is", "precision", "recall", "kid", "kid_std"}
    assert result["samples"] == {
        "name": f"{folder}/samples.npz",
        "count": 300,
        "shape": [8, 8, 1],
        "card": {"seed": 5},
    }
    assert result["settings"]["kid_subset_size"] == 300
    assert result["features"]["digest"] and result["versions"]["jax"] == jax.__version__
    for words in (
        f"FID              {result['metrics']['fid']:.5f}",
        "no sFID          this feature network has no spatial features",
        "samples.npz: 300 images of 8x8x1",
        f"small network {result['features']['digest']} trained on nothing",
        "not comparable with Inception FID",
    ):
        assert words in out
    assert "features of samples.npz" in err  # the progress bar


def test_statistics_of_a_dataset_serve_later(folder):
    made = ["--reference=digits", "--features=~net", "--statistics_out=~digits.npz"]
    code, out, err = evaluate(folder, *made)
    assert code == 0 and "statistics of digits (1,797 images, 8x8x1)" in out, err
    judged = ["--samples=~samples.npz", "--features=~net", "--metrics=fid", "--out=~{}.json"]
    for reference in ("--reference=~digits.npz", "--reference=digits"):
        name = reference[-3:]
        assert evaluate(folder, *[a.format(name) for a in judged], reference)[0] == 0
    values = [json.loads((folder / f"{n}.json").read_text())["metrics"] for n in ("npz", "its")]
    assert values[0] == values[1]
    assert read_statistics(folder / "digits.npz")[0]["features"].count == 1797

    other = small_features(CONFIG, FeatureNet(CONFIG).init(1), ORIGIN)
    with pytest.raises(InputError, match=r"made with other features \(digest .*, now "):
        Evaluator(other, open_reference(str(folder / "digits.npz")))
    assert evaluate(folder, *made)[0] == 1  # never overwritten


def test_a_size_is_meant_for_the_folder_of_the_two(folder):
    sets = ["--samples=~samples.npz", "--reference=~images", "--size=8", "--out=~cropped.json"]
    code, _, err = evaluate(folder, *sets, "--features=~net", "--metrics=fid")
    assert code == 0, err


def test_too_few_images_are_judged_and_said(folder):
    args = ["--samples=~images", "--reference=digits", "--features=~net", "--out=~few.json"]
    code, out, _ = evaluate(folder, *args, "--metrics=fid,precision")
    assert code == 0 and "singular" not in out.split("note", 1)[1].split("FID", 1)[0]
    np.savez(folder / "few.npz", arr_0=np.zeros((12, 8, 8, 1), np.uint8))
    code, out, _ = evaluate(folder, *args, "--samples=~few.npz", "--metrics=fid")
    assert code == 0 and "fid: the samples are 12 images for 12 features" in out
    assert "far above the one of many images" in out
    np.savez(folder / "few.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    code, _, err = evaluate(folder, *args, "--samples=~few.npz")
    assert code == 1 and "need at least 4 images" in last_line(err)


@pytest.mark.long
def test_training_of_a_feature_network(folder, monkeypatch):
    import ppflow_jax.evaluate.command as command

    short = functools.partial(command.train_features, steps=30)
    monkeypatch.setattr(command, "train_features", short)
    code, out, err = evaluate(folder, "--reference=digits", "--train_features=~trained")
    assert code == 0, err
    trained = load_features(folder / "trained", "tf1")
    assert trained.card["held_out"] == 359 and trained.card["accuracy"] > 0.2  # chance: 0.1
    assert f"{trained.card['accuracy']:.1%} of 359 held-out" in out
    assert "not comparable" in out
    again = small_features(*short(digits(), 10))
    assert again.card == trained.card
    assert evaluate(folder, "--reference=digits", "--train_features=~trained")[0] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--samples=~nothing.npz"], "does not exist"),
        (["--samples=~net/checkpoints"], "has no images"),
        (["--samples=~large.npz"], "feature network takes 8x8"),
        (["--reference=~large.npz"], "feature network takes 8x8"),
        (["--samples=~float.npz"], "float64, expected uint8"),
        (["--reference=~wrong_size.npz"], "statistics of 5 numbers an image .* gives 12"),
        (["--reference=~wrong_shape.npz"], r"mu has shape \(5,\) and sigma \(4, 4\)"),
        (["--reference=~wrong_type.npz"], "mu is int64"),
        (["--reference=~half.npz"], "only one of mu and sigma"),
        (["--reference=~no_key.npz"], "holds stuff: expected images as arr_0"),
        (["--features=~images"], "no checkpoint in"),
        (["--metrics=fid,lpips"], "no metric 'lpips'"),
        (["--metrics=sfid"], "no sfid: this feature network"),
        (["--batch=0"], "at least 1"),
        (["--size=8"], "leave it out"),
        (["--out=~images"], "is a folder"),
        (["--statistics_out=~net"], "exists"),
    ],
)
def test_bad_input_is_one_line(folder, args, words):
    np.savez(folder / "large.npz", arr_0=np.zeros((5, 9, 9, 1), np.uint8))
    np.savez(folder / "float.npz", arr_0=np.zeros((5, 8, 8, 1)))
    np.savez(folder / "wrong_size.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / "wrong_shape.npz", mu=np.zeros(5), sigma=np.eye(4))
    np.savez(folder / "wrong_type.npz", mu=np.zeros(5, int), sigma=np.eye(5))
    np.savez(folder / "half.npz", mu=np.zeros(5))
    np.savez(folder / "no_key.npz", stuff=np.zeros(5))
    good = ["--samples=~samples.npz", "--reference=digits", "--features=~net", "--out=~bad.json"]
    code, _, err = evaluate(folder, *good, *args)
    assert code == 1
    assert re.search(words, last_line(err)), last_line(err)
    assert not (folder / "bad.json").exists()


def test_a_damaged_image_names_the_file(folder, pictures):
    broken = folder / "broken"
    broken.mkdir()
    for k in range(5):
        Image.fromarray(pictures[k, ..., 0]).save(broken / f"{k}.png")
    data = (broken / "3.png").read_bytes()
    (broken / "3.png").write_bytes(data[:-30])
    good = ["--reference=digits", "--features=~net", "--out=~bad.json"]
    code, _, err = evaluate(folder, "--samples=~broken", *good)
    assert code == 1 and "3.png" in last_line(err) and "mend or remove it" in last_line(err)
    assert open_images(str(broken)).count == 5


@pytest.fixture
def own(folder, tmp_path):
    """Files that a test may add to, with a reference in pictures and one in an npz."""
    shutil.copytree(folder / "images", tmp_path / "pictures")
    shutil.copy(folder / "samples.npz", tmp_path / "reference.npz")
    shutil.copy(folder / "samples.npz", tmp_path / "samples.npz")
    return tmp_path


def judged(folder, own, *args):
    """Metrics, and which features were computed."""
    asked = [
        f"--samples={own / 'samples.npz'}",
        f"--features={folder / 'net'}",
        "--metrics=fid,kid",
    ]
    code, _, err = run("evaluate", *asked, *args)
    assert code == 0, err
    computed = re.findall(r"features of (\S+):", err)
    return json.loads((own / "samples.evaluation.json").read_text())["metrics"], set(computed)


@pytest.mark.parametrize("name", ["reference.npz", "pictures"])
def test_features_of_a_reference_are_computed_once(folder, own, name):
    reference = own / name
    first, computed = judged(folder, own, f"--reference={reference}")
    assert computed == {"samples.npz", name}
    again, computed = judged(folder, own, f"--reference={reference}")
    assert computed == {"samples.npz"} and again == first
    assert [p.name.split(".features-")[0] for p in own.glob("*.features-*")] == [name]

    if name == "pictures":  # one picture becomes another of as many bytes
        *_, other, target = sorted(reference.iterdir(), key=lambda p: p.stat().st_size)
        stat = target.stat()
        target.write_bytes(other.read_bytes().ljust(stat.st_size, b"\0"))
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        with np.load(reference) as arrays:
            changed = arrays["arr_0"][::-1] // 2
        np.savez(reference, arr_0=changed)
    third, computed = judged(folder, own, f"--reference={reference}")
    assert computed == {"samples.npz", name} and third != first


def test_a_damaged_file_of_features_is_computed_again(folder, own):
    reference = own / "reference.npz"
    first, _ = judged(folder, own, f"--reference={reference}")
    (kept,) = own.glob("*.features-*")
    data = bytearray(kept.read_bytes())
    for change in (data[: len(data) // 2], b"", data[:900] + bytes([data[900] ^ 1]) + data[901:]):
        kept.write_bytes(change)
        again, computed = judged(folder, own, f"--reference={reference}")
        assert "reference.npz" in computed and again == first


def test_a_set_against_itself_keeps_its_features(folder, own):
    with_itself = f"--reference={own / 'samples.npz'}"
    asked = [f"--samples={own / 'samples.npz'}", f"--features={folder / 'net'}", "--metrics=fid"]
    assert run("evaluate", *asked, with_itself)[0] == 0
    assert len(list(own.glob("samples.npz.features-*"))) == 1


def test_killed_features_continue_with_the_same_numbers(folder, own, monkeypatch):
    reference = f"--reference={own / 'reference.npz'}"
    whole, _ = judged(folder, own, reference, "--batch=32")
    for path in own.glob("*.features-*"):
        path.unlink()
    monkeypatch.setattr(feature_cache, "SECONDS", -1)
    save, calls = feature_cache.FeatureCache.save, []

    def dies(self, found):
        assert save(self, found)
        calls.append(found.done)
        if len(calls) in (4, 13):
            raise SystemExit(9)
        return True

    monkeypatch.setattr(feature_cache.FeatureCache, "save", dies)
    asked = [f"--samples={own / 'samples.npz'}", f"--features={folder / 'net'}", "--batch=32"]
    for _ in range(2):
        assert run("evaluate", *asked, "--metrics=fid,kid", reference)[0] == 9
    again, _ = judged(folder, own, reference, "--batch=32")
    assert again == whole
    assert len(calls) == len(set(calls[:10])) * 2, "every batch of both sets was computed once"


def test_pictures_where_nobody_may_write(folder, own, monkeypatch):
    def full(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(feature_cache, "atomic", full)
    asked = [f"--samples={own / 'samples.npz'}", f"--features={folder / 'net'}", "--metrics=fid"]
    code, _, err = run("evaluate", *asked, f"--reference={own / 'reference.npz'}")
    assert code == 0 and err.count("cannot keep features") == 2, err


def test_an_evaluation_of_a_checkpoint_that_was_killed_continues(
    small_run, folder, own, monkeypatch
):
    monkeypatch.setattr("ppflow_jax.generate.folder.SHARD", 4)
    asked = [f"--checkpoint={small_run}", "--reference=digits", f"--features={folder / 'net'}"]
    asked += [f"--out={own / 'card.json'}", "--metrics=fid", "--num=6"]
    code, _, err = run("evaluate", *asked)
    assert code == 0 and not list(own.glob("*.samples-*")), err
    whole = json.loads((own / "card.json").read_text())
    with monkeypatch.context() as killed:
        killed.setattr(SampleFolder, "finish", lambda *args: sys.exit(9))
        assert run("evaluate", *asked)[0] == 9
    (begun,) = own.glob("card.samples-*")
    (begun / "shards/000001.npy").unlink()
    code, _, err = run("evaluate", *asked)
    assert code == 0 and not list(own.glob("*.samples-*")), err
    again = json.loads((own / "card.json").read_text())
    assert again["metrics"] == whole["metrics"]
    assert again["samples"]["card"]["images_in_these_seconds"] == 2
    assert whole["samples"]["name"].startswith("6 of ")
