"""The network of DiCo: sizes, outputs, names, times, what is refused, and as a run."""

from __future__ import annotations

import functools
import math
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from configs import dico, digits_dico
from ppflow_jax.convert.infer import find_config, find_kind
from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.convert.load import load_state
from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import VP, Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params, init_params, make_apply
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.dico_network import SIZES, DiCoNetwork
from ppflow_jax.systems.dico_unet import ddpm_step
from ppflow_jax.systems.expand import expanded_config
from ppflow_jax.train.experiment import Experiment
from tests import commands
from tests.systems.checks import compiled, random_params
from tests.systems.dico_reference import Network

DEPTHS = (2, 1, 1, 1, 1)
ONE, TWO = Pyramid.parse("1x1@1"), Pyramid.parse("2x2@0.5,1x1@1")
MODEL = ModelConfig(
    *(ONE, 4, 3, 8, sum(DEPTHS), 1, 5), mlp_ratio=2.0, network=DiCoNetwork(DEPTHS, "ddpm")
)
STAGED = replace(MODEL, pyramid=TWO, latent_size=8, network=DiCoNetwork(DEPTHS))
# arXiv 2505.11196, Table 2 and the authors' log; GFLOPs are theirs, of multiply-adds
LEDGER = {
    "S": (33_137_672, 4.25),
    "B": (129_992_712, 16.88),
    "L": (463_897_992, 60.24),
    "XL": (701_151_368, 87.30),
    "H": (1_037_408_328, None),
}


def of_size(size, **changes):
    sizes = dict(SIZES[size])
    depths = sizes.pop("depths")
    made = dict(latent_size=32, channels=4, num_classes=1000) | sizes | changes
    return ModelConfig(ONE, depth=sum(depths), heads=1, network=DiCoNetwork(depths), **made)


def inputs(model, seed=1):
    x = jax.random.normal(jax.random.key(seed), (3, *model.shape))
    return x, jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 2, model.null_label])


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_flops_are_the_papers(size):
    parameters, giga = LEDGER[size]
    model = of_size(size)
    leaves = jax.tree.leaves(abstract_params(model))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    if giga:  # they also count additions of biases and the like
        assert forward_flops(model, 0) / 2e9 == pytest.approx(giga, rel=0.005)
    config = Experiment.from_config(dico.get_config(size.lower())).card.model
    assert replace(config, network=model.network) == model


@functools.cache
def weights(model):
    return random_params(model)


@functools.cache
def tensors():
    return to_torch(MODEL, jax.tree.map(np.asarray, weights(MODEL)))


def found(state, **said):
    return find_config(state, "sit", **({"latent_size": 4} | said))


def original(params, model, x, n, y):
    """Of one stage: all channels that the restatement gives."""
    network = Network(to_torch(model, jax.tree.map(np.asarray, params)))
    out = network(np.asarray(x).transpose(0, 3, 1, 2), np.float64(n), np.asarray(y))
    return out.transpose(0, 2, 3, 1)


def test_it_computes_what_the_original_does():
    x, t, y = inputs(MODEL)
    apply = compiled(MODEL, programs=Programs(unrolled=True))
    ours = apply(weights(MODEL), x, t, y, 0)
    theirs = original(weights(MODEL), MODEL, x, ddpm_step(t), y)[..., :3]
    np.testing.assert_allclose(ours, theirs, atol=5e-5 * np.abs(theirs).max())


def test_a_stage_is_the_original_on_its_own_grid():
    """Its patches are channels, and its level is added to every label."""
    params, (x, t, y) = weights(STAGED), inputs(STAGED)
    xs = x, 2 * x
    found = compiled(STAGED)(params, xs, (t, t), (y, y), (0, 1))
    for stage, side in ((0, 2), (1, 1)):
        tables, levels = params["label"], params["level"]
        labels = {
            k: {"embedding": tables[k]["embedding"] + levels[k]["embedding"][stage][None]}
            for k in tables
        }
        ends = {name: {0: params[name][stage]} for name in ("patchify", "unpatchify")}
        alone = {k: v for k, v in params.items() if k != "level"} | ends | {"label": labels}
        area, size = side**2, 8 // side
        model = replace(MODEL, channels=3 * area, latent_size=size)
        cut = xs[stage].reshape(3, size, side, size, side, 3).transpose(0, 1, 3, 2, 4, 5)
        out = original(alone, model, cut.reshape(3, size, size, -1), t, y)
        out = out.reshape(3, size, size, side, side, 6).transpose(0, 1, 3, 2, 4, 5)
        theirs = out.reshape(3, 8, 8, 6)[..., :3]
        ours = found[stage].prediction
        np.testing.assert_allclose(ours, theirs, atol=5e-5 * np.abs(theirs).max())


