"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.autoencoders.encode import Encoder
from ppflow_jax.checkpoints.run import Checkpoints, latest_card
from ppflow_jax.console import progress, say
from ppflow_jax.data.classes import describe
from ppflow_jax.data.pipeline import Source, Stream
from ppflow_jax.data.save import save_grid
from ppflow_jax.devices.memory import device_memory
from ppflow_jax.devices.sharding import (
    batch_sharding,
    data_shards,
    fetch,
    local_rows,
    replicated,
    spread,
    to_global,
)
from ppflow_jax.devices.stop import StopRequest
from ppflow_jax.errors import Stopped, stream_seed
from ppflow_jax.files.disk import locked, writable_directory
from ppflow_jax.files.store import FOLDER
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.network import Params
from ppflow_jax.train.begin import first_state, open_frozen, tried_store
from ppflow_jax.train.ema import reminder
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import with_base
from ppflow_jax.train.inputs import Batch, make_inputs, open_inputs, shown_to
from ppflow_jax.train.mesh import settled
from ppflow_jax.train.metrics_log import MetricWriter, read_metrics, save_loss_plot
from ppflow_jax.train.optimizer import learning_rate
from ppflow_jax.train.posthoc import Snapshots
from ppflow_jax.train.program import Program, make_program
from ppflow_jax.train.resume import going_on, record
from ppflow_jax.train.skip import SKIPPED, Watch
from ppflow_jax.train.state import TrainState, whole
from ppflow_jax.train.trackers import check_place, open_trackers
from ppflow_jax.train.validate import make_judge


def train(config: ConfigDict, workdir: str) -> None:
    """Train `config` in `workdir`, continuing from its latest checkpoint.

    What the run starts from, first match: the latest checkpoint of the workdir;
    `config.init_from` (weights only); fresh parameters. A run that is beyond `config.train.steps`
    is left as it is.

    Raises:
      InputError: bad configuration, data or checkpoint; other settings than those of the run in
        `workdir` (see resume.py); another run is in `workdir`.
      RunError: the loss is not finite, or a checkpoint cannot be written.
      Stopped: SIGTERM or Ctrl-C came; the step is finished and saved.
    """
    root = tried_store(workdir)
    experiment = Experiment.from_config(config)
    check_place(config.train.trackers, workdir)
    experiment, mesh, memory, chosen = settled(experiment, memory=device_memory())
    if chosen:
        _say(chosen)
    program = make_program(experiment, mesh, memory)
    source, encoder, card = open_inputs(config.data, experiment.card)
    experiment = replace(experiment, card=card)
    if jax.process_index() == 0:
        for line in describe(source, experiment.card.model.num_classes):
            print(line, flush=True)

    root = root or writable_directory(workdir)
    lock = locked(root) if jax.process_index() == 0 else contextlib.nullcontext()
    with lock, StopRequest() as stop:
        if (latest := latest_card(root)) is not None:
            step, stored = latest
            if step > config.train.steps:
                _say(f"the run is at step {step}, train.steps={config.train.steps}: nothing to do")
                return
            experiment = going_on(experiment, step, stored, root / FOLDER / str(step))
            program = make_program(experiment, mesh, memory)
        elif "base" in program.frozen:
            experiment = with_base(experiment)
        _run(experiment, program, mesh, source, encoder, root, stop)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _run(
    experiment: Experiment,
    program: Program,
    mesh: Mesh,
    source: Source,
    encoder: Encoder | None,
    root: Path,
    stop: StopRequest,
) -> None:
    config = experiment.config
    batch_size, steps = config.data.batch_size, config.train.steps
    checkpoints = Checkpoints(root, experiment.card, keep=config.train.keep)
    frozen = open_frozen(experiment, program, mesh, root)
    state = first_state(experiment, program, checkpoints, mesh)
    first = _announce(experiment, state, frozen, mesh, root)
    key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(stream_seed(config.seed, 1))
    stream = _stream(experiment, source, mesh)
    inputs, shown = _sight(experiment, stream, encoder, mesh, first)
    draw_samples = _sample_grid(experiment, program, mesh, root, shown)
    judge = make_judge(config, experiment.card, source, mesh, root, shown)
    snapshots = Snapshots(root, experiment.card, config.train.posthoc_ema, first)
    schedule = learning_rate(experiment.optim, steps)
    step, stopped = first, first < steps and stop.reached(first)
    clock, logged, pending = time.monotonic(), first, None
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(_writer(experiment, root, first)) as writer,
        contextlib.closing(progress(steps * batch_size, first * batch_size, "img", "train")) as bar,
    ):
        watch = Watch(stream, checkpoints, writer, config.train.skip_nonfinite)
        while step < steps and not stopped:
            step += 1
            state, metrics = program.step(step - 1)(state, next(inputs), key, frozen)
            due, stopped = _due(config, step), stop.reached(step) and step < steps
            # Read the step before while this one runs; wait only where it must be known.
            values = watch(*pending) if pending else {}
            pending = (step, metrics)
            if any(due) or stopped:
                values, pending = watch(*pending), None
            bar.update(batch_size)
            if due.log or due.last or stopped:
                checkpoints.check()
                speed = (step - logged) * batch_size / ((now := time.monotonic()) - clock)
                done = step - int(values.get(SKIPPED, 0))
                values |= {"lr": float(schedule(done - 1)), "images_per_s": speed}
                writer.write(step, values)
                bar.set_postfix(step=step, loss=f"{values.get('loss', np.nan):.4f}")
                clock, logged = now, step
            if due.save or due.last:
                snapshots.write(step, state, frozen)
            if due.save or due.last or stopped:
                writer.flush()
                checkpoints.save(step, state)
            if due.sample or due.last:
                writer.picture(step, draw_samples(whole(state["ema"], frozen), step))
            if due.judge:
                writer.write(step, judge(whole(state["ema"], frozen), step))
            if due.sample or due.last or due.judge:
                clock, logged = time.monotonic(), step
    _end(experiment, root, step, stopped)


