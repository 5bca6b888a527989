"""Training a mixture on meshes whose devices hold different experts, against whole ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from configs.digits import get_config
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.run import Checkpoints
from ppflow_jax.cost import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.sharding import (
    batch_sharding,
    leaf_path,
    make_mesh,
    replicated,
    spread,
    tree_shardings,
)
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import training_flops
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.run_pictures import RunPictures
from ppflow_jax.models.network import init_params
from ppflow_jax.systems.capacity import slots
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.mesh import settled
from ppflow_jax.train.program import make_program

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

BATCH, WIDTH, DEPTH, EXPERTS, TOP_K = 32, 64, 2, 8, 2
ENOUGH = EXPERTS / TOP_K


def configured(ffn="moe:experts=8,top_k=2", remat="none", capacity=ENOUGH, **mesh):
    config = get_config()
    config.model.update(width=WIDTH, depth=DEPTH, heads=4, ffn=ffn, remat=remat)
    config.data.batch_size, config.train.ema = BATCH, 0.9
    config.sample.update(count=8, steps=2)
    config.mesh.update(mesh, capacity=capacity)
    return config


def prepared(**settings):
    here, mesh, *_ = settled(Experiment.from_config(configured(**settings)))
    return here, mesh, make_program(here, mesh)


def batch_of(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(BATCH, 8, 8, 1)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 10, BATCH).astype(np.int32)}


def steps(mesh, program, state, first, last):
    """Metrics of these steps, and the state after them."""
    key, found = jax.device_put(jax.random.key(1), replicated(mesh)), []
    for step in range(first, last):
        batch = spread(batch_of(step), batch_sharding(mesh))
        state, metrics = program.step(step)(state, batch, key, {})
        found.append({name: float(value) for name, value in metrics.items()})
    return found, state


def started(program, mesh):
    """Parameters of which every one shows: fresh gates are closed."""
    rng = np.random.default_rng(0)
    draw = lambda s: np.float32(0.1 * rng.normal(size=s.shape))
    params = jax.tree.map(draw, program.abstract["params"])
    state = jax.jit(program.init)(jax.random.key(0))
    return jax.device_put(state | {"params": params, "ema": params}, program.shardings)


@functools.cache
def trained(**settings):
    """Of three steps: metrics, the last state on the host, and where its experts were."""
    _, mesh, program = prepared(**settings)
    found, state = steps(mesh, program, started(program, mesh), 0, 3)
    return found, jax.device_get(state), state["params"]["blocks"]["moe"]["up"].sharding.spec


LAYOUTS = {
    "data and experts": dict(data=2, expert=4),
    "experts": dict(data=1, expert=8),
    "fsdp and experts": dict(data=1, fsdp=2, expert=4),
    "tensor and experts": dict(data=1, expert=4, tensor=2),
    "weights whole": dict(data=1, fsdp=2, expert=4, zero=2),
    "remat": dict(data=2, expert=4, remat="full"),
    "gelu": dict(data=2, expert=4, ffn="moe:experts=8,top_k=2,shared=0,expert=gelu"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_with_room_for_all_the_losses_and_gradients_are_those_of_whole_experts(name):
    settings = LAYOUTS[name]
    found, state, place = trained(**settings)
    plain = {k: v for k, v in settings.items() if k == "ffn"}
    expected, other, whole = trained(data=8, **plain)
    for ours, theirs in zip(found, expected, strict=True):
        ours = dict(ours)
        assert ours.pop("experts/dropped") == 0 and "experts/dropped" not in theirs
        assert ours.keys() == theirs.keys()
        for metric in ("loss", "loss/stage0", "balance"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-6), metric
    ours, theirs = (optax.tree.get(s["opt_state"], "mu") for s in (state, other))
    leaves = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, a), b in leaves:
        assert np.abs(b).max() > 0, leaf_path(path)
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max(), leaf_path(path)
    assert place == P(None, "expert", None, ("tensor", "fsdp"))
    assert whole == P(None, None, None, ("tensor", "fsdp"))


@pytest.mark.long
def test_a_run_goes_on_on_any_of_these_meshes(tmp_path):
    """Two steps with whole experts, two over the axis, two over another mesh with it."""
    meshes = (dict(data=8), dict(data=2, expert=4), dict(data=1, fsdp=2, expert=4))
    parts, state = [], None
    for number, settings in enumerate(meshes):
        here, mesh, program = prepared(**settings)
        if number == 0:
            state = started(program, mesh)
        else:
            abstract = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                *(program.abstract, program.shardings),
            )
            state = Checkpoints(tmp_path, here.card, keep=9).restore(2 * number, abstract)
        found, state = steps(mesh, program, state, 2 * number, 2 * number + 2)
        parts += found
        checkpoints = Checkpoints(tmp_path, here.card, keep=9)
        checkpoints.save(2 * number + 2, state)
        checkpoints.close()
    _, mesh, program = prepared(data=8)
    whole, last = steps(mesh, program, started(program, mesh), 0, 6)
    np.testing.assert_allclose([m["loss"] for m in parts], [m["loss"] for m in whole], rtol=2e-6)
    for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(last["params"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.long
def test_too_little_room_is_counted_and_still_trains():
    found, *_ = trained(data=2, expert=4, capacity=0.5)
    whole, *_ = trained(data=8)
    for ours, theirs in zip(found, whole):
        assert 0.4 < ours["experts/dropped"] < 0.9  # half of all slots that would be needed
        assert np.isfinite(ours["loss"]) and ours["loss"] != theirs["loss"]


@pytest.fixture(scope="module")
def report():
    config = configured(data=2, expert=4, capacity=2.0)
    return dry_run.dry_run(config, Target("cpu:8", tuple(jax.devices()), None))


@pytest.mark.long
def test_what_travels_is_what_the_formula_says(report):
    step, sampler = report.programs
    model = report.experiment.card.model
    causes = report.causes(step)
    (travel,) = [row for row in causes if row[0] == "tokens to their experts"]
    room = [slots(2 * tokens, EXPERTS, TOP_K, 2.0) for tokens in (4, 16)]  # 2 images of a stage
    # There and back, and in the backward pass the same.
    arrays = 4 * DEPTH * EXPERTS * sum(room) * WIDTH * 4
    assert travel[1:] == ("all-to-all", 8, 8 * DEPTH, pytest.approx(arrays * 3 / 4))
    # All slots are computed, full or not
    more = 8 * (EXPERTS * sum(room) - TOP_K * 2 * (4 + 16))
    pair = 2 * 3 * WIDTH * int(WIDTH * model.mlp_ratio)
    assert step.flops - training_flops(model, (0, 1), BATCH) == 3 * DEPTH * more * pair
    assert not [row for row in report.causes(sampler) if row[1] == "all-to-all"]
    assert [row for row in report.causes(sampler) if row[0] == "weights gathered (blocks)"]
    params = report.parts["params"] / report.whole["params"]
    assert 1 / 4 < params < 1 / 2


@pytest.mark.long
def test_pictures_drop_nothing():
    card = Experiment.from_config(configured()).card
    params = init_params(card.model, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.02 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), params)
    pictures = []
    for mesh in (make_mesh(8), make_mesh(2, expert=4), make_mesh(1, 2, expert=4)):
        sample = RunPictures(
            Decoder(card),
            SamplerConfig("euler", 2, cfg=(1.0,)),
            told=np.arange(8, dtype=np.int32),
            seed=0,
            mesh=mesh,
        )
        placed = tree_shardings(params, mesh, card.model.block.rules)
        pictures.append(sample(jax.device_put(params, placed)).astype(int))
    assert pictures[0].std() > 1
    for other in pictures[1:]:
        assert np.abs(other - pictures[0]).max() <= 1


def test_impossible_meshes_are_refused_before_anything_is_made():
    for settings, words in (
        (dict(data=2, expert=4, ffn="mlp"), "no ffn=moe but mlp"),
        (dict(data=2, expert=4, ffn="moe:experts=6"), "does not divide the 6 experts"),
        (dict(data=2, expert=4, capacity=-1.0), "config.mesh.capacity=-1.0"),
        (dict(expert=4, auto=True), "config.mesh.auto does not count"),
        (dict(data=8, expert=4), "does not cover the 8"),
    ):
        with pytest.raises(InputError, match=words):
            prepared(**settings)
