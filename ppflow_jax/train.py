"""The training loop."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppflow_jax.checkpoint import Card, Checkpoints, find_checkpoint, load_weights, read_card
from ppflow_jax.data.pipeline import batches
from ppflow_jax.data.sources import open_source
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files import atomic, writable_directory
from ppflow_jax.flow.loss import Objective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.judge import make_judge
from ppflow_jax.models.ppflow import ModelConfig, make_apply
from ppflow_jax.optim import OptimConfig, learning_rate, make_optimizer
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.sharding import (
    batch_sharding,
    data_shards,
    make_mesh,
    replicated,
    to_global,
    tree_shardings,
)
from ppflow_jax.state import init_state, state_from
from ppflow_jax.train_step import make_train_step
from ppflow_jax.writers import (
    MetricWriter,
    progress,
    read_metrics,
    save_grid,
    save_loss_plot,
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
            **{k: c[k] for k in c if k not in ("pyramid", "dtype", "remat")},
        )
        flow = Flow(config.flow.path, config.flow.prediction)
        objective = Objective(
            pyramid=model.pyramid,
            flow=flow,
            null_label=model.null_label,
            weighting=config.flow.weighting,
            label_drop=config.flow.label_drop,
            stage_share=tuple(config.flow.stage_share),
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
        card = Card(model, flow, config.data.space, json.loads(config.to_json_best_effort()))
        return cls(card, objective, OptimConfig(**config.optim), sampler, config)


def train(config: ConfigDict, workdir: str) -> None:
    """Train `config` in `workdir`, going on from its latest checkpoint.

    What the run starts from, first match: the latest checkpoint of the workdir;
    `config.init_from` (weights only); fresh parameters.

    Raises:
      InputError: bad configuration, data or checkpoint.
      RunError: the loss is not finite.
    """
    experiment = Experiment.from_config(config)
    card, model = experiment.card, experiment.card.model
    apply = make_apply(model, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
    mesh = make_mesh(**config.mesh)
    batch_size, steps = config.data.batch_size, config.train.steps
    experiment.objective.check_batch(batch_size, data_shards(mesh) * config.train.accumulate)
    source = open_source(config.data.source, config.data.path)
    source.check_fits(model.shape, model.num_classes)

    root = writable_directory(workdir)
    checkpoints = Checkpoints(root, card, keep=config.train.keep)
    tx = make_optimizer(experiment.optim, steps)
    state, shardings = _first_state(experiment, tx, checkpoints, mesh)
    first = int(state["step"])
    _announce(experiment, state, mesh, first, root)

    step_fn = jax.jit(
        make_train_step(
            experiment.objective,
            apply,
            tx,
            ema=config.train.ema,
            accumulate=config.train.accumulate,
        ),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    key = jax.device_put(jax.random.key(config.seed + 1), replicated(mesh))
    stream = batches(
        source,
        batch_size=batch_size,
        seed=config.seed,
        first_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    sampler = Sampler(apply, model, card.flow, experiment.sampler)
    draw_samples = _sample_grid(experiment, sampler, root)
    judge = make_judge(config, card, sampler, source, mesh, root)
    schedule = learning_rate(experiment.optim, steps)
    writer = MetricWriter(root, first)
    bar = progress(steps * batch_size, first * batch_size, "img", "train")
    clock, logged = time.monotonic(), first
    pending: tuple[int, dict[str, jax.Array]] | None = None
    try:
        for step in range(first + 1, steps + 1):
            state, metrics = step_fn(state, to_global(next(stream), batch_sharding(mesh)), key)
            # Read the step before while this one runs; wait only where it must be known.
            log, save = step % config.train.log_every == 0, step % config.train.save_every == 0
            sample = config.sample.every and step % config.sample.every == 0
            last = step == steps
            judged = judge is not None and (last or step % config.eval.every == 0)
            values = _finite(pending, checkpoints) if pending else {}
            pending = (step, metrics)
            if log or save or sample or judged or last:
                values, pending = _finite(pending, checkpoints), None
            bar.update(batch_size)
            if log or last:
                now = time.monotonic()
                values |= {
                    "lr": float(schedule(step - 1)),
                    "images_per_s": (step - logged) * batch_size / (now - clock),
                }
                writer.write(step, values)
                bar.set_postfix(step=step, loss=f"{values['loss']:.4f}")
                clock, logged = now, step
            if save or last:
                checkpoints.save(step, state)
            if sample or last:
                draw_samples(state["ema"], step)
                clock, logged = time.monotonic(), step
            if judged:
                writer.write(step, judge(state["ema"], step))
                clock, logged = time.monotonic(), step
    finally:
        bar.close()
        writer.close()
        checkpoints.close()
    save_loss_plot(root / "loss.png", read_metrics(root / "metrics.jsonl"))
    if jax.process_index() == 0:
        print(f"done: step {steps}; checkpoints, samples/, loss.png, metrics.jsonl in {root}")


def _first_state(
    experiment: Experiment, tx: optax.GradientTransformation, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[Any, Any]:
    """State to go on from, made or restored straight into its shardings."""
    model, config = experiment.card.model, experiment.config
    key = jax.random.key(config.seed)

    def init(key):
        return init_state(model, tx, key)

    abstract = jax.eval_shape(init, key)
    shardings = tree_shardings(abstract, mesh)
    if (latest := checkpoints.latest()) is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        )
        return checkpoints.restore(latest, target), shardings
    if config.init_from:
        path = find_checkpoint(config.init_from)
        found = read_card(path)
        if difference := found.differences(experiment.card):
            raise InputError(
                f"config.init_from={path} holds another model ({difference}): use a "
                "configuration of the same model"
            )
        params = load_weights(path, found, mesh)
        state = jax.jit(lambda p: state_from(p, tx), out_shardings=shardings)(params)
        return state, shardings
    return jax.jit(init, out_shardings=shardings)(key), shardings


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


def _sample_grid(experiment: Experiment, sampler: Sampler, root: Path):
    """Function that writes a grid of EMA samples, always of the same noise and labels."""
    model = experiment.card.model
    count = experiment.config.sample.count
    labels = jnp.arange(count, dtype=jnp.int32) % model.num_classes
    noise, keys = image_noise(experiment.config.seed, np.arange(count), model.shape)
    folder = root / "samples"
    folder.mkdir(exist_ok=True)

    def write(ema, step: int) -> None:
        images = np.asarray(sampler(ema, noise, labels, keys))
        if jax.process_index() == 0:
            pictures = to_uint8(images, experiment.card.space)
            save_grid(folder / f"step_{step:07d}.png", pictures, columns=min(10, count))

    return write