def _writer(experiment: Experiment, root: Path, first: int) -> MetricWriter:
    settings = experiment.card.experiment or {}
    trackers = open_trackers(experiment.config.train.trackers, root, settings)
    return MetricWriter(root, first, trackers)


class _Due(NamedTuple):
    """What a step is followed by."""

    log: bool
    save: bool
    sample: bool
    judge: bool
    last: bool


def _due(config: ConfigDict, step: int) -> _Due:
    last, train = step == config.train.steps, config.train

    def now(every: int) -> bool:
        return every > 0 and step % every == 0

    judge = now(config.eval.every) or (last and config.eval.every > 0)
    return _Due(now(train.log_every), now(train.save_every), now(config.sample.every), judge, last)


def _stream(experiment: Experiment, source: Source, mesh: Mesh) -> Stream:
    """The part of the batches that this process reads."""
    config = experiment.config
    return Stream(
        source,
        config.data.batch_size,
        config.seed,
        experiment.card.model.num_classes,
        flip=config.data.flip,
        workers=config.data.workers,
        skip_unreadable=config.data.unreadable == "skip",
        rows=local_rows(batch_sharding(mesh), config.data.batch_size),
    )


def _sight(
    experiment: Experiment, stream: Stream, encoder: Encoder | None, mesh: Mesh, first: int
) -> tuple[Iterator[Batch], Callable[[int], Cond]]:
    """What the model sees from step `first` on, and what it is told for so many samples."""
    see = make_inputs(encoder, mesh, experiment.config.seed, experiment.task)
    shown = functools.partial(shown_to, experiment.card, stream.source, see, mesh)
    return _inputs(stream, see, mesh, first), shown


def _inputs(
    stream: Stream, see: Callable[[Batch, int], Batch], mesh: Mesh, first: int
) -> Iterator[Batch]:
    """What the model sees in every step from `first` on."""
    place = batch_sharding(mesh)
    for step, batch in enumerate(stream.batches(first, say), first):
        yield see(to_global(batch, place, stream.batch_size), step)


def _end(experiment: Experiment, root: Path, step: int, stopped: bool) -> None:
    """Plot the loss and say where the run has come to.

    Raises:
      Stopped: it is not done.
    """
    save_loss_plot(root / "loss.png", read_metrics(root / "metrics.jsonl"))
    if stopped:
        raise Stopped(
            f"stopped at step {step} of {experiment.config.train.steps}, everything saved in "
            f"{root}: the same command continues from there"
        )
    _say(f"done: step {step}; checkpoints, samples/, loss.png, metrics.jsonl in {root}")
    if line := reminder(experiment.card.experiment, step):
        _say(line)


def _announce(
    experiment: Experiment, state: TrainState, frozen: dict[str, Params], mesh: Mesh, root: Path
) -> int:
    """Record and say what runs, and return the step from which it does."""
    first = int(state["step"])
    if jax.process_index():
        return first
    config = experiment.config
    record(root, experiment.card, first)
    if first:
        origin = f"continuing from step {first}"
    else:
        origin = f"weights from {experiment.origin}" if experiment.origin else "fresh parameters"
    kept = frozen.get("base", {})
    count = parameter_overview.count_parameters
    part = f"{count(state['params']):,} of " if kept else ""
    print(
        f"{part}{count(state['params']) + count(kept):,} parameters; stages "
        f"{experiment.card.model.pyramid}; batch {config.data.batch_size}; mesh "
        f"{dict(mesh.shape)} of {jax.devices()[0].device_kind}; {origin}",
        flush=True,
    )
    return first


def _sample_grid(
    experiment: Experiment, program: Program, mesh: Mesh, root: Path, shown: Callable[[int], Cond]
):
    """Function that writes a grid of EMA samples, always of the same noise, labels, conditions."""
    model = experiment.card.model
    sampler = make_plan(experiment.card, experiment.sampler).sampler(program.apply)
    count = experiment.config.sample.count
    ids = np.arange(-(-count // data_shards(mesh)) * data_shards(mesh))
    noise, keys = image_noise(experiment.config.seed, ids, model.shape)
    inputs = (np.asarray(noise), shown(len(ids)), keys)
    decoder = Decoder.parse(experiment.config.sample.get("decode", "none"), experiment.card)
    folder = root / "samples"
    folder.mkdir(exist_ok=True)

    gather = jax.jit(program.gather) if program.gather else lambda ema: ema

    def write(ema, step: int) -> Path:
        images = fetch(sampler(gather(ema), *spread(inputs, batch_sharding(mesh))))[:count]
        path = folder / f"step_{step:07d}.png"
        if jax.process_index() == 0:
            save_grid(path, decoder.pictures(images), columns=min(10, count))
        return path

    return write
