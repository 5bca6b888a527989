"""Learned caching: mixed and routed branches, what trains a router, and its authors' numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.explain import explain, memory_bytes
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.harmonica import Mixed, learned, router_of, step_weights
from ppflow_jax.systems.registry import take_block
from ppflow_jax.systems.routed import RoutedTables, branch_flops
from tests.contract.test_parts import TOGETHER
from tests.systems.checks import random_params, within
from tests.systems.parity_harmonica import Ddpm
from tests.systems.parity_moe import nchw, nhwc
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=2, width=16, depth=3, heads=2, num_classes=4)
CONFIG = SamplerConfig("ab2", 8, cfg=(1.0, 2.0))
SEGMENTS = plan(CONFIG, MODEL.pyramid, Flow())
NOISE = jax.random.normal(jax.random.key(3), (4, *MODEL.shape))
LABELS = jnp.arange(4)


@pytest.fixture(scope="module")
def ref():
    return Reference(REFERENCE / "harmonica" / "harmonica.npz")


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def masks_of(seed=0, steps=8, depth=3, patterns=2):
    """Of two stages of four steps; the first of each computes everything."""
    rng = np.random.default_rng(seed)
    some = rng.random((patterns, depth, 2)) < 0.5
    masks = some[np.arange(steps) % patterns]
    masks[[0, 4]] = True
    return masks


def sampled(model, params, segments, config=CONFIG):
    sampler = Sampler(make_apply(model), model, Flow(), config, segments=segments)
    noise = jax.random.normal(jax.random.key(3), (4, *model.shape))
    return np.asarray(sampler(params, noise, LABELS))


def test_the_numbers_are_the_authors(ref):
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS["harmonica"](ref))
    assert len(rows) == 9
    within(rows)


def test_a_rollout_begins_anew(ref):
    """In epochs that renew the weights, theirs has another rollout's branches in its first step."""
    model, mixed = Ddpm(ref), ref["train/first_step_mixed"]
    assert mixed.any() and not mixed.all()
    for epoch, theirs_is_wrong in enumerate(mixed):
        x, y = nhwc(ref["train/x0"][epoch]), jnp.asarray(ref["train/y"][epoch])
        scores = jnp.ones((model.config.depth, 2))
        first = model.steps - 1
        with jax.default_matmul_precision("highest"):
            ours = nchw(model.step(y, first, x, None, scores)[0])
            np.testing.assert_array_equal(ours, nchw(model.step(y, first, x, None, None)[0]))
        error = np.abs(ours - ref["train/first_x_out"][epoch]).max() / np.abs(ours).max()
        assert error > 1e-4 if theirs_is_wrong else error < 1e-6


def test_routed_branches_are_mixed_ones_with_scores_of_0_and_1(params):
    """Also where the guidance scale changes within a stage, and the memory stays."""
    config = replace(CONFIG, cfg=(1.0, 2.0, 3.0), cfg_until=(0.5, 0.75, 1.0))
    segments, masks = plan(config, MODEL.pyramid, Flow()), masks_of()
    routed = RoutedTables(3, masks).applied(segments)
    assert [len(s.method.patterns) for s in routed] == [3, 3, 3]  # with the full one
    mixed, first = [], 0
    for s in segments:
        inputs = {"scores": np.float32(masks[first : first + s.steps])}
        every = (True,) * s.steps
        mixed.append(replace(s, method=Mixed(), full=every, inputs=inputs, keeps=first == 6))
        first += s.steps
    ours = sampled(MODEL, params, routed, config)
    np.testing.assert_array_equal(ours, sampled(MODEL, params, tuple(mixed), config))
    plain = sampled(MODEL, params, segments, config)
    assert 1e-3 < np.abs(ours - plain).max() / np.abs(plain).max() < 1


def test_other_branches_are_what_was_computed_last():
    """Against a walk through the blocks, one step after another."""
    model, masks = replace(MODEL, pyramid=SIT), masks_of(1)[:4]
    params, apply, kept = random_params(model), make_apply(model), {}

    def trunk(step, blocks, h, c):
        for layer in range(model.depth):
            block = jax.tree.map(lambda p, layer=layer: p[layer], blocks)
            parts = [m[:, None] for m in block.modulation(c)]
            for n, branch in enumerate((block.attention, block.mlp)):
                shift, scale, gate = parts[3 * n : 3 * n + 3]
                if masks[step, layer, n]:
                    centred = h - h.mean(-1, keepdims=True)
                    normed = centred / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
                    kept[layer, n] = branch(normed * (1 + scale) + shift)
                h = h + gate * kept[layer, n]
        return h, None

    x, t = NOISE, np.linspace(0, 1, 5, dtype=np.float32)
    for step in range(4):
        v, _ = apply(params, x, jnp.full(4, t[step]), LABELS, 0, trunk=partial(trunk, step))
        x = x + (t[step + 1] - t[step]) * v
    config = SamplerConfig("euler", 4)
    routed = RoutedTables(3, masks).applied(plan(config, SIT, Flow()))
    ours = sampled(model, params, routed, config)
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


def test_blocks_of_other_parts_are_taken_apart_as_they_are():
    parts = {"block": take_block(dict(TOGETHER)), "adapters": parse("affiner:rank=2,on=.*")}
    model = replace(MODEL, depth=2, **parts)
    params, config = random_params(model), SamplerConfig("euler", 2)
    segments = plan(config, model.pyramid, Flow())
    every = RoutedTables(2, np.ones((2, 2, 2), bool)).applied(segments)
    ours, plain = (sampled(model, params, s, config) for s in (every, segments))
    np.testing.assert_array_equal(ours, plain)
    assert sampling_flops(model, every) == sampling_flops(model, segments)


