"""Experts by time: identity at the start, one matrix for all images, the prior, and their authors'
numbers."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.switch import TIMES, Switch, divergence, matched, prior_mask
from tests.systems.checks import compiled, random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
SMALL = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)
MODEL = replace(SMALL, block=BlockSpec(wrap=Switch()))


def test_gates_factors_and_prior_are_the_authors():
    ref = Reference(REFERENCE / "switch_dit" / "switch_dit.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS["switch_dit"](ref))
    assert len(rows) > 45
    within(rows)


def inputs(t):
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 4)), jnp.asarray(t), jnp.arange(4)


def output(model, params, t=(0.1, 0.2, 0.3, 0.4), **options):
    x, t, y = inputs(t)
    return compiled(model, **options)(params, x, t, y, 0)


def test_it_starts_as_the_model_without_it():
    params = random_params(SMALL)
    blocks = MODEL.block.start(MODEL, SMALL, params["blocks"], jax.random.key(0))
    grown = params | {"blocks": blocks}
    np.testing.assert_array_equal(output(MODEL, grown), output(SMALL, params))


def test_one_matrix_serves_all_images_of_one_time():
    params = random_params(MODEL)
    shared = output(MODEL, params, (0.3,) * 4, one_time=True)
    np.testing.assert_allclose(shared, output(MODEL, params, (0.3,) * 4), rtol=1e-5, atol=1e-4)
    x, t, y = inputs((0.3,) * 4)
    text = str(
        jax.make_jaxpr(make_apply(MODEL, one_time=True), static_argnums=4)(params, x, t, y, 0)
    )
    assert "f32[1,16,16]" in text and "f32[4,16,16]" not in text


def test_stages_in_one_pass_have_each_its_own_times():
    params, (x, t, y) = random_params(MODEL), inputs((0.1, 0.2, 0.3, 0.4))
    parts = (x[:3], x[3:]), (t[:3], t[3:] + 0.5), (y[:3], y[3:])
    both = compiled(MODEL)(params, *parts, (0, 1))
    apply = compiled(MODEL)
    for stage, (found, *given) in enumerate(zip(both, *parts)):
        alone = apply(params, *given, stage)
        np.testing.assert_allclose(found.prediction, alone, rtol=1e-5, atol=1e-4)


def test_what_the_factor_takes_away_comes_back_after_the_block():
    params = random_params(MODEL)
    closed = jax.tree.map(jnp.zeros_like, params["blocks"]["adaln"])
    blocks = params["blocks"] | {"adaln": closed}
    plain = {name: leaf for name, leaf in blocks.items() if name != "switch"}
    np.testing.assert_allclose(
        output(MODEL, params | {"blocks": blocks}),
        output(SMALL, params | {"blocks": plain}),
        rtol=1e-5,
        atol=1e-4,
    )


def test_times_choose_experts():
    params = random_params(MODEL)
    one, other = (output(MODEL, params, (t,) * 4) for t in (0.1, 0.9))
    table = params["blocks"]["switch"]
    alike = jax.tree.map(jnp.zeros_like, table["gate"])
    off = params | {"blocks": params["blocks"] | {"switch": table | {"gate": alike}}}
    assert float(jnp.abs(one - output(MODEL, off, (0.1,) * 4)).max()) > 0.1
    assert float(jnp.abs(one - other).max()) > 0.1


def test_the_windows_of_the_prior():
    mask = prior_mask(84, 56)
    assert mask.shape == (TIMES, 84) and set(mask.sum(1)) == {56}
    assert [mask[n].argmax() for n in (0, 500, 999)] == [0, 2, 28]
    rng = np.random.default_rng(0)
    order = rng.permutation(84)
    match = np.asarray(jax.jit(lambda u: matched(u, mask))(jnp.asarray(mask[:, order])))
    np.testing.assert_array_equal(mask[:, match], mask[:, order])


def test_divergence_is_zero_for_equals_and_at_most_log_2():
    p = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    assert float(divergence(p, p)) == pytest.approx(0, abs=1e-6)
    apart = divergence(jnp.array([[1.0, 0, 0]]), jnp.array([[0, 0, 1.0]]))
    assert float(apart) == pytest.approx(np.log(2), abs=1e-4)


def test_token_merging_is_refused_and_other_accelerators_are_not():
    config = SamplerConfig("euler", 8)
    for text in ("forecast.interval=2", "forecast.place=blocks,forecast.blocks=1-2"):
        assert accelerated(config, MODEL, Flow(), AccelerateConfig.parse(text))
    with pytest.raises(InputError, match="that switch stands around"):
        accelerated(config, MODEL, Flow(), AccelerateConfig.parse("merge.ratio=0.5"))


def test_no_way_back():
    with pytest.raises(InputError, match="do not start a model without it"):
        DIT.start(SMALL, MODEL, {}, jax.random.key(0))
    with pytest.raises(InputError, match="switch:experts=2,top_k=3: top_k"):
        Switch(2, 3)


@pytest.mark.parametrize(
    ("size", "added"), [("S", 5_336_100), ("B", 21_288_996), ("XL", 111_670_356)]
)
def test_added_parameters_are_the_published_ones(size, added):
    def count(block):
        model = ModelConfig(SIT, 32, 4, **SIZES[size], num_classes=1000, block=block)
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))

    assert count(BlockSpec(wrap=Switch())) - count(DIT) == added
