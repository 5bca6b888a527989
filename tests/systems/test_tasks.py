"""Tasks: what they tell, beside NumPy; where they cannot work; how a run's inputs hold them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from ppflow_jax.devices.sharding import batch_sharding, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.known import pasted
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.cascade import Upsampling
from ppflow_jax.systems.registry import TASKS, task
from ppflow_jax.systems.tasks import Colourisation, Edges, Inpainting, SuperResolution
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.inputs import make_inputs, open_inputs, shown_to
from tests.systems.checks import within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"

MODEL = ModelConfig(PPFLOW2, 8, 4, width=16, depth=1, heads=2, num_classes=5)
KEY = jax.random.key(0)


def images(*shape):
    return jnp.float32(np.random.default_rng(0).uniform(-1, 1, shape))


def test_every_task_is_here():
    every = (SuperResolution(), Inpainting(), Colourisation(), Edges(), Upsampling())
    assert {type(t) for t in every} == set(TASKS.values())
    assert all(task(str(t)) == t for t in every) and task("none") is None


def test_low_resolution_is_a_mean_and_its_enlargement_keeps_it():
    x, t = images(3, 8, 8, 4), SuperResolution(4)
    low = np.zeros((3, 2, 2, 4), np.float32)
    for i, j in np.ndindex(2, 2):
        low[:, i, j] = x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean(axis=(1, 2))
    np.testing.assert_allclose(t.shrunk(x), low, atol=1e-6)
    told = t(x, KEY)
    assert told.shape == x.shape
    np.testing.assert_allclose(told, np.kron(low, np.ones((1, 4, 4, 1))), atol=1e-6)
    np.testing.assert_allclose(t.shrunk(told), low, atol=1e-6)


def test_bilinear_enlargement_is_between_centres():
    ramp = np.broadcast_to(np.float32([0, 1, 3, 4])[None, :, None, None], (1, 4, 4, 1))
    up = np.asarray(SuperResolution(2, "bilinear").enlarged(jnp.asarray(ramp)))[0, :, 3, 0]
    centres = np.arange(4) * 2 + 0.5
    np.testing.assert_allclose(up, np.interp(np.arange(8), centres, [0, 1, 3, 4]), atol=1e-6)


def test_masks_hide_one_box_of_every_size_in_range():
    t = Inpainting(0.25, 0.5)
    masks = np.asarray(t.masks(KEY, 400, (8, 12)))[..., 0]
    assert set(np.unique(masks)) == {0, 1}
    rows, columns = (masks == 0).any(axis=2), (masks == 0).any(axis=1)
    hidden = rows[:, :, None] & columns[:, None, :]
    np.testing.assert_array_equal(hidden, masks == 0)  # all of the box, and nothing else
    for lines, sizes in ((rows, {2, 3, 4}), (columns, {3, 4, 5, 6})):
        assert (np.abs(np.diff(np.pad(lines.astype(int), ((0, 0), (1, 1))))).sum(axis=1) == 2).all()
        assert set(lines.sum(axis=1)) == sizes
        assert lines[:, 0].any() and lines[:, -1].any()
    assert len(np.unique(masks, axis=0)) > 100


def test_the_known_part_is_told_and_pasted_back():
    x, t = images(5, 8, 8, 4), Inpainting()
    told = t(x, KEY)
    mask = told[..., :1]
    assert told.shape == (5, 8, 8, 5) and t.channels(MODEL) == 5
    np.testing.assert_array_equal(told[..., 1:], np.where(mask > 0, x, 0))
    sample = images(5, 8, 8, 4) + 3
    np.testing.assert_array_equal(pasted(sample, told), np.where(mask > 0, x, sample))


def test_grey_is_luma():
    x = images(2, 8, 8, 3)
    expected = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    np.testing.assert_allclose(Colourisation()(x, KEY), expected, atol=1e-6)
    np.testing.assert_allclose(Colourisation()(jnp.ones_like(x), KEY), 1, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_edges_are_sobels_with_a_border_that_goes_on(channels):
    x = images(2, 6, 8, channels)
    grey = x if channels == 1 else np.asarray(Colourisation()(x, KEY))
    padded = np.pad(np.asarray(grey), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")[..., 0]
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    found = np.zeros(grey.shape[:3])
    for i, j in np.ndindex(6, 8):
        window = padded[:, i : i + 3, j : j + 3]
        found[:, i, j] = np.hypot((window * kernel).sum((1, 2)), (window * kernel.T).sum((1, 2)))
    share = np.minimum(found / 8, 1)
    np.testing.assert_allclose(Edges()(x, KEY)[..., 0], 2 * share - 1, atol=1e-5)
    np.testing.assert_array_equal(Edges(0.3)(x, KEY)[..., 0], np.where(share >= 0.3, 1, -1))
    step = np.broadcast_to(np.where(np.arange(8) < 4, -1, 1)[None, None, :, None], (1, 6, 8, 1))
    edges = np.asarray(Edges()(jnp.float32(step), KEY))[0, ..., 0]
    assert (edges[:, 3:5] == 1).all() and (np.delete(edges, [3, 4], 1) == -1).all()


@pytest.mark.parametrize(
    ("text", "model", "space", "words"),
    [
        ("sharpening", MODEL, "pixels", "unknown task 'sharpening': one of super_resolution"),
        ("super_resolution:factor=1", MODEL, "latents", "factor must be at least 2"),
        ("super_resolution:up=cubic", MODEL, "latents", "nearest or bilinear"),
        ("super_resolution:factor=3", MODEL, "latents", "a side of 8 cannot be divided by 3"),
        ("inpainting:least=0.8", MODEL, "latents", "0 < least <= most <= 1"),
        ("edges:threshold=2", MODEL, "latents", r"threshold must be in \[0, 1\]"),
        ("edges", MODEL, "pixels", "pictures have 1 or 3 channels, not 4"),
        ("colourisation", dataclasses.replace(MODEL, channels=1), "pixels", "have no colours"),
    ],
)
def test_what_cannot_work_is_refused(text, model, space, words):
    with pytest.raises(InputError, match=words):
        task(text).for_model(model, space)


def config(text="super_resolution:factor=2", **changes):
    c = digits.get_config()
    c.data.task = text
    c.update_from_flattened_dict(changes)
    return c


def test_a_task_brings_its_condition():
    assert Experiment.from_config(config()).card.model.conditions == (Channels("low", 1),)
    kept = {"model.conditions": ("channels:name=low,channels=1,drop=0.1",)}
    assert Experiment.from_config(config(**kept)).card.model.conditions[0].drop == 0.1
    with pytest.raises(InputError, match="conditions has w, and nothing gives values for it"):
        Experiment.from_config(config(**{"model.conditions": ("scalar:name=w",)}))
    with pytest.raises(InputError, match=r"gives channels:name=low,channels=1.* has .*channels=2"):
        Experiment.from_config(config(**{"model.conditions": ("channels:name=low,channels=2",)}))
    off = Experiment.from_config(config("none"))
    assert off.task is None and off.card.model.conditions == ()


def test_fields_of_the_data_are_conditions_too(tmp_path):
    x, low = np.asarray(images(20, 8, 8, 1)), np.asarray(images(20, 8, 8, 2))
    for name, array in {"latents": x, "labels": np.arange(20) % 10, "low": low}.items():
        np.save(tmp_path / f"{name}.npy", array)
    c = config("none", **{"model.conditions": ("channels:name=low,channels=2",)})
    c.data.update(dict(source="arrays", path=str(tmp_path), fields=("low",)))
    source, _, card = open_inputs(c.data, Experiment.from_config(c).card)
    told = shown_to(card, source, make_inputs(None, make_mesh(), 0), make_mesh(), 5)
    np.testing.assert_array_equal(told["low"], low[:5])
    c.model.conditions = ("channels:name=low,channels=3",)
    with pytest.raises(InputError, match=r"field low has shape \(8, 8, 2\), the model's cond"):
        open_inputs(c.data, Experiment.from_config(c).card)


def test_latents_without_pictures_have_no_edges(tmp_path):
    c = config("edges", **{"data.space": "latents", "data.source": "arrays"})
    c.data.path = str(tmp_path)
    with pytest.raises(InputError, match=r"computed from pictures and config\.data\.source=arrays"):
        open_inputs(c.data, Experiment.from_config(c).card)


@pytest.mark.parametrize("text", ["inpainting", "edges:threshold=0.5"])
def test_inputs_are_a_function_of_seed_and_step_on_any_mesh(text):
    x, label = images(16, 8, 8, 1), np.arange(16, dtype=np.int32)
    t, found = task(text), {}
    for sizes in ((1, 1, 1), (4, 2, 1)):
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        inputs = make_inputs(None, mesh, 3, t)
        batch = jax.device_put({"x": x, "label": label}, batch_sharding(mesh))
        found[sizes] = {step: inputs(batch, step) for step in (5, 6)}
        assert inputs(batch, 5)["x"].sharding.is_equivalent_to(batch_sharding(mesh), 4)
    one, eight = (jax.device_get(each) for each in found.values())
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    np.testing.assert_array_equal(one[5]["x"], x)
    told = {step: one[step][t.condition] for step in (5, 6)}
    if text == "inpainting":  # drawn anew at every visit
        assert (told[5] != told[6]).any()
        np.testing.assert_array_equal(told[5][..., 1:], told[5][..., :1] * x)
    else:
        np.testing.assert_array_equal(told[5], t(x, KEY))


def test_without_a_task_a_batch_stays_as_it_is():
    batch = {"x": images(2, 8, 8, 1), "label": jnp.zeros(2, jnp.int32)}
    assert make_inputs(None, make_mesh(), 0)(batch, 1) is batch


def test_replacement_and_noise_are_those_of_the_restatement():
    ref = Reference(REFERENCE / "conditions" / "conditions.npz")
    with jax.default_matmul_precision("highest"):
        found = list(SYSTEMS["conditions"](ref))
    assert len(found) == 3
    within(found)


KNOWN = dataclasses.replace(MODEL, conditions=(Channels("known", 5),))


@pytest.mark.parametrize("solver", ["dpm++2m", "sde-euler"])
def test_what_is_known_stays_and_the_rest_follows_it(solver):
    """Of a velocity that moves everything towards the mean of the state."""

    def apply(params, x, t, y, stage):
        return jnp.mean(x, axis=(1, 2), keepdims=True) - x

    noise, x = images(3, 8, 8, 4), images(3, 8, 8, 4) + 2
    told = {"label": jnp.zeros(3, jnp.int32), "known": Inpainting()(x, KEY)}
    keys, found = jax.random.split(KEY, 3), {}
    for keep in (None, "end", "steps"):
        config = SamplerConfig(solver, 6, keep=keep)
        sampler = Sampler(apply, KNOWN, Flow(), config)
        found[keep] = np.asarray(sampler({}, noise, told, keys))
        states = sampler({}, noise, told, keys, trajectory=True)
        np.testing.assert_allclose(states[-1], found[keep], atol=1e-6)
    mask = np.asarray(told["known"][..., :1])
    for keep in ("end", "steps"):
        np.testing.assert_array_equal(np.where(mask > 0, found[keep], 0), told["known"][..., 1:])
    hidden = {keep: np.where(mask > 0, 0, value) for keep, value in found.items()}
    np.testing.assert_array_equal(hidden["end"], hidden[None])
    assert hidden["steps"].sum() > hidden["end"].sum() + 10


@pytest.mark.parametrize(
    ("model", "solver", "keep", "words"),
    [
        (MODEL, "heun", "end", "needs a model for inpainting, with a condition known of 5"),
        (KNOWN, "heun", "start", "unknown keep 'start': one of end, steps"),
        (KNOWN, "dopri5", "steps", "unknown keep 'steps': one of end"),
    ],
)
def test_what_cannot_be_kept_is_refused(model, solver, keep, words):
    with pytest.raises(InputError, match=words):
        Sampler(lambda *_: None, model, Flow(), SamplerConfig(solver, 4, keep=keep))
