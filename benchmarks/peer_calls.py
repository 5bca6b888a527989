"""The calls that `peer_torch` times: ours, and those of `torch_model` with the same weights."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import PartitionSpec as P

from benchmarks.torch_model import TorchPPFlow
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
    _serve(works, pipe, ways, (device, version))


def serve_theirs(works: list[Work], pipe: Connection) -> None:
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(works[0].threads)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any, as JAX's default
    torch._dynamo.config.recompile_limit = 64  # one program a stage
    kind = torch.cuda.get_device_name() if _device() == "cuda" else f"{works[0].threads} threads"

    def ways(work: Work) -> dict[str, Call]:
        return _their_steps(work) if work.stage is None else _their_forwards(work)

    _serve(works, pipe, ways, (_device(), f"torch {torch.__version__} on {kind}"))


def _serve(
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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tensors(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Images NCHW and labels."""
    x, y = work.images()
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    return x.to(_device()), torch.from_numpy(y).long().to(_device())


def _cast(work: Work):
    enabled = work.dtype == "bfloat16"
    return torch.autocast(_device(), dtype=torch.bfloat16, enabled=enabled)


def _their_forwards(work: Work) -> dict[str, Call]:
    network = TorchPPFlow(work.model).fill(work.params()).to(_device()).eval()
    x, y = _tensors(work)
    t = torch.full((len(x),), 0.3, device=_device())

    def way(network) -> Call:
        def call():
            with torch.no_grad(), _cast(work):
                out = network(x, t, y, work.stage)
            return np.moveaxis(out.float().cpu().numpy(), 1, -1)

        return call

    ways = {"eager": way(network)} if work.takes("eager") else {}
    if work.compiled and work.takes("compiled"):
        ways["compiled"] = way(torch.compile(network, fullgraph=True, dynamic=False))
    return ways


def _their_steps(work: Work) -> dict[str, Call]:
    return {
        way: _their_step(work, packed, compiled)
        for packed in ((False, True) if len(work.model.pyramid) > 1 else (False,))
        for compiled in ((False, True) if work.compiled else (False,))
        if work.takes(way := f"{'packed, ' * packed}{'compiled' if compiled else 'eager'}")
    }


def _their_step(work: Work, packed: bool, compiled: bool) -> Call:
    (x, y), model, objective = _tensors(work), work.model, work.objective
    network = TorchPPFlow(model).fill(work.params()).to(_device()).train()
    weights = list(network.parameters())
    ema = [p.detach().clone() for p in copy.deepcopy(weights)]
    tx = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    pattern = np.array(objective.pattern)
    repeats = len(x) // len(pattern)
    rows = [
        torch.from_numpy(np.flatnonzero(np.tile(pattern, repeats) == stage)).to(x.device)
        for stage in range(len(model.pyramid))
    ]
    ranges = np.tile(np.float32(objective.time_ranges)[pattern], (repeats, 1))
    lo, hi = torch.from_numpy(ranges).to(x.device).T
    durations = [b - a for a, b in model.pyramid.intervals]

    def loss(noise, t, label):
        when = t.view(-1, 1, 1, 1)
        xt, target = (1 - when) * noise + when * x, x - noise
        parts = [[v[r] for r in rows] for v in (xt, t, label)]
        if packed:
            out = network.packed(*parts)
        else:
            out = [network(*each, stage) for stage, each in enumerate(zip(*parts))]
        errors = [(a.float() - target[r]).square().mean() for a, r in zip(out, rows)]
        return sum(d * error for d, error in zip(durations, errors))

    run = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss

    def call():
        noise, t = torch.randn_like(x), lo + (hi - lo) * torch.rand_like(lo)
        dropped = torch.rand_like(lo) < LABEL_DROP
        label = torch.where(dropped, torch.full_like(y, model.null_label), y)
        with _cast(work):
            value = run(noise, t, label)
        tx.zero_grad(set_to_none=True)
        value.backward()
        tx.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, weights, 1 - EMA)
            return value.cpu().numpy()

    return call
