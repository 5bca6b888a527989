"""DiT^DH: what it computes, what it refuses, and that it trains, converts and samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ppflow_jax as pf
from ppflow_jax.convert.keys import to_torch
from ppflow_jax.errors import InputError
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.conditions import Scalar
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.layers import Execution
from ppflow_jax.models.network import abstract_params, init_params
from ppflow_jax.models.patch import positions
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid
from ppflow_jax.systems.clear import Clear
from ppflow_jax.systems.ddt import DDT
from ppflow_jax.systems.ddt_blocks import NormedBlock, TokenBlock, angles, turned
from ppflow_jax.systems.expand import expand
from ppflow_jax.systems.registry import take_block
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer, muon_axes
from tests import commands
from tests.pages import ROOT
from tests.systems.checks import compiled, random_params, within
from tests.systems.ddt_restated import Restated
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
BLOCK = take_block({"mixer": "rope", "ffn": "swiglu"})
NETWORK = DDT(width=48, depth=2, heads=4)
MODEL = ModelConfig(
    *(PPFLOW2, 8, 3, 16, 2, 2), num_classes=5, learn_sigma=False, block=BLOCK, network=NETWORK
)


def test_a_block_is_that_of_the_authors():
    rows = list(SYSTEMS["rae"](Reference(REFERENCE / "rae" / "ddt.npz")))
    assert len(rows) == 6
    within(rows)


@pytest.mark.parametrize("stage", [0, 1])
def test_it_computes_what_the_paper_says_in_every_stage(stage):
    params = jax.tree.map(lambda leaf: leaf / 2, random_params(MODEL))
    x = np.random.default_rng(1).normal(size=(2, *MODEL.shape)).astype(np.float32)
    t, y = np.float32([0.3, 0.8]), np.array([1, 5])
    ours = compiled(MODEL)(params, x, t, y, stage)
    patch = MODEL.pyramid.stages[stage].patch[0]
    theirs = Restated(
        to_torch(MODEL, params),
        heads=(2, 4),
        depths=(2, 2),
        patch=patch,
        unit=2,
        suffix="1" if stage == 0 else "",
        level=stage,
    )
    places = positions(MODEL.pyramid, stage, 8, 16)
    for i in range(2):
        expected = -theirs(x[i].transpose(2, 0, 1), 1 - t[i], y[i], places)
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(ours[i].transpose(2, 0, 1), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "count"),
    [("S", 196_455_764), ("B", 294_295_892), ("L", 621_744_436), ("XL", 838_675_796)],
)
def test_numbers_of_parameters_are_the_public_ones(size, count):
    """With the encoder's fixed positions."""
    sizes = SIZES[size] | dict(num_classes=1000, learn_sigma=False)
    model = ModelConfig(Pyramid.parse("1x1@1"), 16, 768, **sizes, block=BLOCK, network=DDT())
    leaves = jax.tree.leaves(abstract_params(model))
    assert sum(leaf.size for leaf in leaves) + 256 * model.width == count
    assert model.network.flow(model) == {"shift": pytest.approx(6.928203)}


def test_a_fresh_one_gives_exactly_nothing():
    params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()
    x = jnp.ones((2, *MODEL.shape))
    for stage in range(2):
        out = compiled(MODEL)(params, x, jnp.array([0.2, 0.9]), jnp.array([0, 5]), stage)
        assert not np.any(out)


def test_tokens_that_are_told_the_same_are_told_as_an_image_is():
    head = MODEL.stacks[1]
    make = lambda kind: kind(head, Execution(), rms=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(make(NormedBlock))
    token_graph, _ = nnx.split(make(TokenBlock))
    rng = np.random.default_rng(0)
    leaves = jax.tree.map(lambda a: jnp.float32(0.3 * rng.normal(size=a.shape)), state)
    x, c = (jnp.float32(rng.normal(size=size)) for size in ((2, 16, 48), (2, 48)))
    by_image = nnx.merge(graph, leaves).given(None, (4, 4)).outputs(x, c)[0]
    every = jnp.broadcast_to(c[:, None], (2, 16, 48))
    by_token = nnx.merge(token_graph, leaves).given(None, (4, 4)).outputs(x, every)[0]
    np.testing.assert_allclose(by_token, by_image, atol=1e-5)
    other = every.at[:, 3].set(0)
    changed = nnx.merge(token_graph, leaves).given(None, (4, 4)).outputs(x, other)[0]
    assert np.abs(changed - by_token)[:, 3].max() > 0.1


def test_turns_keep_lengths_and_know_distances_alone():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 16))
    tokens = jnp.broadcast_to(x, (1, 64, 1, 16))
    at = turned(tokens, angles((8, 8), (8, 8), 16))[0, :, 0].reshape(8, 8, 16)
    lengths = jnp.linalg.norm(at, axis=-1)
    np.testing.assert_allclose(lengths, np.full((8, 8), np.linalg.norm(x)), rtol=1e-5)
    for row, col in ((0, 3), (2, 1)):
        here, there = (at[i, j] @ at[i + row, j + col] for i, j in ((0, 0), (3, 4)))
        assert here == pytest.approx(float(there), abs=1e-4)
    assert abs(at[0, 0] @ at[0, 3] - at[0, 0] @ at[3, 0]) > 1e-3  # rows are not columns


