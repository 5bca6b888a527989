"""Compiles a run for devices that are not there, and says what it would need."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppflow_jax.cost.causes import cause, gathered_sizes
from ppflow_jax.cost.collectives import Collective, collectives
from ppflow_jax.cost.estimate import sampler_bytes, training_bytes
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.sharding import batch_sharding, data_shards, replicated
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops, training_flops
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.conditions import LABEL
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_traffic
from ppflow_jax.systems.capacity import padding_flops
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.inputs import field_shapes
from ppflow_jax.train.mesh import settled
from ppflow_jax.train.program import Program, make_program
from ppflow_jax.train.state import whole


@dataclass
class Compiled:
    """One compiled program (all numbers of bytes are per device).

    Attributes:
      images, flops: of one run over all devices, FLOPs by formula.
      traffic: bytes to and from HBM, by formula.
      temporaries: beyond its arguments, by the compiler (of GPUs, which nothing here compiles for,
        by formula); None if it ran out of memory.
      failure: what the compiler said if it did.
    """

    name: str
    images: int
    flops: int
    traffic: float
    temporaries: int | None
    network: list[Collective] = field(default_factory=list)
    failure: str = ""


@dataclass
class Report:
    """What a run would need on `target`.

    Attributes:
      parts, whole: bytes per device and in all, by part of the state.
      gathered: see `gathered_sizes`.
      chosen: why the mesh is what it is, with `config.mesh.auto`.
    """

    target: Target
    experiment: Experiment
    mesh: Mesh
    parameters: int
    parts: dict[str, int]
    whole: dict[str, int]
    programs: list[Compiled]
    gathered: frozenset[int]
    chosen: str = ""

    @property
    def peak(self) -> int | None:
        """Bytes of the largest program: training step with state and batch, or sampler."""
        if any(p.temporaries is None for p in self.programs):
            return None
        return sum(self.parts.values()) + max(p.temporaries for p in self.programs)

    @property
    def misfit(self) -> str:
        """One line if it does not fit the chip's memory."""
        for program in self.programs:
            if program.failure:
                return f"{program.name} does not fit {self.target.name}: {program.failure}"
        chip = self.target.chip
        if chip and self.peak > chip.memory:
            return (
                f"{self.peak / 1e9:.1f} GB a device do not fit the {chip.memory / 1e9:.0f} GB of "
                f"{self.target.name}"
            )
        return ""

    def seconds(self, program: Compiled) -> dict[str, float]:
        """Least time by each published limit: peak FLOP/s, HBM and links."""
        chip, n = self.target.chip, self.mesh.size
        return {
            "compute": program.flops / n / chip.flops,
            "memory": program.traffic / chip.memory_rate,
            "links": sum(c.sent / self._rate(c) for c in program.network),
        }

    def _rate(self, c: Collective) -> float:
        """Bytes/s out of a device, by where the group lies on the slice."""
        chip, shape = self.target.chip, self.target.shape
        if chip.gpu:
            return chip.link_rate
        rate = chip.sending_rate(shape, spanned([self.mesh.devices.flat[k] for k in c.group]))
        # A move is from one place to one other
        return chip.link_rate if c.kind == "collective-permute" else rate

    def causes(self, program: Compiled) -> list[tuple[str, str, int, int, float]]:
        """(cause, kind, operations, executions, bytes sent per device)."""
        rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for c in program.network:
            row = rows[cause(c, self.mesh, self.gathered), c.kind]
            row[0] += 1
            row[1] += c.times
            row[2] += c.sent
        return [(*key, int(a), int(b), sent) for key, (a, b, sent) in sorted(rows.items())]


def spanned(devices: Sequence[Any]) -> list[int]:
    """How many places along each axis of their slice some TPU devices are in."""
    return [len(set(places)) for places in zip(*(device.coords for device in devices))]


def dry_run(config: ConfigDict, target: Target, *, sampler: bool = True) -> Report:
    """Compile the training step, and the sampler of its sample grids, for `target`.

    Raises:
      InputError: a configuration that is wrong, or does not fit the number of devices; this machine
        was measured in another dtype.
    """
    experiment = Experiment.from_config(config)
    if target.measured:
        target.measured.check_dtype(config.model.dtype)
    memory = target.chip and target.chip.memory
    experiment, mesh, _, chosen = settled(experiment, target.devices, memory)
    program = make_program(experiment, mesh, memory)
    model = experiment.card.model
    state = jax.tree.map(_placed, program.abstract, program.shardings)
    batch = _inputs(config.data.batch_size, model, mesh)
    fields = tuple(name for name in program.steps[0].fields if name not in batch)
    shapes = field_shapes(config.data, fields)
    batch |= {name: _placed(leaf, batch_sharding(mesh)) for name, leaf in shapes.items()}
    frozen = jax.tree.map(_placed, program.frozen, program.frozen_shardings)
    more = {"frozen": frozen} if frozen else {}
    sizes = {k: _bytes(v) for k, v in (program.abstract | more).items() if k != "step"}
    parts = {k: _bytes(v, on_device=True) for k, v in (state | more).items() if k != "step"}
    parts["batch"] = _bytes(batch, on_device=True)
    steps = [_train_step(experiment, program, target, mesh, (state, batch), frozen)]
    if sampler:
        ema = whole(state["ema"], frozen)
        steps.append(_sampler(experiment, program, target, mesh, ema))
    gathered = gathered_sizes(program, mesh)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.parameters))
    return Report(target, experiment, mesh, count, parts, sizes, steps, gathered, chosen)