def test_a_plan_is_explained_and_its_cost_is_that_of_what_is_computed(params):
    masks = masks_of()
    routed = RoutedTables(3, masks).applied(SEGMENTS)
    # Every branch that is not computed, in its stage, with and without guidance
    expected = sampling_flops(MODEL, SEGMENTS)
    for step, mask in enumerate(masks):
        tokens = 4 if step < 4 else 16
        left_out = np.sum(~mask, axis=0)
        attention = 8 * tokens * 16**2 + 4 * tokens**2 * 16
        mlp = 16 * tokens * 16**2
        expected -= (1 if step < 4 else 2) * int(left_out[0] * attention + left_out[1] * mlp)
    assert sampling_flops(MODEL, routed) == expected
    assert branch_flops(MODEL, 1) == (8 * 16**3 + 4 * 16**3, 16 * 16**3)
    sampler = Sampler(make_apply(MODEL), MODEL, Flow(), CONFIG, segments=routed)
    lines = explain(sampler, MODEL, 4).splitlines()
    assert lines[0].split()[3:5] == ["full", "routed"]
    assert [line.split()[3:5] for line in lines[1:3]] == [
        [str(f := int(masks[part].all(axis=(1, 2)).sum())), str(4 - f)]
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert memory_bytes(sampler, MODEL, 4) == 2 * 3 * (2 * 4) * 16 * 16 * 4
    sampler(params, NOISE, LABELS)
    sampler(params, NOISE + 1, LABELS)
    assert sampler.compiled._cache_size() == 2  # one program a stage, whatever the patterns


def test_a_stage_begins_with_a_full_step():
    for step in (0, 4):
        masks = np.ones((8, 3, 2), bool)
        masks[step, 1, 0] = False
        with pytest.raises(InputError, match=f"at step {step}: a stage"):
            RoutedTables(3, masks).applied(SEGMENTS)


def toy(steps=4, depth=2):
    """A student whose output is x times the mean score, and scores to begin with."""
    logits = jax.random.normal(jax.random.key(0), (steps, depth, 2))

    def student(scores):
        return jnp.ones((2, 3)) * scores.mean(), scores

    return router_of(logits, 0.01), student


def test_an_update_is_of_one_step_alone_and_its_gradient_that_of_the_loss():
    router, student = toy()
    price = jnp.array([[0.1, 0.2], [0.3, 0.4]])

    def loss(logits):
        scores = jax.nn.sigmoid(logits)
        return 3 * jnp.mean((2 - student(scores)[0]) ** 2) + jnp.sum(price * scores)

    teacher = jnp.full((2, 3), 2.0)
    now = learned(router, 1, student, teacher, 3.0, price, 0.01)
    expected, slope = jax.value_and_grad(loss)(router.logits[1])
    assert float(now.loss) == pytest.approx(float(expected))
    scores = jax.nn.sigmoid(router.logits[1])
    ours = (price - now.worth) * scores * (1 - scores)
    np.testing.assert_allclose(ours, slope, rtol=1e-5)
    changed = np.asarray(now.router.logits != router.logits)
    assert changed[1].all() and not changed[[0, 2, 3]].any()
    # The first step of AdamW has the length of its rate
    moved = now.router.logits[1] - router.logits[1]
    np.testing.assert_allclose(moved, -0.01 * jnp.sign(slope), rtol=1e-3)
    counts = jax.tree.leaves(now.router.optimizer)[0]
    assert counts.tolist() == [0, 1, 0, 0]
    far = router._replace(logits=jnp.full_like(router.logits, 4.999))
    for rate, end in ((1.0, 5.0), (20.0, -5.0)):
        price = jnp.full((2, 2), -1.0 if end > 0 else 1.0)
        found = learned(far, 0, student, teacher, 0.0, price, rate).router.logits
        assert (found[0] == end).all()


def test_weights_of_steps_are_successive_differences_of_whole_rollouts():
    order, fixed, scores = (
        [4, 3, 2, 1, 0],
        (4, 1),
        jnp.tile(jnp.linspace(0.2, 0.8, 5)[:, None, None], 2),
    )

    def step(i, x, memory, r):
        """x' = x + (r fresh + (1 - r) kept), kept where r > .5."""
        fresh = jnp.sin(x + i)
        if r is None:
            return x + fresh, None
        r = r[0, 0]
        value = r * fresh + (1 - r) * (jnp.zeros_like(x) if memory is None else memory)
        keeps = value if memory is None else jnp.where(r > 0.5, value, memory)
        return x + value, keeps

    def rollout(switched):
        x, memory = jnp.arange(3.0), None
        for i in order:
            one = jnp.ones((1, 2))
            r = one if i in fixed or i not in switched else scores[i]
            x, memory = step(i, x, None if i in fixed else memory, r)
        return np.asarray(x)

    found, _ = step_weights(step, order, fixed, jnp.arange(3.0), scores)
    assert set(found) == {3, 2, 0}
    before, switched = rollout(()), []
    for i in (3, 2, 0):
        switched.append(i)
        now = rollout(switched)
        assert float(found[i]) == pytest.approx(np.mean((now - before) ** 2), rel=1e-4)
        before = now
    ones, _ = step_weights(step, order, fixed, jnp.arange(3.0), jnp.ones((5, 1, 2)))
    assert all(float(value) == 0 for value in ones.values())
