"""Experts on different devices: slots, what is dropped, the way there and back."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ppflow_jax.cost.causes import cause
from ppflow_jax.cost.collectives import collectives
from ppflow_jax.devices.exchange import Way
from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.programs import Programs
from ppflow_jax.devices.sharding import AXES, batch_sharding, layout, make_mesh, tree_shardings
from ppflow_jax.errors import InputError
from ppflow_jax.flow.strata import with_block_terms
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import Output
from ppflow_jax.models.parts import DIT, BlockSpec, Execution
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.capacity import check_mesh, slots, travelling
from ppflow_jax.systems.dense2moe import Dense2MoE
from ppflow_jax.systems.experts import mixture
from ppflow_jax.systems.moe import MoE
from ppflow_jax.train.resume import changes

EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 2, 8, 12
ENOUGH = EXPERTS / TOP_K


def draw(seed, *shape):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def inputs(kind="swiglu", tokens=50):
    """Weights, tokens, gates, experts; most tokens want expert 3, and none expert 1."""
    weights = {"up": draw(0, EXPERTS, WIDTH, HIDDEN), "down": draw(1, EXPERTS, HIDDEN, WIDTH)}
    if kind == "swiglu":
        weights["gate"] = draw(2, EXPERTS, WIDTH, HIDDEN)
    else:
        weights["up_bias"] = draw(2, EXPERTS, HIDDEN)
    rng = np.random.default_rng(3)
    odds = np.array([1, 0, 1, 8, 1, 1, 1, 1]) / 14
    expert = [rng.choice(EXPERTS, TOP_K, replace=False, p=odds) for _ in range(tokens)]
    gate = jnp.float32(rng.uniform(size=(tokens, TOP_K)))
    return weights, draw(4, tokens, WIDTH), gate, jnp.asarray(np.stack(expert), jnp.int32)


def here(weights, x, gate, expert, capacity=ENOUGH):
    return jax.jit(travelling, static_argnums=(4, 5))(
        weights, x, gate, expert, EXPERTS, Way(capacity)
    )


@pytest.mark.parametrize("tokens", [50, 1])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_with_room_for_all_it_is_the_dense_program(kind, tokens):
    given = inputs(kind, tokens)
    y, kept = here(*given)
    assert kept.shape == (tokens, TOP_K) and (kept == 1).all()
    np.testing.assert_allclose(y, mixture("dense", *given), atol=2e-5)


def test_gradients_are_those_of_the_dense_program():
    weights, x, gate, expert = inputs()

    def gradient(f):
        loss = lambda weights, x, gate: jnp.sum(f(weights, x, gate, expert) ** 2)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(weights, x, gate)

    ours = gradient(lambda *given: travelling(*given, EXPERTS, Way(ENOUGH))[0])
    dense = gradient(functools.partial(mixture, "dense"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dense)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def taken(expert, room):
    """One by one: first choices before second ones, in the order of the tokens."""
    used, kept = np.zeros(EXPERTS, int), np.zeros(expert.shape)
    for k in range(expert.shape[1]):
        for i, e in enumerate(np.asarray(expert[:, k])):
            kept[i, k], used[e] = used[e] < room, used[e] + 1
    return kept


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.0])
def test_what_finds_no_slot_is_dropped_and_said(capacity):
    weights, x, gate, expert = inputs()
    expected = taken(expert, slots(len(x), EXPERTS, TOP_K, capacity))
    assert 0 < expected.mean() < 1
    y, kept = here(weights, x, gate, expert, capacity)
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_allclose(y, mixture("dense", weights, x, gate * expected, expert), atol=2e-5)
    loss = lambda x: jnp.sum(here(weights, x, gate, expert, capacity)[0] ** 2)
    lost = expected.sum(axis=1) == 0
    assert np.isfinite(jax.grad(loss)(x)).all() and not np.any(jax.grad(loss)(x)[lost])


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_the_layer_leaves_out_all_of_what_is_dropped_and_no_more(kind):
    """The bias of an expert too; the share of pairs is what training is told."""
    part = MoE(EXPERTS, TOP_K, 0, expert=kind)
    model = ModelConfig(
        PPFLOW2, 8, 4, width=WIDTH, depth=1, heads=2, num_classes=5, block=BlockSpec(part)
    )

    def block(capacity):
        far = lambda f, rows, weights, _: f(rows, weights, Way(capacity))
        run = Execution(programs=Programs(experts="dense"))
        run = replace(run, layout=Layout(exchanged=far)) if capacity else run
        made = Block(model, run, rngs=nnx.Rngs(0))
        for name in ("up_bias", "down_bias"):
            if (leaf := getattr(made.moe, name, None)) is not None:
                leaf[...] = draw(7, *leaf.shape)
        return made

    _, *rows = inputs(tokens=48)
    x, gate, expert = (a.reshape(4, 12, -1) for a in rows)
    full, plain = block(0.3), block(None)
    y, kept = full.moe(x, gate, expert)
    assert 0.2 < float(kept.mean()) < 0.4
    expected, nothing = plain.moe(x, gate * kept, expert)
    assert nothing is None
    np.testing.assert_allclose(y, expected, atol=1e-5)
    _, gate, expert = part.route(full.moe.router[...], x)
    share = 1 - float(full.moe(x, gate, expert)[1].mean())
    aux = {name: value[None] for name, value in part(full, x)[1].items()}  # one layer
    assert 0.6 < share == pytest.approx(float(part.terms(aux)["experts/dropped"]))
    assert part(plain, x)[1].keys() == {"balance"}


@pytest.mark.parametrize("capacity", [1.0, 2.0])
def test_all_slots_are_computed(capacity):
    """What `padding_flops` counts is what the compiler does."""
    given, way = inputs(tokens=64), Way(capacity)
    f = jax.jit(functools.partial(travelling, count=EXPERTS, way=way))
    found = f.lower(*given).compile().cost_analysis()["flops"]
    room = slots(64, EXPERTS, TOP_K, capacity)
    products = 2 * 3 * EXPERTS * room * WIDTH * HIDDEN
    assert products < found < 1.3 * products  # and what is done element by element


def test_slots():
    assert slots(64, 8, 2, 1.0) == 16 and slots(64, 8, 2, 1.1) == 18
    assert slots(64, 8, 2, 4.0) == slots(64, 8, 2, 9.0) == 64  # no expert twice for a token
    assert slots(64, 8, 2, float("inf")) == 64 and slots(1, 8, 1, 0.1) == 1


needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def over_a_mesh(sizes, kind="swiglu", capacity=ENOUGH):
    """The mixture over a mesh, and the same arrays for one device."""
    mesh, rules = make_mesh(**sizes), MoE(EXPERTS).rules
    weights, x, gate, expert = inputs(kind, 16 * 4)
    rows = tuple(a.reshape(16, 4, -1) for a in (x, gate, expert))
    exchanged = layout(mesh, rules, capacity).exchanged

    def f(rows, weights, way):
        tokens = (a.reshape(-1, a.shape[-1]) for a in rows)
        y, kept = travelling(weights, *tokens, EXPERTS, way)
        return y.reshape(rows[0].shape), kept.reshape(rows[1].shape)

    whole = {"blocks": {"moe": {k: w[None] for k, w in weights.items()}}}
    places = tree_shardings(whole, mesh, rules)["blocks"]["moe"]
    specs = {k: NamedSharding(mesh, P(*place.spec[1:])) for k, place in places.items()}
    run = lambda rows, weights: exchanged(f, rows, weights, "blocks/moe/")
    run = jax.jit(run, in_shardings=(batch_sharding(mesh), specs))
    return mesh, run, rows, weights


@needs_eight
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("swiglu", dict(data=2, expert=4)), ("gelu", dict(data=1, expert=4, tensor=2))],
)
def test_tokens_travel_to_their_experts_and_back(kind, sizes):
    mesh, run, rows, weights = over_a_mesh(sizes, kind)
    compiled = run.lower(rows, weights).compile()
    found = [c for c in collectives(compiled.as_text()) if c.kind == "all-to-all"]
    room = slots(64 // 8 * sizes.get("tensor", 1), EXPERTS, TOP_K, ENOUGH)
    size = EXPERTS * room * WIDTH * 4
    assert [c.size for c in found] == [size, size]  # there and back
    assert sum(c.sent for c in found) == 2 * size * 3 / 4
    assert {cause(c, mesh, frozenset()) for c in found} == {"tokens to their experts"}
    y, kept = run(rows, weights)
    assert (kept == 1).all() and y.sharding.is_equivalent_to(batch_sharding(mesh), y.ndim)
    dense = mixture("dense", weights, *(a.reshape(64, -1) for a in rows))
    np.testing.assert_allclose(y.reshape(64, -1), dense, atol=2e-5)


@needs_eight
def test_every_device_drops_of_its_own_tokens():
    _, run, rows, weights = over_a_mesh(dict(data=1, expert=8), capacity=1.0)
    _, kept = run(rows, weights)
    parts = np.split(np.asarray(rows[2]).reshape(64, -1), 8)
    expected = np.concatenate([taken(part, slots(8, EXPERTS, TOP_K, 1.0)) for part in parts])
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(kept.reshape(64, -1), expected)


@needs_eight
def test_images_that_cannot_be_split_are_computed_whole():
    weights, *few = inputs(tokens=12)
    few = tuple(a.reshape(3, 4, -1) for a in few)
    exchanged = layout(make_mesh(1, expert=8), (), 0.5).exchanged

    def f(rows, weights, way):
        assert way.axis is None
        return travelling(weights, *(a.reshape(12, -1) for a in rows), EXPERTS, way)

    y, kept = exchanged(f, few, weights, "blocks/moe/")
    assert (kept == 1).all()
    dense = mixture("dense", weights, *(a.reshape(12, -1) for a in few))
    np.testing.assert_allclose(y, dense, atol=2e-5)


@needs_eight
def test_a_mesh_has_the_axis_only_if_it_is_asked_for():
    assert make_mesh().axis_names == make_mesh(8, expert=-1).axis_names == AXES
    mesh = make_mesh(-1, 2, 1, expert=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert batch_sharding(mesh).spec == P(("data", "fsdp", "expert"))
    assert batch_sharding(make_mesh()).spec == P(("data", "fsdp"))
    assert layout(make_mesh(), (), 2.0).exchanged is None and layout(mesh).exchanged is None
    leaf = {"blocks": {"moe": {"up": jnp.zeros((2, 8, 16, 16)), "router": jnp.zeros((2, 16, 8))}}}
    split, plain = (tree_shardings(leaf, m, MoE(8).rules) for m in (mesh, make_mesh(2, 4)))
    assert split["blocks"]["moe"]["up"].spec == P(None, "expert", None, ("tensor", "fsdp"))
    assert plain["blocks"]["moe"]["up"].spec == P(None, None, None, ("tensor", "fsdp"))
    assert split["blocks"]["moe"]["router"].spec == P()
    with pytest.raises(InputError, match="mesh data=-1 fsdp=1 expert=3 tensor=1 does not cover"):
        make_mesh(expert=3)


@needs_eight
@pytest.mark.parametrize(
    ("block", "capacity", "words"),
    [
        (DIT, 2.0, "config.mesh.expert=4: the blocks have no ffn=moe but mlp"),
        (BlockSpec(Dense2MoE(8)), 2.0, "have no ffn=moe but dense2moe:experts=8"),
        (BlockSpec(MoE(6)), 2.0, "config.mesh.expert=4 does not divide the 6 experts of"),
        (BlockSpec(MoE(8)), 0.0, "config.mesh.capacity=0.0: .* with 4 no token is dropped"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_in_one_line(block, capacity, words):
    with pytest.raises(InputError, match=words) as e:
        check_mesh(make_mesh(2, expert=4), block, capacity)
    assert "\n" not in str(e.value)
    check_mesh(make_mesh(), block, capacity)  # without the axis all are fine
    check_mesh(make_mesh(2, expert=4), BlockSpec(MoE(8)), 2.0)


def test_a_name_with_a_slash_is_measured_and_not_minimised():
    outputs = [Output(jnp.zeros(()), {"a/b": jnp.float32(i), "c": jnp.float32(9)}) for i in (1, 2)]
    loss, found = with_block_terms(jnp.float32(5), PPFLOW2, outputs, {})
    assert float(loss) == 5 and {k: float(v) for k, v in found.items()} == {"a/b": 1.5}


def test_a_run_that_goes_on_is_told_that_tokens_may_be_dropped():
    def free(before, now):
        return {c.name: c.free for c in changes({"mesh": before}, {"mesh": now}, 3)}

    on, off = dict(expert=4, capacity=2.0), dict(expert=1, capacity=2.0)
    assert free(off, on) == free({}, on) == {"mesh.expert": False}
    assert free(on, on | {"capacity": 3.0}) == {"mesh.capacity": False}
    assert free(off, off | {"capacity": 3.0}) == {"mesh.capacity": True}
    assert free({}, off) == {}
