"""Width by time and tokens that skip the MLP: where they start, what they leave out, what trains
them, and their authors' numbers."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.loss import Draws, FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.plan import guided_by, make_plan
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.parts import DIT, BlockSpec, Execution
from ppflow_jax.pyramid import PPFLOW2, SIT, Pyramid
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.dimr import TdLn
from ppflow_jax.systems.dydit import DyDiT, Noise, switched
from ppflow_jax.systems.dydit_training import DynamicFlow, FlopsTarget
from ppflow_jax.systems.dydit_widths import routed_on, shared
from ppflow_jax.systems.moe import MoE
from ppflow_jax.systems.registry import objective
from ppflow_jax.train.step import make_train_step
from tests import commands
from tests.systems.checks import compiled, random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
SMALL = ModelConfig(PPFLOW2, 8, 4, width=32, depth=2, heads=4, num_classes=5)
MODEL = replace(SMALL, block=BlockSpec(wrap=DyDiT()))
BASE = FlowObjective(PPFLOW2, Flow(), null_label=5)


def test_decisions_losses_and_gradients_are_the_authors():
    ref = Reference(REFERENCE / "dydit" / "dydit.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS["dydit"](ref))
    assert len(rows) >= 18
    within(rows)


def output(model, params, t=(0.1, 0.2, 0.3, 0.4), stage=0):
    x, y = jax.random.normal(jax.random.key(1), (4, 8, 8, 4)), jnp.arange(4)
    return compiled(model)(params, x, jnp.asarray(t), y, stage)


def deciding(model=MODEL):
    """Parameters under which some of everything is on and some is off."""
    params = random_params(model)
    routers = params["blocks"]["dydit"]
    for name in ("heads", "hidden"):
        routers[name]["kernel"] *= 2
    return params


def test_it_starts_as_the_model_without_it():
    params = random_params(SMALL)
    blocks = MODEL.block.start(MODEL, SMALL, params["blocks"], jax.random.key(0))
    grown = params | {"blocks": blocks}
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(lambda s: s.shape, abstract_params(MODEL))
    for stage in range(2):
        ours, plain = output(MODEL, grown, stage=stage), output(SMALL, params, stage=stage)
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(("size", "added"), [("S", 157_380), ("B", 646_548), ("XL", 3_295_012)])
def test_added_parameters_are_those_of_the_release(size, added):
    def count(block):
        model = ModelConfig(SIT, 32, 4, **SIZES[size], num_classes=1000, block=block)
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))

    assert count(BlockSpec(wrap=DyDiT())) - count(DIT) == added


@pytest.mark.parametrize("t", [0.1, 0.45])
def test_what_is_off_is_as_weights_of_zero(t):
    params = deciding()
    params["blocks"]["dydit"]["tokens2"]["bias"] += 1e4  # all tokens are on
    on = routed_on(MODEL, params, np.float32([t]))[0]
    assert 2 * 2 < on.sum() < on.size and on[..., 0].all()
    plain = {name: dict(leaf) for name, leaf in params["blocks"].items() if name != "dydit"}
    heads, units = (np.repeat(on[:, i], n, axis=-1) for i, n in ((0, 8), (1, 32)))
    out = params["blocks"]["attention"]["out"]
    kernel = out["kernel"] * heads[..., None]
    plain["attention"] |= {"out": out | {"kernel": kernel}}
    plain["fc2"]["kernel"] = plain["fc2"]["kernel"] * units[..., None]
    theirs = output(SMALL, params | {"blocks": plain}, (t,) * 4)
    ours = output(MODEL, params, (t,) * 4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    everything = {k: v for k, v in params["blocks"].items() if k != "dydit"}
    assert np.abs(output(SMALL, params | {"blocks": everything}, (t,) * 4) - ours).max() > 0.1


def test_a_decision_is_0_or_1_and_has_the_gradient_of_the_sigmoid():
    logits = jnp.linspace(-20, 20, 41) + 0.01
    noise = jax.random.logistic(jax.random.key(0), (41,))
    value, back = jax.vjp(lambda logits: switched(logits, noise), logits)
    assert set(np.unique(value)) == {0.0, 1.0}
    y = jax.nn.sigmoid((logits + noise) / 5)
    np.testing.assert_allclose(back(jnp.ones(41))[0], y * (1 - y) / 5, rtol=1e-5)
    np.testing.assert_array_equal(switched(logits), logits > 0)


# Sampling by slices


def planned(text, model=MODEL, solver="euler", steps=6, params=None, cfg=2.0):
    config = SamplerConfig(solver, steps, cfg=(cfg,))
    params = halved(model) if params is None else params
    return config, accelerated(config, model, Flow(), AccelerateConfig.parse(text), params)


def halved(model=MODEL):
    return jax.tree.map(lambda leaf: leaf / 2, deciding(model))


@functools.cache
def sampled(text, model=MODEL, solver="euler", steps=6):
    return sampled_with(halved(model), text, model, solver, steps)


def sampled_with(params, text, model=MODEL, solver="euler", steps=6):
    config, segments = planned(text, model, solver, steps, params)
    sampler = Sampler(make_apply(model, one_time=True), model, Flow(), config, segments=segments)
    noise = jax.random.normal(jax.random.key(1), (2, *model.shape))
    keys = jax.random.split(jax.random.key(2), 2)
    found = np.asarray(sampler(params, noise, jnp.arange(2), keys))
    return found, segments


def widths(segments):
    """Of each stage, the different methods one after another."""
    found = {}
    for segment in segments:
        runs = found.setdefault(segment.stages[0], [])
        if not runs or runs[-1] != segment.method:
            runs.append(segment.method)
    return found


@pytest.mark.parametrize("text", ["width=1", "width=100"])
def test_slices_are_masks(text):
    ours, segments = sampled(text)
    plain, whole = sampled("exact")
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
    assert sampling_flops(MODEL, segments) < 0.9 * sampling_flops(MODEL, whole)
    most = int(text.removeprefix("width="))
    assert all(len(runs) <= most for runs in widths(segments).values())
    assert sum(s.steps for s in segments) == 6
    if most == 100:
        assert max(map(len, widths(segments).values())) > 1


@pytest.mark.long
@pytest.mark.parametrize("solver", ["heun", "ab2", "sde-euler"])
def test_slices_have_all_that_a_step_evaluates(solver):
    ours, _ = sampled("width=100", solver=solver, steps=4)
    plain, _ = sampled("exact", solver=solver, steps=4)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.long
def test_adapters_are_sliced_with_their_kernels():
    adapters = parse("lora:rank=2,on=blocks/.*;scale:on=blocks/.*")
    model = replace(MODEL, adapters=adapters)
    ours, _ = sampled("width=1", model)
    plain, _ = sampled("exact", model)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


def test_flops_of_slices_are_counted():
    _, segments = planned("width=100,width.capacity=0.5", cfg=1.0)
    method = segments[-1].method
    n, d, depth = 16, 32, 2
    assert dict(method.capacity) == {4: 2, 16: 8}
    heads, hidden = (sum(map(len, each)) / 4 for each in (method.heads, method.hidden))
    attention, mlp = 8 * n * d * d + 4 * n * n * d, 16 * n * d * d
    saved = attention * (depth - heads) + mlp * (depth - hidden / 2)
    assert method.flops(MODEL, 1, False, {}) == forward_flops(MODEL, 1) - saved


def test_as_many_tokens_as_are_on_are_enough():
    """And fewer are those with the largest logits."""
    block, part = Block(MODEL, Execution(), rngs=nnx.Rngs(0)), DyDiT()
    x, logits = jax.random.normal(jax.random.key(0), (3, 16, 32)), jnp.sin(jnp.arange(48.0))
    logits, hidden = logits.reshape(3, 16), jnp.ones((1, 4)).at[0, 2].set(0)
    whole = switched(logits)[..., None] * part.mlp(block, x, hidden)
    counts = np.asarray(logits > 0).sum(1)
    enough = part.some(block, x, hidden, logits, int(counts.max()))
    np.testing.assert_allclose(enough, whole, rtol=1e-5, atol=1e-6)
    few = np.asarray(part.some(block, x, hidden, logits, int(counts.max()) - 1))
    wrong = np.abs(few - whole).max(-1) > 1e-4
    for image in np.flatnonzero(counts == counts.max()):
        last = np.argmin(np.where(logits[image] > 0, logits[image], np.inf))
        assert np.flatnonzero(wrong[image]).tolist() == [last]
    assert wrong.sum() == (counts == counts.max()).sum()


@pytest.mark.long
def test_a_capacity_is_used_in_sampling():
    params = halved()
    tokens = params["blocks"]["dydit"]["tokens2"]
    for bias, alike in ((1e4, False), (-1e4, True)):  # all tokens are on, none is
        tokens["bias"] = jnp.full_like(tokens["bias"], bias)
        plain, _ = sampled_with(params, "exact")
        quarter, _ = sampled_with(params, "width=1,width.capacity=0.25")
        assert (np.abs(quarter - plain).max() < 1e-5 * np.abs(plain).max()) == alike


def test_neighbours_are_united_where_that_adds_least():
    on = np.bool([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    assert [steps for steps, _ in shared(on, 3)] == [2, 1, 1]
    two = shared(on, 2)
    assert [steps for steps, _ in two] == [3, 1] and two[0][1].tolist() == [1, 1, 0, 0]
    assert shared(on, 1)[0][1].all()


def test_other_scales_keep_the_widths():
    params = deciding()
    card = Card(MODEL, Flow(), "latents")
    weights = Weights(card, Path("model"), "ema", lambda: params)
    plan = make_plan(
        card, SamplerConfig("euler", 4), AccelerateConfig.parse("width=1"), None, weights
    )
    other = guided_by(plan, card, (3.0,))
    assert [s.method for s in other.segments] == [s.method for s in plan.segments]
    assert "sliced" in plan.explain()
    with pytest.raises(InputError, match="a weak model has another"):
        make_plan(card, plan.config, plan.added, weights, weights)


# Training


@functools.cache
def trained(complete):
    """A program of the loss and its gradient, the batch and the draws."""
    objective, weights = DynamicFlow(BASE, FlopsTarget(0.5, 1000), MODEL), {"complete": complete}
    batch = {"x": jax.random.normal(jax.random.key(3), (16, 8, 8, 4)), "label": jnp.arange(16) % 5}
    draws = objective.at(objective.draw(jax.random.key(4), batch), jnp.asarray(500))
    apply = make_apply(MODEL)

    def loss(params):
        return objective.loss(apply, params, {}, batch, draws, weights)

    return jax.jit(jax.value_and_grad(loss, has_aux=True) if complete else loss), batch, draws


def test_the_loss_is_its_three_terms():
    loss, batch, draws = trained(1.0)
    params = deciding()
    (total, metrics), grads = loss(params)
    for leaf in jax.tree.leaves(grads["blocks"]["dydit"]):  # every router learns
        assert np.abs(leaf).max() > 0
    assert float(metrics["target"]) == 0.75
    apart = 2 * (metrics["spent"] - 0.75) ** 2
    assert float(total) == pytest.approx(float(metrics["loss"] + metrics["complete"] + apart), 1e-6)
    blocks = {name: leaf for name, leaf in params["blocks"].items() if name != "dydit"}
    given, apply = Draws(*draws[:3]), make_apply(SMALL)
    flow = jax.jit(lambda params: BASE.loss(apply, params, {}, batch, given, {})[0])
    plain = flow(params | {"blocks": blocks})
    assert float(metrics["complete"]) == pytest.approx(float(plain), rel=1e-5)
    alone, fewer = trained(0.0)[0](params)
    assert "complete" not in fewer
    assert float(alone) == pytest.approx(float(metrics["loss"] + apart), 1e-6)


def test_stages_count_by_what_they_cost():
    params = deciding()
    loss, *_ = trained(0.0)
    _, metrics = loss(params)
    costs = np.float64([8 * n * 32**2 + 4 * n * n * 32 + 16 * n * 32**2 for n in (4, 16)])
    shares = [float(metrics[f"spent/stage{i}"]) for i in range(2)]
    assert 0.2 < min(shares) < max(shares) < 0.98
    expected = costs @ shares / costs.sum()
    assert float(metrics["spent"]) == pytest.approx(expected, rel=1e-6)
    blocks = MODEL.block.start(MODEL, SMALL, params["blocks"], jax.random.key(0))
    _, metrics = loss(params | {"blocks": blocks})
    assert float(metrics["spent"]) == pytest.approx(1, abs=1e-6)  # at the start


def test_stages_count_by_how_long_they_last():
    pyramid = Pyramid.parse("4x4@0.25,2x2@1")
    model = replace(MODEL, pyramid=pyramid)
    ours = DynamicFlow(replace(BASE, pyramid=pyramid), FlopsTarget(), model)
    costs = np.float64([d * (24 * n * 32**2 + 4 * n * n * 32) for d, n in ((1, 4), (3, 16))])
    np.testing.assert_allclose(ours.weights, costs / costs.sum(), rtol=1e-12)


def test_a_step_has_its_target_and_all_quarters():
    settings = FlopsTarget(0.5, 1000)
    ours = DynamicFlow(BASE, settings, MODEL)
    batch = {"x": jnp.zeros((32, 8, 8, 4)), "label": jnp.zeros(32, int)}
    t = np.asarray(ours.draw(jax.random.key(0), batch).t)
    for stage in range(2):
        quarters = np.floor((t[stage::2] - 0.5 * stage) * 8).astype(int)
        np.testing.assert_array_equal(quarters, np.arange(16) % 4)
    targets = []

    class Seen(DynamicFlow):
        """Shows the target of a step."""

        def loss(self, apply, params, frozen, batch, draws, weights):
            value = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
            return value, {"target": jnp.max(draws.target)}

    step = make_train_step(
        Seen(BASE, settings, MODEL), make_apply(MODEL), tx := optax.sgd(0.1), ema=0.9, accumulate=2
    )
    params = {"a": jnp.ones(2)}
    for number in (0, 99, 100, 1000):
        state = {"step": jnp.asarray(number), "params": params, "ema": params}
        _, metrics = step(state | {"opt_state": tx.init(params)}, batch, jax.random.key(0))
        targets.append(float(metrics["target"]))
    assert targets == pytest.approx([1, 1, 0.95, 0.5])


def test_noise_is_that_of_an_image():
    seeds = jnp.arange(4, dtype=jnp.uint32)
    whole, part = Noise.drawn(seeds, MODEL, 1), Noise.drawn(seeds[2:], MODEL, 1)
    assert [each.shape for each in whole] == [(2, 4, 3), (2, 4, 3), (2, 4, 16)]
    for a, b in zip(whole, part):
        np.testing.assert_array_equal(a[:, 2:], b)
    many = np.asarray(Noise.drawn(jnp.arange(2000, dtype=jnp.uint32), MODEL, 1).tokens)
    assert many.std() == pytest.approx(np.pi / 3**0.5, rel=0.02)  # of the logistic distribution


# Refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(block=BlockSpec(MoE(2, 1), DyDiT())), "these have attention and moe:experts=2"),
        (
            dict(block=BlockSpec(wrap=DyDiT(), norm=TdLn())),
            "gates of adaLN, which blocks with tdln",
        ),
        (dict(mlp_ratio=4.1), "131 hidden units must be divisible by heads"),
    ],
)
def test_models_that_have_no_such_blocks(change, words):
    with pytest.raises(InputError, match=words):
        replace(MODEL, **change)


def test_routers_and_their_objective_go_together():
    with pytest.raises(InputError, match="objective flow does not train the routers"):
        objective("flow", BASE, MODEL)
    with pytest.raises(InputError, match="wrap is none: set it to dydit"):
        objective("dydit", BASE, SMALL)
    with pytest.raises(InputError, match=r"share must be in \(0, 1\]"):
        FlopsTarget(1.5)
    made = objective("dydit:share=0.5", BASE, MODEL)
    with pytest.raises(InputError, match="quarters of every stage's times: choose a multiple of 8"):
        made.check_batch(12, 1)


@pytest.mark.parametrize(
    ("text", "model", "words"),
    [
        ("width=1", SMALL, "width is for models trained with config.model.wrap=dydit"),
        ("width=1,width.stages=2", MODEL, "width.stages has 2"),
        ("width=0", MODEL, "must be at least 1"),
        ("width.capacity=0/1", MODEL, r"its capacity 0/1 in \(0, 1\]"),
        ("width.capacity=1/1/1", MODEL, "give 1 or 2"),
        ("ras=std", MODEL, "ras takes blocks apart whose routers decide"),
        ("forecast.interval=2/1,width=1", MODEL, "cannot have both forecast and width steps"),
    ],
)
def test_plans_that_cannot_be(text, model, words):
    with pytest.raises(InputError, match=words):
        planned(text, model, params=deciding() if model is MODEL else random_params(model))


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, small_run):
    """By the settings of docs/dydit.md, whose command to sample is run too."""
    flags = ["--config.model.wrap=dydit", "--config.flow.objective=dydit:share=0.5,warmup=4"]
    flags += [f"--config.init_from={small_run}", "--config.train.steps=4"]
    code, out, err = commands.train(tmp_path / "whole", *flags)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    sample = ("--num=2", "--steps=4", "--accelerate=width=1", f"--out={tmp_path / 'pictures'}")
    code, out, err = commands.run("sample", f"--checkpoint={tmp_path / 'whole'}", *sample)
    assert code == 0, err
