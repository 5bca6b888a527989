"""Local and linear attention: what a token sees, where they start, what teaches them, and their
authors' numbers."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ppflow_jax as pf
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.attention import attend
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.parts import BlockSpec, Execution, FullAttention
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.clear import Clear, covers, local_attention, pooled
from ppflow_jax.systems.dico import Convolution, DiCo
from ppflow_jax.systems.linfusion import EPSILON, LinFusion, linear_attention
from ppflow_jax.systems.mixer_distillation import Distil, attending, check_teacher
from tests import commands
from tests.systems.checks import compiled, random_params, within
from tests.systems.parity_clear import seen
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
SMALL = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)


def with_mixer(mixer, model=SMALL):
    return replace(model, block=BlockSpec(mixer=mixer))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(n, heads=2, width=8):
    return tuple(draw(2, n, heads, width, seed=i) for i in range(3))


@pytest.mark.parametrize(("name", "count"), [("clear", 20), ("linfusion", 35), ("dico", 4)])
def test_outputs_and_gradients_are_the_authors(name, count):
    ref = Reference(REFERENCE / name / f"{name}.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS[name](ref))
    assert len(rows) > count
    within(rows)


@pytest.mark.parametrize(
    ("grid", "radius"), [((8, 8), 3), ((32, 16), 4), ((6, 10), 2), ((5, 7), 1), ((24, 24), 8)]
)
def test_tiles_see_the_circle_and_nothing_else(grid, radius):
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    circle = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    np.testing.assert_array_equal(seen(grid, radius), circle)


def test_local_attention_is_masked_attention():
    grid, radius = (16, 24), 4
    q, k, v = qkv(grid[0] * grid[1])
    mask = jnp.asarray(seen(grid, radius) > 0)[None, None]
    ours = local_attention(q, k, v, grid, radius)
    dense = jax.nn.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(ours, dense, atol=2e-6)
    assert covers((8, 8), 10) and not covers((8, 8), 9)
    wide = local_attention(q, k, v, grid, 100)
    np.testing.assert_allclose(wide, attend("deferred", q, k, v), atol=2e-6)


def test_far_tokens_are_seen_only_as_cells():
    grid, radius = (8, 8), 2
    q, k, v = qkv(64)
    corner = lambda v, more: local_attention(q, k, v, grid, radius, more)[:, 0].sum()
    cells = lambda v: (pooled(jnp.full((4, 4), 1 / 16), k, grid), pooled(jnp.ones((4, 4)), v, grid))
    alone = jax.grad(lambda v: corner(v, None))(v)[0].any((-2, -1))
    assert alone.nonzero()[0].tolist() == [0, 1, 8, 9]
    assert bool(jax.grad(lambda v: corner(v, cells(v)))(v)[0].any((-2, -1)).all())


def test_linear_attention_is_the_mean_with_positive_weights():
    q, k, v = qkv(12)
    positive = lambda x: np.where(x > 0, x, np.expm1(x)) + 1
    pairs = np.einsum("bnhe,bmhe->bhnm", positive(np.float64(q)), positive(np.float64(k)))
    pairs = pairs / (pairs.sum(-1, keepdims=True) + 12 * EPSILON)
    dense = np.einsum("bhnm,bmhe->bnhe", pairs, np.float64(v))
    np.testing.assert_allclose(linear_attention(q, k, v), dense, atol=1e-5)
    order = np.random.default_rng(0).permutation(12)
    moved = linear_attention(*(a[:, order] for a in (q, k, v)))
    np.testing.assert_allclose(moved, linear_attention(q, k, v)[:, order], atol=1e-5)


def test_other_sequences_divide_by_their_own_length():
    """The original divides by the number of queries: its weights do not sum to 1."""
    q, k, _ = qkv(12)
    ones = jnp.ones((2, 30, 2, 8))
    out = linear_attention(q, jnp.tile(k, (1, 3, 1, 1))[:, :30], ones)
    np.testing.assert_allclose(out, 1, atol=1e-3)


def predictions(model, params, **options):
    x, t = draw(4, 8, 8, 4), jnp.full(4, 0.3)
    apply = compiled(model)
    return apply(params, x, t, jnp.arange(4), 1, **options)


def test_where_the_circle_covers_the_grid_it_is_full_attention():
    params = random_params(SMALL)
    full = predictions(SMALL, params)
    np.testing.assert_array_equal(predictions(with_mixer(Clear(100)), params), full)
    assert float(jnp.abs(predictions(with_mixer(Clear(2)), params) - full).max()) > 1e-3


@pytest.mark.parametrize("mixer", [Clear(2, 2), LinFusion(24)])
def test_full_attention_can_take_its_place_on_the_same_leaves(mixer):
    model, params = with_mixer(mixer), random_params(SMALL)
    grown = mixer.start(model, SMALL, params["blocks"], jax.random.key(0))
    grown = params | {"blocks": grown}
    taps = Taps(mixed=(1,))
    teacher = predictions(model, grown, parts=attending, taps=taps)
    plain = predictions(SMALL, params, taps=taps)
    np.testing.assert_allclose(teacher.prediction, plain.prediction, rtol=1e-5, atol=1e-6)
    mixed = (output.taps["mixed/1"] for output in (teacher, plain))
    np.testing.assert_allclose(*mixed, rtol=1e-5, atol=1e-6)
    ours = predictions(model, grown, taps=taps)
    assert float(jnp.abs(ours.taps["mixed/1"] - plain.taps["mixed/1"]).max()) > 1e-3


def test_taps_are_the_branch_and_change_nothing():
    model, params = with_mixer(Clear(2)), random_params(SMALL)
    taken = predictions(model, params, taps=Taps(h=(1,), mixed=(0, 1)))
    np.testing.assert_allclose(taken.prediction, predictions(model, params), rtol=1e-5, atol=1e-5)
    silent = jax.tree.map(jnp.zeros_like, params["blocks"]["attention"]["out"])
    silent = params["blocks"] | {"attention": params["blocks"]["attention"] | {"out": silent}}
    off = predictions(model, params | {"blocks": silent}, taps=Taps(mixed=(0, 1)))
    assert not off.taps["mixed/0"].any() and taken.taps["mixed/0"].any()


def loss_of(mixer, settings, params):
    model = with_mixer(mixer)
    base = FlowObjective(model.pyramid, Flow(), model.null_label)
    objective = settings.on(base, model)
    batch = {"x": draw(4, 8, 8, 4), "label": jnp.arange(4)}
    draws = objective.draw(jax.random.key(0), batch)
    frozen, apply = {"teacher": params}, make_apply(model)

    def loss(params):
        return objective.loss(apply, params, frozen, batch, draws, {})

    ((total, metrics), grads) = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(total), {k: float(v) for k, v in metrics.items()}, grads


def test_a_student_that_sees_all_is_its_teacher():
    total, metrics, _ = loss_of(Clear(100), Distil(every=1), random_params(SMALL))
    assert max(metrics["kd"], metrics["features"]) < 1e-9
    assert total == pytest.approx(metrics["loss"], rel=1e-6)


def test_both_terms_are_added_with_their_weights():
    params = random_params(SMALL)
    total, metrics, _ = loss_of(Clear(1), Distil(0.25, 2.0, every=2), params)
    assert min(metrics["kd"], metrics["features"]) > 1e-3
    expected = metrics["loss"] + 0.25 * metrics["kd"] + 2 * metrics["features"]
    assert total == pytest.approx(expected, rel=1e-5)
    total, metrics, _ = loss_of(Clear(1), Distil(1.0, 0.0), params)
    assert total == pytest.approx(metrics["loss"] + metrics["kd"]) and "features" not in metrics


def test_a_convolution_sees_its_neighbours_and_the_mean_of_all():
    model = with_mixer(DiCo())
    block = random_params(model)["blocks"]["dico"]
    graph, _ = nnx.split(nnx.eval_shape(lambda: Convolution(16, Execution(), nnx.Rngs(0))))
    own = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], block))
    x, grid = draw(1, 24, 16), (4, 6)
    seen = jax.grad(lambda x: own.tokens(x, grid)[0, 8].sum())(x)[0].any(-1)
    assert seen.nonzero()[0].tolist() == [1, 2, 3, 7, 8, 9, 13, 14, 15]
    kernel = own.kernel[...][:, :, None]
    dense = jax.lax.conv_general_dilated(
        *(x.reshape(1, 4, 6, 16), kernel, (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=16,
    )
    dense = jax.nn.gelu(dense + own.bias[...][None, None, None], approximate=False)
    np.testing.assert_allclose(own.tokens(x, grid), dense.reshape(x.shape), atol=1e-5)
    gates = own.gates(draw(2, 24, 16))
    assert gates.shape == (2, 1, 16) and 0 < gates.min() and gates.max() < 1


def test_parameters_of_a_convolution():
    """3 D^2 + 9 D and four biases, where attention has 4 D^2 and four."""
    count = lambda mixer: sum(
        leaf.size for leaf in jax.tree.leaves(abstract_params(with_mixer(mixer))["blocks"])
    )
    assert count(FullAttention()) - count(DiCo()) == 2 * (16**2 - 9 * 16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Clear(0), "radius must be at least 1"),
        (lambda: Clear(2, 1), "pool at least 2"),
        (lambda: LinFusion(-1), "hidden must be"),
        (lambda: Distil(every=0), "every at least 1"),
        (lambda: with_mixer(Clear(2, 4)), "4x4 tokens do not divide the 2x2 tokens of stage 0"),
        (lambda: loss_of(FullAttention(), Distil(), None), "config.model.mixer is attention"),
        (lambda: loss_of(Clear(), Distil(), None), "the model has 2 blocks"),
        (lambda: loss_of(DiCo(), Distil(), None), "config.model.mixer is dico"),
        (
            lambda: replace(
                with_mixer(LinFusion()), adapters=parse("lora:on=blocks/attention/qkv")
            ),
            "is none of blocks/attention/out",
        ),
        (
            lambda: check_teacher(
                Distil(every=1).on(FlowObjective(PPFLOW2, Flow(), 5), with_mixer(Clear())),
                with_mixer(Clear()),
            ),
            "needs a teacher with full attention, this one has clear",
        ),
        (
            lambda: LinFusion().start(SMALL, with_mixer(Clear()), {}, jax.random.key(0)),
            "starts from full attention, not from clear",
        ),
        (
            lambda: BlockSpec().start(SMALL, with_mixer(LinFusion()), {}, jax.random.key(0)),
            "attention cannot start",
        ),
        (
            lambda: predictions(with_mixer(Clear(2)), random_params(SMALL), taps=Taps(logits=(0,))),
            "there is clear:radius=2,pool=0 instead",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("mixer", [Clear(2), LinFusion(), DiCo()])
def test_token_merging_is_refused_and_other_accelerators_are_not(mixer):
    config, model = SamplerConfig("euler", 8), with_mixer(mixer)
    for text in ("forecast.interval=2", "forecast.place=blocks,forecast.blocks=1-2"):
        assert accelerated(config, model, Flow(), AccelerateConfig.parse(text))
    with pytest.raises(InputError, match="merge is for full attention"):
        accelerated(config, model, Flow(), AccelerateConfig.parse("merge.ratio=0.5"))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_trunk_of_its_own_has_the_grid_of_the_stage(stage):
    """As accelerators scan the blocks."""
    model = with_mixer(Clear(2, 2))
    params, x, t = random_params(model), draw(4, 8, 8, 4), jnp.full(4, 0.3)

    def trunk(blocks, h, c):
        return jax.lax.scan(lambda h, block: (block(h, c), None), h, blocks)

    apply = compiled(model)
    given = params, x, t, jnp.arange(4), stage
    np.testing.assert_allclose(apply(*given, trunk)[0], apply(*given), rtol=1e-5, atol=1e-5)


def test_flops_grow_with_tokens_and_not_with_their_square():
    def branch(mixer, latent):
        model = ModelConfig(SIT, latent, 4, 64, 1, 4, 5, block=BlockSpec(mixer=mixer))
        return mixer.flops(model, 0, (latent // 2) ** 2)

    for mixer in (Clear(4), LinFusion()):
        assert branch(mixer, 128) / branch(mixer, 64) == pytest.approx(4, rel=0.01)
        assert branch(mixer, 128) < branch(FullAttention(), 128)
    assert branch(FullAttention(), 128) / branch(FullAttention(), 64) > 12


@pytest.mark.long
@pytest.mark.parametrize("mixer", [Clear(2, 2), LinFusion(), DiCo()], ids=lambda m: m.kind)
def test_a_killed_student_goes_on_with_the_same_bits(tmp_path, small_run, mixer):
    """The commands of docs/mixers.md; DiCo has no teacher."""
    flags = [f"--config.model.mixer={mixer}", "--config.train.steps=4"]
    if mixer != DiCo():
        flags += ["--config.flow.objective=distil:every=1", f"--config.train.teacher={small_run}"]
    code, out, err = commands.train(tmp_path / "whole", *flags)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    model = pf.load(tmp_path / "whole")
    assert model.config.block.mixer == mixer
    assert model.sample(2, plan=model.plan(steps=2)).latents.shape == (2, 8, 8, 1)
