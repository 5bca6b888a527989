"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

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
from ppflow_jax.devices.sharding import (
    batch_sharding,
    data_shards,
    fetch,
    local_rows,
    make_mesh,
    replicated,
    spread,
    to_global,
)
from ppflow_jax.devices.stop import StopRequest
from ppflow_jax.errors import RunError, Stopped, stream_seed
from ppflow_jax.files.disk import locked, writable_directory
from ppflow_jax.files.store import FOLDER
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.flow.terms import Metrics
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.network import Params
from ppflow_jax.train.begin import first_state, open_frozen, tried_store
from ppflow_jax.train.ema import reminder
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import with_base
from ppflow_jax.train.inputs import Batch, make_inputs, open_inputs, shown_to
from ppflow_jax.train.metrics_log import MetricWriter, read_metrics, save_loss_plot
from ppflow_jax.train.optimizer import learning_rate
from ppflow_jax.train.program import Program, make_program
from ppflow_jax.train.resume import going_on, record
from ppflow_jax.train.state import TrainState, whole
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
    mesh = make_mesh(**config.mesh)
    program = make_program(experiment, mesh)
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
            program = make_program(experiment, mesh)
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
    config, batch_size = experiment.config, experiment.config.data.batch_size
    steps = config.train.steps
    checkpoints = Checkpoints(root, experiment.card, keep=config.train.keep)
    frozen = open_frozen(experiment, program, mesh, root)
    state = first_state(experiment, program, checkpoints, mesh)
    first = _announce(experiment, state, frozen, mesh, root)
    key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(stream_seed(config.seed, 1))
    stream = _stream(experiment, source, mesh)
    see, shown = _sight(experiment, source, encoder, mesh)
    inputs = _inputs(stream, see, mesh, first)
    draw_samples = _sample_grid(experiment, program, mesh, root, shown)
    judge = make_judge(config, experiment.card, source, mesh, root, shown)
    finite = functools.partial(_finite, stream, checkpoints)
    schedule = learning_rate(experiment.optim, steps)
    clock, logged, pending = time.monotonic(), first, None
    step, stopped, every = first, first < steps and stop.reached(first), config.train
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(MetricWriter(root, first)) as writer,
        contextlib.closing(progress(steps * batch_size, first * batch_size, "img", "train")) as bar,
    ):
        while step < steps and not stopped:
            step += 1
            state, metrics = program.step(step - 1)(state, next(inputs), key, frozen)
            stopped = stop.reached(step) and step < steps
            # Read the step before while this one runs; wait only where it must be known.
            log, save = step % every.log_every == 0, step % every.save_every == 0
            last, sample = step == steps, config.sample.every and step % config.sample.every == 0
            judged = judge is not None and (last or step % config.eval.every == 0)
            values = finite(*pending) if pending else {}
            pending = (step, metrics)
            if log or save or sample or judged or last or stopped:
                values, pending = finite(*pending), None
            bar.update(batch_size)
            if log or last or stopped:
                checkpoints.check()
                speed = (step - logged) * batch_size / ((now := time.monotonic()) - clock)
                values |= {"lr": float(schedule(step - 1)), "images_per_s": speed}
                writer.write(step, values)
                bar.set_postfix(step=step, loss=f"{values['loss']:.4f}")
                clock, logged = now, step
            if save or last or stopped:
                writer.flush()
                checkpoints.save(step, state)
            if sample or last:
                draw_samples(whole(state["ema"], frozen), step)
            if judged:
                writer.write(step, judge(whole(state["ema"], frozen), step))
            if sample or last or judged:
                clock, logged = time.monotonic(), step
    _end(experiment, root, step, stopped)


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
    experiment: Experiment, source: Source, encoder: Encoder | None, mesh: Mesh
) -> tuple[Callable[[Batch, int], Batch], Callable[[int], Cond]]:
    """What the model sees of a batch, and what it is told for so many samples."""
    see = make_inputs(encoder, mesh, experiment.config.seed, experiment.task)
    return see, functools.partial(shown_to, experiment.card, source, see, mesh)


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


def _finite(
    stream: Stream, checkpoints: Checkpoints, step: int, metrics: Metrics
) -> dict[str, float]:
    """Metrics of a step on the host.

    Raises:
      RunError: loss or gradient is not finite; nothing of that step has been saved.
    """
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
        example = stream.suspect(step - 1)
        remedy = (
            f"{example}: mend or remove it"
            if example
            else "lower config.optim.lr, set config.optim.clip=1, or use config.model.dtype=float32"
        )
        raise RunError(f"{', '.join(bad)} not finite at step {step}; {kept}: {remedy}")
    return values


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

    def write(ema, step: int) -> None:
        images = fetch(sampler(ema, *spread(inputs, batch_sharding(mesh))))[:count]
        if jax.process_index() == 0:
            pictures = decoder.pictures(images)
            save_grid(folder / f"step_{step:07d}.png", pictures, columns=min(10, count))

    return write
