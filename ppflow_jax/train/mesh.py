"""The mesh of a run: as configured, or chosen by what a device holds (`config.mesh.auto`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from ppflow_jax.devices.sharding import AXES, data_shards, make_mesh, tree_shardings
from ppflow_jax.devices.slices import near
from ppflow_jax.devices.zero import Whole, bytes_on_device
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import Program, make_program

SHARE = 0.8  # of a device's memory that an estimate may fill
WIDEST = 16  # over more devices the update is a small part of a step, and shards are padded


class Settled(NamedTuple):
    """An experiment whose mesh is known.

    Attributes:
      experiment: with the sizes of the mesh and `zero` as they are used in its `config.mesh`; its
        card has them as they were given.
      memory: bytes of a device; None if not known.
      reason: one line on what was chosen; empty if nothing was.
    """

    experiment: Experiment
    mesh: Mesh
    memory: float | None
    reason: str = ""


class Need(NamedTuple):
    """Bytes a device, by part: exact, but for the activations, which are estimated."""

    state: int
    gradients: int
    weights: int
    activations: int

    def __str__(self) -> str:
        parts = (f"{size / 1e9:.2g} GB of {name}" for name, size in self._asdict().items() if size)
        return ", ".join(parts)


def settled(
    experiment: Experiment,
    devices: Sequence[Any] | None = None,
    memory: float | None = None,
) -> Settled:
    """The mesh of `experiment`, over all devices or those given.

    With `config.mesh.auto` the sizes of `data` and `fsdp` and the stage of ZeRO are chosen: weights
    that are whole during a step if these fit (`zero=2`), else blocks gathered in turn (`zero=3`)
    over as few devices as fit. Where the memory is not known, all is whole on every device.

    Args:
      memory: bytes of a device.

    Raises:
      InputError: sizes that do not cover the devices, or are given beside `auto`.
    """
    config = experiment.config.copy_and_resolve_references()
    sizes = {axis: config.mesh[axis] for axis in AXES}
    expert = config.mesh.get("expert", 1)
    if not config.mesh.get("auto", False):
        return Settled(experiment, make_mesh(**sizes, expert=expert, devices=devices), memory)
    if expert != 1:
        raise InputError(
            "config.mesh.auto does not count what config.mesh.expert needs: give data, fsdp and "
            "zero beside it, without config.mesh.auto"
        )
    if (sizes["data"], sizes["fsdp"], config.mesh.zero) != (-1, 1, 3):
        raise InputError(
            "config.mesh.auto chooses data, fsdp and zero: leave these out (tensor may be given), "
            "or give them without config.mesh.auto"
        )
    mesh, stage, reason = _chosen(experiment, sizes["tensor"], devices, memory)
    config.mesh.update(dict(mesh.shape), zero=stage, auto=False)
    named = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    line = f"config.mesh.auto: {named} zero={stage}, {reason}"
    return Settled(replace(experiment, config=config), mesh, memory, line)


def _chosen(
    experiment: Experiment, tensor: int, devices: Sequence[Any] | None, memory: float | None
) -> tuple[Mesh, int, str]:
    """Mesh, stage of ZeRO, and why."""
    plain = make_mesh(-1, 1, tensor, devices=devices)
    count = plain.shape["data"]
    if count == 1:
        return plain, 3, "one device to share among" if tensor > 1 else "one device"
    if memory is None:
        return plain, 3, "all whole on every device, as the memory of a device is not known"
    program, room = make_program(experiment, plain), SHARE * memory
    close = max(near(list(plain.devices.flat)) // tensor, 1)
    widths = [f for f in range(1, count + 1) if count % f == 0]
    inside = [f for f in widths if close % f == 0]
    limit = f"of the {room / 1e9:.3g} GB that may be filled ({SHARE:.0%} of a device)"

    def meshed(fsdp: int) -> Mesh:
        return make_mesh(-1, fsdp, tensor, devices=devices)

    for fsdp in _groups(inside, count, plain.devices.flat[0].platform == "tpu") or [1]:
        mesh = meshed(fsdp)
        whole = need(experiment, program, mesh, 2)
        if fsdp > 1 and sum(whole) <= room:
            return mesh, 2, f"weights whole during a step: {whole} {limit}"
    for fsdp in [*(f for f in inside if f > 1), *(f for f in widths if f not in inside)]:
        mesh = meshed(fsdp)
        split = need(experiment, program, mesh, 3)
        if sum(split) <= room:
            why = f"weights split, {split} {limit}; whole they would need {sum(whole) / 1e9:.3g} GB"
            return mesh, 3, why
    return (
        mesh,
        3,
        (
            f"which by estimate does not fit: {split} {limit}; try a smaller batch, "
            "config.train.accumulate or config.model.remat=full"
        ),
    )


def _groups(widths: list[int], count: int, tpu: bool) -> list[int]:
    """Numbers of devices that may share what `zero=2` splits, the best first.

    On TPUs one group of all devices comes last: there XLA sums the gradients by moving parts round,
    which sends two to three times as much as in two groups (docs/scaling.md).
    """
    found = [f for f in widths if 1 < f <= WIDEST]
    parted = [f for f in found if f < count]
    if tpu and parted:
        return [parted[-1], *(f for f in found if f == count)]
    return found[-1:]


def need(experiment: Experiment, program: Program, mesh: Mesh, stage: int) -> Need:
    """What a training step of `experiment` needs on `mesh`; `program` may be that of another."""
    model, config = experiment.card.model, experiment.config
    rules, dtype = model.rules, jnp.dtype(config.model.dtype)
    kept = {"state": program.abstract, "frozen": program.frozen}
    state = bytes_on_device(kept, tree_shardings(kept, mesh, rules))
    params = program.abstract["params"]
    stored = tree_shardings(params, mesh, rules)
    gathered = Whole(mesh, rules, dtype).bytes(program.parameters)
    if stage == 3:  # one block computes while the next one comes
        gathered = 2 * gathered // model.depth
    return Need(state, bytes_on_device(params, stored), gathered, _activations(experiment, mesh))


def _activations(experiment: Experiment, mesh: Mesh) -> int:
    """Bytes a device that the backward pass keeps, roughly."""
    config, model = experiment.config, experiment.card.model
    pattern = experiment.objective.pattern
    images = config.data.batch_size / data_shards(mesh)
    images /= config.train.accumulate * len(pattern)
    itemsize, tensor = jnp.dtype(config.model.dtype).itemsize, mesh.shape["tensor"]
    return int(
        images
        * sum(_saved(model, stage, config.model.remat, itemsize, tensor) for stage in pattern)
    )


def _saved(model: ModelConfig, stage: int, remat: str, itemsize: int, tensor: int) -> float:
    """Of one image: its tokens before every block, and what the policy of remat keeps inside.

    `dots` keeps the results of products with weights: 3 D of queries, keys and values, D of each
    output, and the hidden units; `none` all that they are made from too, about thrice that.
    """
    return sum(_kept(each, stage, remat, itemsize, tensor) for each in model.stacks)


def _kept(model: ModelConfig, stage: int, remat: str, itemsize: int, tensor: int) -> float:
    """By one stack of blocks."""
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    d, hidden = model.width, model.block.ffn.hidden(model)
    products = 2 * d + (3 * d + hidden) / tensor
    inside = {"full": 0, "dots": products, "none": 3 * products}[remat]
    once = (2 * d + (3 * d + 2 * hidden) / tensor) * 3  # of the block that is computed
    return rows * cols * (model.depth * (4 * d + itemsize * inside) + itemsize * once)
