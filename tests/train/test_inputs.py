import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.autoencoders.encode import Encoder, moments
from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.data.sources import open_source
from ppflow_jax.devices.sharding import batch_sharding, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.inputs import make_inputs, open_inputs
from ppflow_jax.train.metrics_log import read_metrics
from tests.commands import run, train
from tests.pictures import folder

CONFIG = AutoencoderKLConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`train` (12 pictures), the autoencoders `vae` and `other`, and `cache`, made by `vae`."""
    root = tmp_path_factory.mktemp("inputs")
    folder(root / "train")
    for seed, name in enumerate(("vae", "other")):
        params = jax.tree.map(np.asarray, Autoencoder(CONFIG).init(seed))
        save_autoencoder(root / name, "vae", CONFIG, params, "float32")
    flags = [f"--path={root}/train", f"--vae=vae:{root}/vae", f"--out={root}/cache"]
    code, _, err = run("prepare", *flags, "--size=16", "--batch=2")
    assert code == 0, err
    return root


def config(**data):
    c = digits.get_config("sit")
    c.model.update(dict(channels=4, num_classes=3))
    c.data.space = "latents"
    c.data.update(data)
    return c


def opened(**data):
    c = config(**data)
    return open_inputs(c.data, Experiment.from_config(c).card)


def one_device():
    return jax.make_mesh(
        (1, 1, 1),
        ("data", "fsdp", "tensor"),
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


def test_cached_latents_are_those_of_encoding_in_every_step_on_any_mesh(root):
    pictures = open_source("folder", str(root / "train"), size=16)
    cache = open_source("cache", str(root / "cache"))
    indices, flips = np.arange(48) % 12, np.arange(48) % 5 < 2
    encoder = Encoder.parse(f"vae:{root}/vae", "--vae")

    def x(source, encoder, mesh, step):
        batch = source.read(indices, flips)
        batch.pop("unreadable", None)
        batch = jax.device_put(batch, batch_sharding(mesh))
        out = make_inputs(encoder, mesh, seed=0)(batch, step)
        assert out["label"].tolist() == (indices // 4).tolist()
        return np.asarray(out["x"])

    eight = make_mesh(4, 2, 1)
    cached = x(cache, None, eight, 7)
    np.testing.assert_array_equal(cached, x(cache, None, one_device(), 7))
    np.testing.assert_allclose(cached, x(pictures, encoder, eight, 7), atol=2e-5)
    # Every visit draws again around the same mean
    later, read = x(cache, None, eight, 8), cache.read(indices, flips)
    noise = np.stack([(a - read["mean"]) / read["std"] for a in (cached, later)])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[0, 0].ravel(), noise[0, 12].ravel())[0, 1]) < 0.3


@pytest.mark.long
def test_training_from_the_cache_equals_training_from_the_pictures(root, tmp_path):
    args = ["--config.model.channels=4", "--config.model.num_classes=3"]
    args += ["--config.data.space=latents", "--config.train.steps=2"]
    kinds = {
        "cache": [f"--config.data.path={root}/cache", f"--config.data.vae=vae:{root}/vae"],
        "folder": [f"--config.data.path={root}/train", f"--config.data.vae=vae:{root}/vae"],
    }
    losses = {}
    for name, more in kinds.items():
        source = f"--config.data.source={name}"
        code, _, err = train(tmp_path / name, source, *args, *more, variant=":sit")
        assert code == 0, err
        losses[name] = [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        card = read_card(find_checkpoint(tmp_path / name))
        assert card.latent_scale == 0.5
        trained_on = card.experiment["trained_on"]
        assert trained_on["source"] == name
        encoder = Encoder.parse(f"vae:{root}/vae", "--vae")
        assert trained_on["autoencoder"] == json.loads(json.dumps(encoder.identity()))
    np.testing.assert_allclose(losses["cache"], losses["folder"], rtol=1e-4)


def test_pixels_of_a_folder(root):
    c = config(source="folder", path=str(root / "train"), space="pixels")
    c.model.update(dict(channels=3, latent_size=16))
    source, encoder, card = open_inputs(c.data, Experiment.from_config(c).card)
    assert encoder is None and card.to_json()["data"] == {"space": "pixels"}
    batch = source.read(np.arange(8), np.zeros(8, bool))
    mesh = make_mesh()
    images = jax.device_put({k: batch[k] for k in ("image", "label")}, batch_sharding(mesh))
    x = np.asarray(make_inputs(None, mesh, 0)(images, 0)["x"])
    np.testing.assert_allclose(x, batch["image"] / 127.5 - 1, atol=1e-6)
    assert x.min() < -0.5 and x.max() > 0.5


@pytest.mark.parametrize("text", ["colourisation", "edges:threshold=0.1"])
def test_a_model_of_latents_is_told_the_encoding_of_grey_and_of_edges(root, text):
    data = dict(source="folder", path=str(root / "train"), vae=f"vae:{root}/vae", task=text)
    c = config(**data)
    experiment = Experiment.from_config(c)
    task, (condition,) = experiment.task, experiment.card.model.conditions
    source, encoder, _ = open_inputs(c.data, experiment.card)
    batch = source.read(np.arange(8), np.zeros(8, bool))
    images = jnp.asarray(batch["image"])
    told = {}
    for sizes in ((1, 1, 1), (4, 2, 1)):
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        here = {k: jax.device_put(batch[k], batch_sharding(mesh)) for k in ("image", "label")}
        told[sizes] = np.asarray(make_inputs(encoder, mesh, 0, task)(here, 1)[condition.name])
    one, eight = told.values()
    assert one.shape == (8, *condition.shape(experiment.card.model)) == (8, 8, 8, 4)
    np.testing.assert_allclose(one, eight, atol=1e-5)
    picture = np.asarray(task(images / 127.5 - 1, jax.random.key(0)))
    grey = np.round(127.5 * (picture + 1)).astype(np.uint8).repeat(3, axis=-1)
    mean, _ = moments(encoder.autoencoder, encoder.params, jnp.asarray(grey))
    np.testing.assert_allclose(one, mean, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (dict(source="folder", path="train"), {}, "make a cache with"),
        (dict(source="folder", path="train", vae="vae"), {}, "write vae:DIR or taesd:DIR"),
        (dict(source="folder", path="train", vae="taesd:@/vae"), {}, "that folder holds a vae"),
        (dict(source="folder", path="train", vae="vae:@/vae"), dict(channels=3), "model expects"),
        (dict(source="folder", path="train", vae="vae:@/vae"), dict(num_classes=2), "0 to 2"),
        (dict(source="folder", path="train", space="pixels"), {}, r"\(8, 8, 3\), the model"),
        (dict(source="cache", path="cache", vae="vae:@/other"), {}, "made with another autoenc"),
        (dict(source="cache", path="cache"), dict(latent_size=16), r"\(8, 8, 4\), the model"),
        (dict(source="cache", path="cache"), dict(num_classes=2), "labels from 0 to 2"),
        (dict(source="cache", path="cache", space="pixels"), {}, "neither a latent cache"),
        (dict(source="cache", path="train"), {}, "no latent cache, or not complete"),
        (dict(source="digits", vae="vae:@/vae"), {}, "no pictures to encode"),
        (dict(source="cache"), {}, "config.data.path is empty"),
        (dict(source="cache", path="cache", task="edges"), {}, "source=cache has none: use folder"),
    ],
)
def test_what_does_not_fit_is_refused(root, data, model, words):
    data = {k: v.replace("@", str(root)) for k, v in data.items()}
    if "path" in data:
        data["path"] = str(root / data["path"])
    c = config(**data)
    c.model.update(model)
    with pytest.raises(InputError, match=words) as error:
        open_inputs(c.data, Experiment.from_config(c).card)
    assert "\n" not in str(error.value)