def _placed(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _inputs(size: int, model: ModelConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    place = batch_sharding(mesh)
    told = (c for c in model.conditions if c.enters != "blocks")
    shapes = {"x": model.shape} | {c.name: c.shape(model) for c in told}
    values = {
        name: jax.ShapeDtypeStruct((size, *shape), np.float32, sharding=place)
        for name, shape in shapes.items()
    }
    return values | {LABEL: jax.ShapeDtypeStruct((size,), np.int32, sharding=place)}


def _bytes(tree: Any, *, on_device: bool = False) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if on_device else leaf.shape)
        * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _train_step(experiment, program: Program, target: Target, mesh, inputs, frozen) -> Compiled:
    state, batch = inputs
    config, model = experiment.config, experiment.card.model
    pattern, size = experiment.objective.pattern, config.data.batch_size
    passes = 4 if config.model.remat == "full" else 3
    images = {stage: pattern.count(stage) / len(pattern) * size / mesh.size for stage in pattern}
    traffic = 2 * _bytes(state, on_device=True) + passes * _traffic(experiment, program, images)
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = _compile(
        "training step",
        size,
        [program.steps[0].run.lower(state, batch, key, frozen)] if target.compiles else [],
        training_flops(model, pattern, size, experiment.objective.evaluated)
        + padding_flops(model, mesh, config, pattern),
        traffic,
    )
    if target.rough:
        stages, itemsize = len(set(pattern)), jax.numpy.dtype(config.model.dtype).itemsize
        step.network = [as_gpus_send(c, stages, itemsize) for c in step.network]
        weights = _bytes(state["params"], on_device=True)
        step.temporaries = training_bytes(config, model, weights, images)
    return step


def as_gpus_send(c: Collective, stages: int, itemsize: int) -> Collective:
    """A sum of gradients that was compiled for CPUs, as XLA compiles it for GPUs.

    Gradients of all stages are summed before they are sent, and those of the blocks are sent in the
    dtype of the products, of `itemsize` bytes; XLA on CPU does neither.
    """
    counts = Counter(c.elements)
    if c.kind != "all-reduce":
        return c
    if c.times > 1:
        c = replace(c, size=c.size * itemsize // 4)
    if stages == 1 or any(n % stages for n in counts.values()):
        return c
    elements = tuple(size for size, n in counts.items() for _ in range(n // stages))
    return replace(c, size=c.size // stages, elements=elements)


def _sampler(experiment, program: Program, target: Target, mesh: Mesh, ema) -> Compiled:
    config, model = experiment.config, experiment.card.model
    sampler = make_plan(experiment.card, experiment.sampler).sampler(program.apply)
    size = -(-config.sample.count // data_shards(mesh)) * data_shards(mesh)
    told = _inputs(size, model, mesh)
    noise = told.pop("x")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    told = told if model.conditions else told[LABEL]
    lowered = []
    if target.compiles:
        if program.gather:
            lowered.append(jax.jit(program.gather).lower(ema))
            whole = jax.eval_shape(program.gather, ema)
            ema = jax.tree.map(_placed, whole, program.gather.places(ema))
        keys = _placed(keys, batch_sharding(mesh))
        lowered += sampler.lower(ema, noise, told, keys)
    traffic = sum(
        segment.steps * _traffic(experiment, program, {stage: (1 + guided) * size / mesh.size})
        for segment in sampler.segments
        for stage, guided in zip(segment.stages, segment.guided)
    )
    flops = size * sampling_flops(model, sampler.segments)
    sampling = _compile(f"sampler of {size} images", size, lowered, flops, traffic)
    if target.rough:
        weights = _bytes(ema, on_device=True)
        sampling.temporaries = sampler_bytes(config, model, weights, size / mesh.size)
    return sampling


def _traffic(experiment: Experiment, program: Program, images: dict[int, float]) -> float:
    """Bytes through one device's HBM in one evaluation of so many images by stage, by formula."""
    model, config = experiment.card.model, experiment.config
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.parameters))
    activations = sum(count * block_traffic(model, stage) for stage, count in images.items())
    return (weights + activations) * jax.numpy.dtype(config.model.dtype).itemsize


def _compile(name: str, images: int, lowered: list[Any], flops: int, traffic: float) -> Compiled:
    """One `Compiled` of programs that run one after another."""
    temporaries, network = 0, []
    for program in lowered:
        try:
            executable = program.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            said = re.search(r"total memory required[^.]*\.\d+\w\)[^.]*\.\d+\w\)", str(e))
            reason = said[0] if said else str(e).splitlines()[0][:200]
            return Compiled(name, images, flops, traffic, None, failure=reason)
        memory = executable.memory_analysis()
        needed = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = max(temporaries, needed)
        network += collectives(_text(executable))
    return Compiled(name, images, flops, traffic, temporaries, network)


def _text(executable: Any) -> str:
    try:
        return executable.as_text()
    except jax.errors.JaxRuntimeError as e:  # of a compiler that jax loaded, of another version
        raise InputError(
            f"jax {jax.__version__} cannot read what this compiler writes: for a TPU, install the "
            "libtpu of this jax, pip install 'jax[tpu]'"
        ) from e
