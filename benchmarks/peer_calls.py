"""What `peer_torch` times, and our calls; this process does not load PyTorch and its CUDA."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.devices.programs import for_training
from ppflow_jax.devices.sharding import batch_sharding, make_mesh, replicated
from ppflow_jax.flow.cost import training_flops
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import Params, abstract_params, make_apply, unstacked
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import state_from
from ppflow_jax.train.step import compiled, make_train_step

EMA, LABEL_DROP = 0.9999, 0.1

Call = Callable[[], np.ndarray]  # waits for its result and returns it


@dataclass(frozen=True)
class Work:
    """A piece of work that both do: a forward pass, or a training step where `stage` is None.

    `threads` are PyTorch's, `remat` is ours, and with `compiled` PyTorch's calls are also compiled.
    Of its ways only those in `only` are prepared, or all.
    """

    name: str
    model: ModelConfig
    stage: int | None
    batch: int
    dtype: str
    threads: int
    remat: str
    compiled: bool
    only: tuple[str, ...] = ()

    def takes(self, way: str) -> bool:
        return not self.only or way in self.only

    def flops(self) -> int:
        if self.stage is None:
            return training_flops(self.model, self.objective.pattern, self.batch)
        return self.batch * forward_flops(self.model, self.stage)

    @property
    def objective(self) -> FlowObjective:
        return FlowObjective(
            self.model.pyramid, Flow(), self.model.null_label, label_drop=LABEL_DROP
        )

    def params(self) -> Params:
        """Normal weights, so that every part of the network shows in the output."""
        random = np.random.default_rng(0)
        shapes = abstract_params(self.model)
        return jax.tree.map(lambda s: 0.02 * random.standard_normal(s.shape, np.float32), shapes)

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Latents and labels."""
        x = np.random.default_rng(1).standard_normal((self.batch, *self.model.shape), np.float32)
        return x, np.arange(self.batch, dtype=np.int32)


def serve_ours(works: list[Work], pipe: Connection) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some, too
    keep_scratch()

    def ways(work: Work) -> dict[str, Call]:
        return {"jax": _our_step(work) if work.stage is None else _our_forward(work)}

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    version = f"JAX {jax.__version__} on {jax.devices()[0].device_kind}"
    serve(works, pipe, ways, (device, version))


def serve(
    works: list[Work],
    pipe: Connection,
    ways: Callable[[Work], dict[str, Call]],
    version: tuple[str, str],
) -> None:
    """Answers (): kind of device and version; (number of a work): its ways; (number, way):
    wall-clock and processor seconds of a call, and its result. None ends it."""
    prepared: dict[int, dict[str, Call]] = {}
    while (request := pipe.recv()) is not None:
        match request:
            case ():
                pipe.send(version)
            case (number,):
                prepared[number] = ways(works[number])
                pipe.send(list(prepared[number]))
            case number, way:
                start, processor = time.perf_counter(), time.process_time()
                result = prepared[number][way]()
                seconds = time.perf_counter() - start, time.process_time() - processor
                pipe.send((*seconds, result))


def _our_forward(work: Work) -> Call:
    """On the devices of a CPU (`JAX_NUM_CPU_DEVICES`) each takes a part of the batch, as in
    `generate`; of GPUs one takes it all, as PyTorch's."""
    on_cpu = jax.default_backend() == "cpu"
    mesh = make_mesh(devices=jax.devices() if on_cpu else jax.devices()[:1])
    if work.batch % mesh.size:
        raise SystemExit(f"{mesh.size} CPU devices cannot share {work.batch} images: see --batch")
    rows = batch_sharding(mesh)
    params = jax.device_put(work.params(), replicated(mesh))
    # The way that suits training; `sample` scans.
    params = jax.jit(unstacked)(params) if for_training().unrolled else params
    apply = make_apply(work.model, dtype=jnp.dtype(work.dtype))
    call = jax.jit(
        jax.shard_map(
            lambda params, x, t, y: apply(params, x, t, y, work.stage),
            mesh=mesh,
            in_specs=(P(), rows.spec, rows.spec, rows.spec),
            out_specs=rows.spec,
            check_vma=False,
        )
    )
    x, y = work.images()
    x, t, y = jax.device_put((x, np.full(len(x), 0.3, np.float32), y), rows)
    return lambda: np.asarray(call(params, x, t, y))


def _our_step(work: Work) -> Call:
    tx = make_optimizer(OptimConfig(), 1)
    dtype = jnp.dtype(work.dtype)
    programs = for_training("auto", dtype, remat=work.remat, head=work.model.head_width)
    apply = make_apply(work.model, dtype=dtype, remat=work.remat, programs=programs)
    step = compiled(make_train_step(work.objective, apply, tx, ema=EMA), programs)
    state = state_from(jax.tree.map(jnp.asarray, work.params()), tx)
    (x, y), key = map(jnp.asarray, work.images()), jax.random.key(0)

    def call():
        nonlocal state
        state, metrics = step(state, {"x": x, "label": y}, key)
        return np.asarray(jax.block_until_ready((state, metrics))[1]["loss"])

    return call
