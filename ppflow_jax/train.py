"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppflow_jax.checkpoint import Card, find_checkpoint, load_weights, read_card
from ppflow_jax.data.classes import describe
from ppflow_jax.data.pipeline import Source, batches
from ppflow_jax.encode import Encoder
from ppflow_jax.errors import InputError, RunError, Stopped
from ppflow_jax.files import atomic, locked, writable_directory
from ppflow_jax.flow.loss import Objective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.inputs import make_inputs, open_inputs
from ppflow_jax.judge import make_judge
from ppflow_jax.models.ppflow import Apply, ModelConfig, make_apply
from ppflow_jax.optim import OptimConfig, learning_rate, make_optimizer
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.run_checkpoints import Checkpoints
from ppflow_jax.sharding import (
    batch_sharding,
    data_shards,
    fetch,
    layout,
    local_rows,
    make_mesh,
    replicated,
    spread,
    to_global,
    tree_shardings,
)
from ppflow_jax.state import TrainState, init_state, state_from
from ppflow_jax.stop import StopRequest
from ppflow_jax.train_step import Metrics, compiled, make_train_step
from ppflow_jax.writers import (
    MetricWriter,
    progress,
    read_metrics,
    save_grid,
    save_loss_plot,
    say,
    to_uint8,
)


@dataclass(frozen=True)
class Experiment:
    """A configuration, checked and turned into the parts of a run; nothing is allocated.

    Raises (in `from_config`):
      InputError: any value out of range or parts that do not fit together.
    """

    card: Card
    objective: Objective
    optim: OptimConfig
    sampler: SamplerConfig
    config: ConfigDict

    @classmethod
    def from_config(cls, config: ConfigDict) -> Experiment:
        c = config.model
        model = ModelConfig(
            pyramid=Pyramid.parse(c.pyramid),
            **{k: c[k] for k in c if k not in ("pyramid", "dtype", "remat", "attention")},
        )
        flow = Flow(config.flow.path, config.flow.prediction)
        objective = Objective(
            pyramid=model.pyramid,
            flow=flow,
            null_label=model.null_label,
            weighting=config.flow.weighting,
            label_drop=config.flow.label_drop,
            stage_share=tuple(config.flow.stage_share),
            stage_times=tuple(tuple(map(float, pair)) for pair in config.flow.stage_times),
        )
        s = config.sample
        sampler = SamplerConfig(s.solver, s.steps, cfg=tuple(s.cfg))
        sampler.scales(model.pyramid)
        t = config.train
        if t.accumulate < 1 or min(t.steps, t.log_every, t.save_every, t.keep) < 1:
            raise InputError("config.train: steps, *_every, keep and accumulate must be at least 1")
        if not 0 <= t.ema < 1:
            raise InputError(f"config.train.ema must be in [0, 1), got {t.ema}")
        if c.dtype not in ("float32", "bfloat16"):
            raise InputError(f"unknown dtype {c.dtype!r}: float32 or bfloat16")
        if config.data.space not in ("latents", "pixels"):
            raise InputError(f"unknown space {config.data.space!r}: latents or pixels")
        if config.data.unreadable not in ("error", "skip") or config.data.workers < 0:
            raise InputError("config.data: unreadable is error or skip, workers at least 0")
        card = Card(model, flow, config.data.space, json.loads(config.to_json_best_effort()))
        return cls(card, objective, OptimConfig(**config.optim), sampler, config)


class Program(NamedTuple):
    """What runs on a mesh; `abstract` and `shardings` are trees of the training state."""

    apply: Apply
    optimizer: optax.GradientTransformation
    init: Callable[[jax.Array], TrainState]
    abstract: TrainState
    shardings: TrainState
    step: Callable[..., tuple[TrainState, Metrics]]