def test_flops_are_those_of_the_compiler():
    model = of_size("S", latent_size=16, num_classes=10)
    model = replace(model, depth=5, network=DiCoNetwork((1,) * 5))
    apply = make_apply(model, programs=Programs(unrolled=True))
    x, t, y = (
        jax.ShapeDtypeStruct((1, *model.shape), jnp.float32),
        *(jax.ShapeDtypeStruct((1,), d) for d in (jnp.float32, jnp.int32)),
    )
    run = jax.jit(lambda p, x, t, y: apply(p, x, t, y, 0))
    theirs = run.lower(abstract_params(model), x, t, y).cost_analysis()["flops"]
    # The compiler leaves out the zeros around a picture: rows, inputs and outputs of convolutions
    h = model.width
    convs = [(16, 4, h), (16, h, h // 2), (8, 2 * h, h), (4, 4 * h, 8 * h), (8, 2 * h, 4 * h)]
    convs.append((16, 2 * h, 8))
    zeros = sum(2 * a * b * ((3 * r) ** 2 - (3 * r - 2) ** 2) for r, a, b in convs)
    # and counts what is done element by element
    assert -0.06 < (forward_flops(model, 0) - zeros) / theirs - 1 < 0.01


def test_leaves_have_the_originals_names_and_come_back_with_the_same_bits():
    params, state = weights(MODEL), tensors()
    assert len(state) == len(key_table(MODEL)) == len(jax.tree.leaves(params)) + 14  # two blocks
    assert find_kind(state) == "sit" and found(state) == MODEL
    assert found(state, network=str(DiCoNetwork())).network == DiCoNetwork(DEPTHS)
    jax.tree.map(np.testing.assert_array_equal, load_state(MODEL, state).params, params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"down1_2.body.0.weight": None, "latent.0.conv9.bias": np.zeros(2)},
            "down1_2.body.0.weight: missing; latent.0.conv9.bias: not expected",
        ),
        (
            {"encoder_level_1.0.conv1.bias": np.ones(3), "encoder_level_1.1.conv1.bias": None},
            r"encoder_level_1.0.conv1.bias: shape \(3,\), expected \(8,\); .*1.conv1.bias: missing",
        ),
        ({"final_layer.out_proj.weight": None}, "final_layer.out_proj.weight with 4 axes"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, words):
    state = tensors() | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(InputError, match=words) as error:
        load_state(found(state), state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (dict(latent_size=None), "--latent_size=32"),
        (dict(heads=2), r"config.model.heads=1 \(not 2\)"),
        (dict(mixer="dico"), "config.model.ffn, mixer, wrap and norm: these are of the transf"),
    ],
)
def test_what_is_said_of_a_file_and_cannot_be_is_refused(said, words):
    with pytest.raises(InputError, match=words):
        found(tensors(), **said)


def test_it_is_told_the_step_of_equal_signal_to_noise_ratio():
    t = jnp.linspace(0.003, 0.98, 50)
    n = np.asarray(ddpm_step(t))
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    theirs = np.interp(n, np.arange(1000), np.log(kept / (1 - kept)))
    np.testing.assert_allclose(theirs, 2 * jnp.log(VP.alpha(t) / VP.sigma(t)), atol=2e-3)
    assert (np.diff(n) < 0).all() and n[0] > 990 and n[-1] < 25
    # Nearly the step that 1000 (1 - t) counts
    assert np.abs(n - (1000 * (1 - t) - 1)).max() < 5