def test_a_coarse_token_turns_as_the_first_fine_one_in_it():
    fine = angles((8, 8), (8, 8), 16).reshape(8, 8, -1)
    np.testing.assert_array_equal(angles((4, 8), (8, 8), 16).reshape(4, 8, -1), fine[::2])
    model = replace(MODEL, pyramid=PPFLOW3)
    params, x = random_params(model), jnp.ones((1, *MODEL.shape))
    out = compiled(model)(params, x, jnp.array([0.6]), jnp.array([1]), 1)
    assert np.isfinite(out).all() and out.shape == x.shape


def test_a_head_that_is_too_narrow_is_refused():
    words = r"ddt:width=40,.* 40 wide, and tokens of stage 0 \(4x4 patches of 3 channels\) have 48"
    with pytest.raises(InputError, match=words):
        replace(MODEL, network=replace(NETWORK, width=40, heads=2))
    one = replace(MODEL, pyramid=SIT, network=replace(NETWORK, width=16, heads=2))
    with pytest.raises(InputError, match="give a width of 48 or more, or smaller patches"):
        expand(one, {}, PPFLOW2)
    rae = dict(latent_size=16, channels=768, block=BLOCK, **SIZES["XL"], num_classes=1000)
    with pytest.raises(InputError, match="have 3072 numbers"):
        ModelConfig(Pyramid.parse("2x2@0.5,1x1@1"), **rae, network=DDT())


def test_what_a_narrow_end_predicts_has_no_more_directions_than_it_is_wide():
    """Why it is refused: 64 numbers a token through 16 features, and through 64."""
    sizes = dict(latent_size=16, channels=1, depth=1, heads=2, num_classes=5, learn_sigma=False)
    lost = {}
    for width in (16, 64):
        model = ModelConfig(Pyramid.parse("8x8@1"), width=width, **sizes)
        x = jax.random.normal(jax.random.key(0), (100, *model.shape))
        t, y = jnp.linspace(0.1, 0.9, 100), jnp.arange(100) % 5
        out = compiled(model)(random_params(model), x, t, y, 0)
        tokens = np.asarray(out).reshape(100, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 64)
        space = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][:width]
        noise = np.random.default_rng(0).normal(size=(4000, 64))
        lost[width] = np.mean((noise - noise @ space.T @ space) ** 2)
    assert lost[16] == pytest.approx(48 / 64, abs=0.02)
    assert lost[64] < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(block=take_block({"ffn": "swiglu"})), "made of mixer rope and ffn swiglu or mlp"),
        (dict(block=replace(BLOCK, mixer=Clear())), "the model has clear"),
        (dict(block=take_block({"mixer": "rope", "ffn": "moe"})), "made of mixer rope"),
        (dict(block=take_block({"mixer": "rope", "wrap": "switch"})), "without wrap"),
        (dict(conditions=(Scalar("w"),)), "no place for condition w: leave it out"),
        (dict(adapters=parse("lora:rank=2,on=blocks/adaln")), "no place for adapters"),
        (dict(width=12), r"heads are 6 wide \(12 by 2\)"),
    ],
)
def test_what_has_no_place_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        replace(MODEL, **changes)


