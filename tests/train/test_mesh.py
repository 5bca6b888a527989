"""The mesh of a run: chosen, cut into slices, with weights whole or split."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import get_config
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.cost import dry_run
from ppflow_jax.cost.chips import CHIPS
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices import sharding, slices
from ppflow_jax.devices.sharding import (
    batch_sharding,
    leaf_path,
    make_mesh,
    replicated,
    spread,
    tree_shardings,
)
from ppflow_jax.devices.zero import Whole
from ppflow_jax.errors import InputError
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.run_pictures import RunPictures
from ppflow_jax.models.network import init_params
from ppflow_jax.train import mesh as mesh_module
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.mesh import need, settled
from ppflow_jax.train.program import make_program

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def configured(dtype="float32", accumulate=1, **mesh):
    config = get_config()
    config.model.update(width=64, depth=2, heads=4, dtype=dtype)
    config.data.batch_size, config.train.accumulate = 32, accumulate
    config.train.ema = 0.9
    config.mesh.update(mesh)
    return config


def experiment(**settings):
    return Experiment.from_config(configured(**settings))


def halves(device):
    """Two slices of the eight devices, every other one."""
    return device.id % 2


def test_whole_gathers_what_fsdp_splits_and_nothing_else():
    mesh = make_mesh(2, 2, 2)
    model = experiment().card.model
    params = init_params(model, jax.random.key(0))
    stored = jax.device_put(params, tree_shardings(params, mesh))
    whole = Whole(mesh, (), "bfloat16")
    held = jax.jit(whole)(stored)
    for (path, leaf), place, was in zip(
        jax.tree_util.tree_leaves_with_path(held),
        jax.tree.leaves(whole.places(params)),
        jax.tree.leaves(stored),
    ):
        name, cut = leaf_path(path), "fsdp" in str(was.sharding.spec)
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim) and "fsdp" not in str(place.spec)
        assert leaf.dtype == ("bfloat16" if cut and name.startswith("blocks/") else "float32"), name
        np.testing.assert_array_equal(leaf, was.astype(leaf.dtype))
    kernel = whole.places(params)["blocks"]["fc1"]["kernel"]
    assert kernel.spec == jax.sharding.PartitionSpec(None, None, "tensor")
    pairs = zip(jax.tree.leaves(held), jax.tree.leaves(stored))
    cut = [x for x, y in pairs if "fsdp" in str(y.sharding.spec)]
    assert whole.bytes(params) == sum(x.addressable_shards[0].data.nbytes for x in cut)
    assert whole.fits_beside(params, None) and whole.fits_beside(params, 4.0 * whole.bytes(params))
    assert not whole.fits_beside(params, 3.9 * whole.bytes(params))


@pytest.fixture(scope="module")
def report():
    """Of a step with two microbatches, and its sampler, weights whole.

    One stage: XLA on CPU sums the gradients of two apart.
    """
    config = configured(data=2, fsdp=4, zero=2, accumulate=2)
    config.model.pyramid = "2x2@1"
    config.sample.update(count=8, steps=2)
    return dry_run.dry_run(config, Target("tpu:v5e:2x4", tuple(jax.devices()), CHIPS["v5e"]))


def test_a_step_gathers_the_weights_once_and_sums_each_gradient_once(report):
    step, sampler = report.programs
    config = configured(data=2, fsdp=4, zero=2)
    config.model.pyramid = "2x2@1"
    program = make_program(Experiment.from_config(config), report.mesh)
    params = program.abstract["params"]
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(program.shardings["params"]))
    split = sorted(leaf.size for leaf, place in leaves if "fsdp" in str(place.spec))

    def gathered(collectives):
        found = [c for c in collectives if c.kind == "all-gather"]
        assert {c.times for c in found} == {1}
        return sorted(n for c in found for n in c.elements)

    assert gathered(step.network) == gathered(sampler.network) == split
    causes = report.causes(step)
    assert not [c for c in causes if c[0].startswith("unexplained")], causes
    size = 2 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    # Of both microbatches: there and back in a group, and a quarter there and back across two.
    summed = sum(c.sent for c in step.network if c.kind in ("all-reduce", "reduce-scatter"))
    assert summed == pytest.approx(size * (2 * 3 / 4 + 2 / 4 / 2), rel=0.02)


def test_weights_that_do_not_fit_beside_the_state_stay_split_in_samplers():
    mesh, split = make_mesh(2, 4), experiment(data=2, fsdp=4)
    assert make_program(split, mesh).gather and make_program(split, mesh, 1e9).gather
    assert make_program(split, mesh, 1e5).gather is None
    assert make_program(experiment(), make_mesh(8)).gather is None  # they are whole


@pytest.mark.long
def test_pictures_of_split_weights_are_those_of_whole_ones():
    card = experiment().card
    params = init_params(card.model, jax.random.key(0))
    # fresh networks give zeros
    params = jax.tree.map(lambda p: p + 0.02 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), params)
    pictures = []
    for mesh in (make_mesh(8), make_mesh(2, 4)):
        sample = RunPictures(
            Decoder(card),
            SamplerConfig("euler", 2, cfg=(1.0,)),
            told=np.arange(8, dtype=np.int32),
            seed=0,
            mesh=mesh,
        )
        pictures.append(sample(jax.device_put(params, tree_shardings(params, mesh))))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].std() > 1


@pytest.mark.long
def test_auto_holds_weights_whole_where_they_fit_and_else_splits_over_as_few_as_fit(monkeypatch):
    def deep(**mesh):
        config = configured(**mesh)
        config.model.depth = 8
        return Experiment.from_config(config)

    auto, program = deep(auto=True), make_program(deep(), make_mesh(8))

    def asked(memory):
        found = settled(auto, memory=memory)
        c = found.experiment.config.mesh
        assert dict(found.mesh.shape) == {k: c[k] for k in ("data", "fsdp", "tensor")}
        assert auto.card is found.experiment.card and auto.config.mesh.auto and not c.auto
        return c.fsdp, c.zero, found.reason

    assert asked(1e9)[:2] == (8, 2) and "weights whole during a step" in asked(1e9)[2]
    assert asked(None)[:2] == (1, 3) and "not known" in asked(None)[2]
    whole = sum(need(auto, program, make_mesh(1, 8), 2)) / mesh_module.SHARE
    assert asked(whole + 10)[:2] == (8, 2)
    assert asked(whole - 10)[1] == 3 and "whole they would need" in asked(whole - 10)[2]
    monkeypatch.setattr(mesh_module, "WIDEST", 1)  # as if whole weights never fitted
    for fsdp in (2, 4, 8):
        least = sum(need(auto, program, make_mesh(-1, fsdp), 3)) / mesh_module.SHARE
        assert asked(least + 10)[:2] == (fsdp, 3)
        assert asked(least - 10)[0] == min(2 * fsdp, 8)
    assert asked(1e3)[0] == 8 and "does not fit" in asked(1e3)[2]
    one = settled(auto, jax.devices()[:1], 1e3)
    assert (
        one.mesh.size == 1 and one.experiment.config.mesh.zero == 3 and "one device" in one.reason
    )


@pytest.mark.parametrize(
    ("count", "tpu", "found"),
    [
        (16, False, [16]),
        (16, True, [8, 16]),
        (2, True, [2]),
        (8, True, [4, 8]),
        (64, True, [16]),
        (1, True, []),
    ],
)
def test_auto_makes_two_groups_of_a_slice_rather_than_one(count, tpu, found):
    widths = [f for f in range(1, count + 1) if count % f == 0]
    assert mesh_module._groups(widths, count, tpu) == found


def test_the_state_that_auto_counts_is_that_of_the_program():
    split = experiment(data=2, fsdp=4)
    program = make_program(split, make_mesh(2, 4))
    report = dry_run.dry_run(
        split.config, Target("cpu:8", tuple(jax.devices()), None), sampler=False
    )
    found = need(split, program, make_mesh(2, 4), 3)
    assert found.state == sum(v for k, v in report.parts.items() if k != "batch") + 4  # the step
    assert found.gradients == report.parts["params"]


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(auto=True, fsdp=2), "config.mesh.auto chooses data, fsdp and zero"),
        (dict(zero=1), "config.mesh.zero=1: give 3"),
    ],
)
def test_meshes_that_contradict_themselves_are_refused(mesh, words):
    with pytest.raises(InputError, match=words):
        asked = experiment(**mesh)
        make_program(asked, settled(asked).mesh)


def test_slices_are_parts_of_data(monkeypatch):
    monkeypatch.setattr(slices, "slice_of", halves)
    mesh = make_mesh(-1, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [{halves(d) for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="data=1 fsdp=8 tensor=1 on 2 slices of 4, 4 devices"):
        make_mesh(1, 8, 1)
    with pytest.raises(InputError, match="2 slices of 4, 3 devices"):
        make_mesh(-1, 1, 1, jax.devices()[:7])


def test_weights_may_be_split_over_machines_with_gpus(monkeypatch):
    monkeypatch.setattr(slices, "slice_of", lambda device: device.id % 2)
    monkeypatch.setattr(sharding, "may_cross", lambda device: True)
    order = [device.id for device in make_mesh(1, 8, 1).devices.flat]
    assert order == [0, 2, 4, 6, 1, 3, 5, 7]  # those of a machine stay together
    assert [device.id for device in make_mesh(2, 2, 2).devices[1].flat] == [1, 3, 5, 7]
    assert make_mesh(-1, 1, 1, jax.devices()[:7]).shape["data"] == 7


def trained(steps=3, **settings):
    """Losses and the last state, on the host."""
    here, mesh, *_ = settled(experiment(**settings))
    program = make_program(here, mesh)
    state = jax.jit(program.init, out_shardings=program.shardings)(jax.random.key(0))
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    rng, losses = np.random.default_rng(0), []
    for step in range(steps):
        batch = {
            "x": rng.normal(size=(32, 8, 8, 1)).astype(np.float32),
            "label": rng.integers(0, 10, 32).astype(np.int32),
        }
        batch = spread(batch, batch_sharding(mesh))
        state, metrics = program.step(step)(state, batch, key, {})
        losses.append(float(metrics["loss"]))
    return losses, state


@functools.cache
def reference():
    return trained(data=8)[0]


LAYOUTS = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "two replicas of four": dict(data=2, fsdp=4),
    "four replicas of two": dict(data=4, fsdp=2),
    "tensor": dict(data=2, fsdp=2, tensor=2),
    "whole": dict(data=1, fsdp=8, zero=2),
    "two replicas, whole": dict(data=2, fsdp=4, zero=2),
    "tensor, whole": dict(data=2, fsdp=2, tensor=2, zero=2),
    "whole, two microbatches": dict(data=2, fsdp=2, tensor=2, zero=2, accumulate=2),
    "two slices, whole": dict(fsdp=4, zero=2),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_the_same(name, monkeypatch):
    if "slices" in name:
        monkeypatch.setattr(slices, "slice_of", halves)
    losses, state = trained(**LAYOUTS[name])
    np.testing.assert_allclose(losses, reference(), rtol=1e-6)
    split = LAYOUTS[name].get("fsdp", 1) * LAYOUTS[name].get("tensor", 1)
    for tree in (state["params"], state["ema"], state["opt_state"][0].mu):
        kernel = tree["blocks"]["fc1"]["kernel"]
        assert kernel.dtype == "float32"
        assert kernel.addressable_shards[0].data.size * split == kernel.size


@pytest.mark.long
def test_bfloat16_gathers_half_the_bytes_and_learns_the_same():
    losses, _ = trained(data=2, fsdp=4, zero=2, dtype="bfloat16")
    np.testing.assert_allclose(losses, trained(data=2, fsdp=4, dtype="bfloat16")[0], rtol=1e-3)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("zero", [2, 3])
def test_replicas_of_fsdp_groups_reduce_within_and_then_across(zero):
    """Gradients: scattered in a group, and the shards summed over replicas (HSDP)."""
    config = configured(data=4, fsdp=4, zero=zero, dtype="bfloat16")
    config.model.update(width=512, depth=4, heads=8)
    config.data.batch_size = 64
    report = dry_run.dry_run(config, Target.parse("tpu:v5e:4x4"), sampler=False)
    network, blocks = report.programs[0].network, 4 * 2 * (4 + 2 * 4 + 6) * 512**2  # bytes

    def sent(kind, axis):
        """By groups that lie along one axis of data x fsdp."""
        found = [c for c in network if c.kind == kind and len(c.group) == 4]
        where = [np.unravel_index(c.group, (4, 4)) for c in found]
        return sum(c.sent for c, at in zip(found, where) if len({*at[1 - axis].tolist()}) == 1)

    gathers = {2: 1, 3: 2}[zero]
    assert sent("all-gather", 1) == pytest.approx(gathers * blocks * 3 / 4, rel=0.06)
    assert sent("all-gather", 0) == sent("reduce-scatter", 0) == 0
    scattered = sent("reduce-scatter", 1)
    assert scattered > 0.7 * blocks * 3 / 4  # small weights are not worth it to the compiler
    # There and back, of the quarter that is left of each.
    assert sent("all-reduce", 0) == pytest.approx(scattered * 4 / 3 * 2 * 3 / 4 / 4, rel=0.1)