def experiment(**changes):
    config = digits_dico.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return Experiment.from_config(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model__depth=6), r"set config.model.depth=9 \(not 6\) and config.model.heads=1"),
        (dict(model__heads=2), r"config.model.heads=1 \(not 2\)"),
        (dict(model__pyramid="4x4@1"), "grid of 2x2, which is halved twice"),
        (dict(model__network="dico:depths=2/2"), "blocks of 5 levels"),
        (dict(model__network="dico:depths=2/a"), "depths is tuple"),
        (dict(model__network="dico:time=noise"), "time is one of flow, ddpm"),
        (dict(model__network="unet"), "unknown network 'unet': one of ddt, dico"),
        (
            dict(model__mixer="dico"),
            "config.model.ffn, mixer, wrap and norm: these are of the transf",
        ),
        (dict(model__adapters="lora:rank=2,on=blocks/.*"), "adapters"),
        (dict(data__task="inpainting"), "config.model.conditions: .* not of dico"),
        (dict(flow__path="vp"), "for config.flow.path=linear or gvp, not vp"),
        (dict(flow__objective="mmd"), "objective mmd is for the transformer, not for dico"),
        (
            dict(flow__terms=("repa:layer=3,dims=64,hidden=128",), data__fields=("teacher",)),
            "repa reads blocks of the transformer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(InputError, match=words) as error:
        experiment(**changes)
    assert "\n" not in str(error.value)


def test_what_is_of_transformer_blocks_is_refused():
    params, (x, t, y) = weights(MODEL), inputs(MODEL)
    with pytest.raises(InputError, match="dico is not one stack of transformer blocks"):
        make_apply(MODEL)(params, x, t, y, 0, taps=Taps(h=(1,)))
    with pytest.raises(InputError, match="only a transformer can be expanded"):
        expanded_config(MODEL, TWO)
    with pytest.raises(InputError, match="has no PyTorch layout: the original has 1x1@1"):
        key_table(STAGED)


@pytest.mark.long
def test_fresh_it_predicts_zeros():
    x, t, y = inputs(MODEL)
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    assert not np.any(make_apply(MODEL)(params, x, t, y, 0))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params["up1"]))


@pytest.mark.long
def test_a_run_is_killed_goes_on_is_sampled_and_converted(tmp_path):
    """The commands of docs/dico.md."""

    def train(folder):
        return commands.run(
            "main",
            f"--config={commands.ROOT}/configs/digits_dico.py",
            f"--workdir={folder}",
            *[flag for flag in commands.SMALL if ".model." not in flag],
            "--config.model.width=8",
            "--config.model.depth=5",
            "--config.model.network=dico:depths=1/1/1/1/1",
            "--config.train.steps=4",
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = train(whole)
    assert code == 0, err
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "4")
    code, out, err = train(killed)
    assert code == 0 and "continuing from step 2" in out, err
    ours, theirs = map(commands.weights, (whole, killed))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.tobytes() == theirs[path].tobytes(), path
    model = pf.load(whole)
    assert np.isfinite(model.sample(2, plan=model.plan(steps=2, cfg=2)).latents).all()
    code, _, err = commands.run(
        "convert", f"--source={whole}", "--to=torch", f"--target={tmp_path / 'a.pt'}"
    )
    assert code == 0, err
    code, out, err = commands.run(
        "convert",
        f"--source={tmp_path / 'a.pt'}",
        f"--target={tmp_path / 'back'}",
        "--latent_size=8",
        "--network=dico:time=flow",
        "--space=pixels",
    )
    assert code == 0 and "network dico:depths=1/1/1/1/1,time=flow" in out, err
    back = pf.load(tmp_path / "back")
    assert back.config == model.config
    ema = commands.weights(whole, "ema")
    for path, leaf in commands.weights(tmp_path / "back", "ema").items():
        assert leaf.tobytes() == ema[path].tobytes(), path
    code, _, err = commands.run(
        "convert",
        f"--source={tmp_path / 'a.pt'}",
        f"--target={tmp_path / 'ddpm'}",
        "--latent_size=8",
    )
    assert code == 0 and pf.load(tmp_path / "ddpm").card.flow == Flow("vp", "noise"), err