def _unrolled(mesh: Mesh) -> bool:
    """One CPU is faster so; several stand in for accelerators, and run their program."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def make_program(experiment: Experiment, mesh: Mesh) -> Program:
    """Network, optimizer and jitted training step of `experiment` on `mesh`; allocates nothing.

    Raises:
      InputError: the batch cannot be divided among the devices.
    """
    config, model = experiment.config, experiment.card.model
    shards = data_shards(mesh) * config.train.accumulate
    experiment.objective.check_batch(config.data.batch_size, shards)
    unrolled = _unrolled(mesh) and config.model.remat == "none"
    apply = make_apply(
        model,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        layout=layout(mesh),
        unrolled=unrolled,
    )
    optimizer = make_optimizer(experiment.optim, config.train.steps)
    init = functools.partial(init_state, model, optimizer)
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = tree_shardings(abstract, mesh)
    step = compiled(
        make_train_step(
            experiment.objective,
            apply,
            optimizer,
            ema=config.train.ema,
            accumulate=config.train.accumulate,
        ),
        unrolled=unrolled,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    return Program(apply, optimizer, init, abstract, shardings, step)


def train(config: ConfigDict, workdir: str) -> None:
    """Train `config` in `workdir`, going on from its latest checkpoint.

    What the run starts from, first match: the latest checkpoint of the workdir;
    `config.init_from` (weights only); fresh parameters.

    Raises:
      InputError: bad configuration, data or checkpoint; another run is in `workdir`.
      RunError: the loss is not finite, or a checkpoint cannot be written.
      Stopped: SIGTERM or Ctrl-C came; the step is finished and saved.
    """
    experiment = Experiment.from_config(config)
    mesh = make_mesh(**config.mesh)
    program = make_program(experiment, mesh)
    source, encoder, card = open_inputs(config.data, experiment.card)
    experiment = replace(experiment, card=card)
    if jax.process_index() == 0:
        for line in describe(source, experiment.card.model.num_classes):
            print(line, flush=True)

    root = writable_directory(workdir)
    lock = locked(root) if jax.process_index() == 0 else contextlib.nullcontext()
    with lock, StopRequest() as stop:
        _run(experiment, program, mesh, source, encoder, root, stop)


def _run(
    experiment: Experiment,
    program: Program,
    mesh: Mesh,
    source: Source,
    encoder: Encoder | None,
    root: Path,
    stop: StopRequest,
) -> None:
    config, card, model = experiment.config, experiment.card, experiment.card.model
    batch_size, steps, place = config.data.batch_size, config.train.steps, batch_sharding(mesh)
    checkpoints = Checkpoints(root, card, keep=config.train.keep)
    state = _first_state(experiment, program, checkpoints, mesh)
    first = int(state["step"])
    _announce(experiment, state, mesh, first, root)

    key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(config.seed + 1)
    stream = batches(
        source,
        batch_size=batch_size,
        seed=config.seed,
        first_step=first,
        num_classes=model.num_classes,
        flip=config.data.flip,
        workers=config.data.workers,
        skip_unreadable=config.data.unreadable == "skip",
        report=say,
        rows=local_rows(place, batch_size),
    )
    inputs = make_inputs(encoder, mesh, config.seed)
    sampler = Sampler(program.apply, model, card.flow, experiment.sampler)
    draw_samples = _sample_grid(experiment, sampler, mesh, root)
    judge = make_judge(config, card, sampler, source, mesh, root)
    schedule = learning_rate(experiment.optim, steps)
    clock, logged = time.monotonic(), first
    pending: tuple[int, dict[str, jax.Array]] | None = None
    step, stopped = first, first < steps and stop.reached(first)
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(MetricWriter(root, first)) as writer,
        contextlib.closing(progress(steps * batch_size, first * batch_size, "img", "train")) as bar,
    ):
        while step < steps and not stopped:
            step += 1
            batch = inputs(to_global(next(stream), place, batch_size), step - 1)
            state, metrics = program.step(state, batch, key)
            stopped = stop.reached(step) and step < steps
            # Read the step before while this one runs; wait only where it must be known.
            log, save = step % config.train.log_every == 0, step % config.train.save_every == 0
            sample = config.sample.every and step % config.sample.every == 0
            last = step == steps
            judged = judge is not None and (last or step % config.eval.every == 0)
            values = _finite(pending, checkpoints) if pending else {}
            pending = (step, metrics)
            if log or save or sample or judged or last or stopped:
                values, pending = _finite(pending, checkpoints), None
            bar.update(batch_size)
            if log or last or stopped:
                checkpoints.check()
                now = time.monotonic()
                values |= {
                    "lr": float(schedule(step - 1)),
                    "images_per_s": (step - logged) * batch_size / (now - clock),
                }
                writer.write(step, values)
                bar.set_postfix(step=step, loss=f"{values['loss']:.4f}")
                clock, logged = now, step
            if save or last or stopped:
                checkpoints.save(step, state)
            if sample or last:
                draw_samples(state["ema"], step)
                clock, logged = time.monotonic(), step
            if judged:
                writer.write(step, judge(state["ema"], step))
                clock, logged = time.monotonic(), step
    save_loss_plot(root / "loss.png", read_metrics(root / "metrics.jsonl"))
    if stopped:
        raise Stopped(
            f"stopped at step {step} of {steps}, everything saved in {root}: the same command goes "
            "on from there"
        )
    if jax.process_index() == 0:
        print(f"done: step {steps}; checkpoints, samples/, loss.png, metrics.jsonl in {root}")


def _first_state(
    experiment: Experiment, program: Program, checkpoints: Checkpoints, mesh: Mesh
) -> TrainState:
    """State to go on from, made or restored straight into its shardings."""
    config, shardings = experiment.config, program.shardings
    if (latest := checkpoints.latest()) is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            program.abstract,
            shardings,
        )
        return checkpoints.restore(latest, target)
    if config.init_from:
        path = find_checkpoint(config.init_from)
        found = read_card(path)
        if difference := found.differences(experiment.card):
            raise InputError(
                f"config.init_from={path} holds another model ({difference}): use a "
                "configuration of the same model"
            )
        params = load_weights(path, found, mesh)
        return jax.jit(lambda p: state_from(p, program.optimizer), out_shardings=shardings)(params)
    return jax.jit(program.init, out_shardings=shardings)(jax.random.key(config.seed))


def _announce(experiment: Experiment, state: Any, mesh: Mesh, first: int, root: Path) -> None:
    if jax.process_index():
        return
    config = experiment.config
    with atomic(root / "config.json") as temporary:
        temporary.write_text(json.dumps(experiment.card.to_json(), indent=1))
    if first:
        origin = f"going on from step {first}"
    else:
        origin = f"weights from {config.init_from}" if config.init_from else "fresh parameters"
    print(
        f"{parameter_overview.count_parameters(state['params']):,} parameters; stages "
        f"{experiment.card.model.pyramid}; batch {config.data.batch_size}; mesh "
        f"{dict(mesh.shape)} of {jax.devices()[0].device_kind}; {origin}",
        flush=True,
    )


def _finite(
    pending: tuple[int, dict[str, jax.Array]], checkpoints: Checkpoints
) -> dict[str, float]:
    """Metrics of a step on the host.

    Raises:
      RunError: loss or gradient is not finite; nothing of that step has been saved.
    """
    step, metrics = pending
    values = {k: float(v) for k, v in metrics.items()}
    bad = [k for k, v in values.items() if not np.isfinite(v)]
    if bad:
        checkpoints.wait()
        latest = checkpoints.latest()
        kept = (
            "no checkpoint was saved"
            if latest is None
            else f"the checkpoint of step {latest} is good"
        )
        raise RunError(
            f"{', '.join(bad)} not finite at step {step}; {kept}: lower config.optim.lr, set "
            "config.optim.clip=1, or use config.model.dtype=float32"
        )
    return values


def _sample_grid(experiment: Experiment, sampler: Sampler, mesh: Mesh, root: Path):
    """Function that writes a grid of EMA samples, always of the same noise and labels."""
    model = experiment.card.model
    count = experiment.config.sample.count
    ids = np.arange(-(-count // data_shards(mesh)) * data_shards(mesh))
    noise, keys = image_noise(experiment.config.seed, ids, model.shape)
    inputs = (np.asarray(noise), np.int32(ids % model.num_classes), keys)
    folder = root / "samples"
    folder.mkdir(exist_ok=True)

    def write(ema, step: int) -> None:
        images = fetch(sampler(ema, *spread(inputs, batch_sharding(mesh))))[:count]
        if jax.process_index() == 0:
            pictures = to_uint8(images, experiment.card.space)
            save_grid(folder / f"step_{step:07d}.png", pictures, columns=min(10, count))

    return write