@pytest.mark.parametrize("text", ["width=0", "width=40,heads=4", "depth=0"])
def test_sizes_of_a_head_are_checked(text):
    values = dict(pair.split("=") for pair in text.split(","))
    with pytest.raises(InputError, match="multiple of 4 times the heads"):
        DDT(**{name: int(value) for name, value in values.items()})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frequencies_do_not_decay(name):
    params = random_params(MODEL)
    matrices, fixed = MODEL.matrices, MODEL.network.fixed
    optimizer = make_optimizer(
        OptimConfig(name=name, weight_decay=0.1, lr=1.0), 10, matrices, undecayed=fixed
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(params, zeros)
    assert not np.any(updates["time"]["frequencies"])
    assert np.all(updates["time"]["fc1"]["kernel"])
    axes = muon_axes(params, matrices)
    assert axes["head_blocks"]["swiglu"]["kernel"] == axes["blocks"]["swiglu"]["kernel"] is not None


def test_taps_are_of_the_encoder():
    apply = compiled(MODEL)
    x, t, y = jnp.ones((1, *MODEL.shape)), jnp.array([0.7]), jnp.array([1])
    out = apply(random_params(MODEL), x, t, y, 1, taps=Taps(h=(1, 2)))
    assert out.taps["h/2"].shape == (1, 16, 16)
    with pytest.raises(InputError, match="tokens after"):
        apply(random_params(MODEL), x, t, y, 1, taps=Taps(h=(3,)))


def test_one_stage_expands_to_what_it_was_on_flat_latents():
    one = replace(MODEL, pyramid=SIT)
    params = jax.tree.map(np.asarray, random_params(one))
    grown, more = expand(one, params, PPFLOW2)
    assert jax.tree.map(np.shape, more) == jax.tree.map(lambda s: s.shape, abstract_params(grown))
    more["level"]["embedding"] = 0 * more["level"]["embedding"]
    x, t, y = jnp.full((1, *MODEL.shape), 0.7), jnp.array([0.7]), jnp.array([1])
    fine = compiled(one)(params, x, t, y, 0)
    run = compiled(grown)
    np.testing.assert_allclose(run(more, x, t, y, 1), fine, atol=1e-5 * np.abs(fine).max())
    for name in ("head_patchify", "patchify"):  # a coarse token sees the mean of its fine ones
        kernels = more[name]
        whole = kernels[0]["kernel"].reshape(2, 2, 2, 2, 3, -1).sum((1, 3))
        np.testing.assert_allclose(whole.reshape(12, -1), kernels[1]["kernel"], atol=1e-6)
    assert np.isfinite(run(more, x, t, y, 0)).all()


@pytest.mark.long
def test_the_commands_of_the_page(tmp_path):
    """Of docs/rae.md: train, export, read again, expand, sample with a weaker model."""
    config, run = f"--config={ROOT}/configs/digits_ddt.py:sit", tmp_path / "run"
    flags = ("--config.train.steps=4", "--config.model.depth=1", "--config.train.save_every=4")
    flags += ("--config.sample.count=4", "--config.sample.steps=2", "--config.data.batch_size=16")
    code, _, err = commands.run("main", config, f"--workdir={run}", *flags)
    assert code == 0, err
    file, back = tmp_path / "ddt.pt", tmp_path / "back"
    code, out, err = commands.run("convert", f"--source={run}", "--to=torch", f"--target={file}")
    assert code == 0, err
    code, out, err = commands.run("convert", f"--source={file}", f"--target={back}")
    assert code == 0 and "network ddt:width=144,depth=2,heads=4,rms=true" in out, err
    ours, theirs = pf.load(run, weights="ema"), pf.load(back)
    assert replace(ours.config, learn_sigma=False) == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    wider = tmp_path / "wider"
    target = (f"--target={wider}", "--pyramid=4x4@0.5,2x2@1")
    code, _, err = commands.run("convert", f"--source={back}", *target)
    assert code == 0, err
    for checkpoint, weak in ((run, (f"--weak={back}", "--cfg=1.42")), (wider, ("--cfg=1",))):
        folder = tmp_path / f"samples_of_{checkpoint.name}"
        flags = (f"--checkpoint={checkpoint}", f"--out={folder}", "--num=2", "--steps=2", *weak)
        code, _, err = commands.run("sample", *flags, "--accelerate=guidance=0.1-1")
        assert code == 0 and (folder / "samples.npz").is_file(), err
    code, _, err = commands.run(
        "convert", f"--source={back}", f"--target={tmp_path / 'no'}", "--pyramid=16x16@0.5,2x2@1"
    )
    assert code == 1 and "Traceback" not in err and not (tmp_path / "no").exists()
