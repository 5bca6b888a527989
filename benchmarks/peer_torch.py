"""Time of JAX over time of PyTorch on equal work, in one run on one machine. Needs torch.

    python -m benchmarks.peer_torch                           # forward of B/2, training step of S/2
    python -m benchmarks.peer_torch --forward=XL --train=XL --dtype=bfloat16 --batch=64

Forward passes of every stage of 2 and 3 levels, and training steps (draws, loss, gradients, AdamW,
EMA) of SiT and of 2 levels, of the package and of `torch_model` with the same weights. One process
calls them in turn, one call at a time, with a rest in between, because the thread pools of both
spin for a while when their work is done (OMP_WAIT_POLICY=PASSIVE keeps PyTorch's from it). The
ratio is that of the medians over all rounds, ours over the fastest of PyTorch's ways: eager or
compiled, each stage at its own token count or, in training, packed with a mask as the public code
does.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from benchmarks.torch_model import TorchPPFlow
from ppflow_jax.flops import forward_flops, training_flops
from ppflow_jax.flow.loss import Objective
from ppflow_jax.flow.path import Flow
from ppflow_jax.host_memory import keep_scratch
from ppflow_jax.models.ppflow import (
    REMAT_POLICIES,
    SIZES,
    ModelConfig,
    Params,
    abstract_params,
    make_apply,
    unstacked,
)
from ppflow_jax.optim import OptimConfig, make_optimizer
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT
from ppflow_jax.state import state_from
from ppflow_jax.train_step import make_train_step

_FORWARD = flags.DEFINE_string("forward", "B", "Size of the forward passes; empty: none.")
_TRAIN = flags.DEFINE_string("train", "S", "Size of the training steps; empty: none.")
_LATENT = flags.DEFINE_integer("latent_size", 32, "Side of the latent (4 channels).")
_BATCH = flags.DEFINE_integer("batch", 4, "Images of a forward pass.")
_TRAIN_BATCH = flags.DEFINE_integer("train_batch", 8, "Images of a training step.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Every round calls everything once.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_THREADS = flags.DEFINE_integer("threads", 2, "Of PyTorch; JAX takes the cores it is given.")
_COMPILE = flags.DEFINE_bool("compile", True, "Also torch.compile.")
_REST = flags.DEFINE_float("rest", 0.05, "Seconds between two calls.")
_REMAT = flags.DEFINE_enum("remat", "none", list(REMAT_POLICIES), "As config.model.remat; ours.")
_JSON = flags.DEFINE_string("json", "", "File for the figures.")

EMA, LABEL_DROP = 0.9999, 0.1


@dataclass
class Case:
    """One piece of work: our call and PyTorch's, each of which waits for its result."""

    name: str
    flops: int
    ways: dict[str, Callable[[], object]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)  # of all threads

    def time(self, way: str) -> None:
        start, processor = time.perf_counter(), time.process_time()
        self.ways[way]()
        self.seconds.setdefault(way, []).append(time.perf_counter() - start)
        self.processor.setdefault(way, []).append(time.process_time() - processor)

    def medians(self) -> dict[str, float]:
        return {way: statistics.median(s) for way, s in self.seconds.items()}

    def best(self) -> str:
        """The fastest of PyTorch's ways."""
        medians = self.medians()
        return min((way for way in medians if way != "jax"), key=medians.get)

    def ratio(self) -> float:
        medians = self.medians()
        return medians["jax"] / medians[self.best()]


def main(_) -> None:
    keep_scratch()
    torch.set_num_threads(_THREADS.value)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any, as JAX's default
    torch._dynamo.config.recompile_limit = 64  # one program a stage
    cases = []
    if _FORWARD.value:
        for name, pyramid in {"2 levels": PPFLOW2, "3 levels": PPFLOW3}.items():
            cases += _forwards(f"{_FORWARD.value} {name}", _model(_FORWARD.value, pyramid))
    if _TRAIN.value:
        for name, pyramid in {"SiT": SIT, "2 levels": PPFLOW2}.items():
            cases.append(_train(f"{_TRAIN.value} {name}", _model(_TRAIN.value, pyramid)))
    for _ in range(_ROUNDS.value):
        for case in cases:
            for way in case.ways:
                time.sleep(_REST.value)
                case.time(way)
    _report(cases)


def _model(size: str, pyramid) -> ModelConfig:
    return ModelConfig(pyramid, _LATENT.value, 4, **SIZES[size], num_classes=1000)


def _params(model: ModelConfig) -> Params:
    """Normal weights, so that every part of the network shows in the output."""
    leaves, tree = jax.tree.flatten(abstract_params(model))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([0.02 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves)])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def _tensor(x) -> torch.Tensor:
    """NHWC or one axis -> NCHW or one axis."""
    x = np.array(x)
    x = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x
    x = torch.from_numpy(x).to(_device())
    return x.long() if not x.is_floating_point() else x


def _finished(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    out = work()
    if _device() == "cuda":
        torch.cuda.synchronize()
    return out


def _cast():
    enabled = _DTYPE.value == "bfloat16"
    return torch.autocast(_device(), dtype=torch.bfloat16, enabled=enabled)


def _agree(name: str, ours, theirs: torch.Tensor) -> None:
    theirs = np.moveaxis(theirs.detach().float().cpu().numpy(), 1, -1)
    error = np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)
    print(f"{name}: relative difference of the two {error:.1e}", flush=True)
    if not error < (1e-4 if _DTYPE.value == "float32" else 5e-2):
        raise SystemExit(f"{name}: the two do not compute the same")


def _forwards(name: str, model: ModelConfig) -> list[Case]:
    params = _params(model)
    prepared = jax.jit(unstacked)(params) if jax.default_backend() == "cpu" else params
    apply = jax.jit(make_apply(model, dtype=jnp.dtype(_DTYPE.value)), static_argnums=4)
    network = TorchPPFlow(model).fill(params).to(_device()).eval()
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    x = jax.random.normal(jax.random.key(1), (_BATCH.value, *model.shape))
    t, y = jnp.full(len(x), 0.3), jnp.arange(len(x), dtype=jnp.int32)
    inputs = _tensor(x), _tensor(t), _tensor(y)

    def way(network, stage):
        def call():
            with torch.no_grad(), _cast():
                return network(*inputs, stage)

        return lambda: _finished(call)

    cases = []
    for stage in range(len(model.pyramid)):
        ways = {"jax": lambda stage=stage: apply(prepared, x, t, y, stage).block_until_ready()}
        ways["eager"] = way(network, stage)
        if _COMPILE.value:
            ways["compiled"] = way(compiled, stage)
        label = f"forward {name}, stage {stage}"
        for other in list(ways)[1:]:
            _agree(f"{label} {other}", ways["jax"](), ways[other]())
        cases.append(Case(label, _BATCH.value * forward_flops(model, stage), ways))
    return cases


def _train(name: str, model: ModelConfig) -> Case:
    params, size = _params(model), _TRAIN_BATCH.value
    objective = Objective(model.pyramid, Flow(), model.null_label, label_drop=LABEL_DROP)
    x = jax.random.normal(jax.random.key(1), (size, *model.shape))
    y = jnp.arange(size, dtype=jnp.int32)
    ways = {"jax": _our_step(model, objective, params, x, y)}
    for packed in (False, True) if len(model.pyramid) > 1 else (False,):
        for compiled in (False, True) if _COMPILE.value else (False,):
            way = f"{'packed, ' * packed}{'compiled' if compiled else 'eager'}"
            ways[way] = _their_step(model, objective, params, _tensor(x), _tensor(y),
                                    packed, compiled)  # fmt: skip
    for call in ways.values():
        call()  # compiles
    losses = ", ".join(f"{way} {float(call()):.4f}" for way, call in ways.items())
    print(f"train {name}: losses {losses}", flush=True)
    return Case(f"train {name}", training_flops(model, objective.pattern, size), ways)


def _our_step(model: ModelConfig, objective: Objective, params: Params, x, y):
    tx = make_optimizer(OptimConfig(), 1)
    unrolled = jax.default_backend() == "cpu" and _REMAT.value == "none"  # as train.py does
    dtype = jnp.dtype(_DTYPE.value)
    apply = make_apply(model, dtype=dtype, remat=_REMAT.value, unrolled=unrolled)
    step = jax.jit(make_train_step(objective, apply, tx, ema=EMA), donate_argnums=0)
    state, key = state_from(jax.tree.map(jnp.copy, params), tx), jax.random.key(0)

    def call():
        nonlocal state
        state, metrics = step(state, {"x": x, "label": y}, key)
        return jax.block_until_ready((state, metrics))[1]["loss"]

    return call


def _their_step(
    model: ModelConfig, objective: Objective, params: Params, x, y, packed: bool, compiled: bool
):
    network = TorchPPFlow(model).fill(params).to(_device()).train()
    weights = list(network.parameters())
    ema = [p.detach().clone() for p in copy.deepcopy(weights)]
    tx = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    pattern = np.array(objective.pattern)
    repeats = len(x) // len(pattern)
    rows = [
        torch.from_numpy(np.flatnonzero(np.tile(pattern, repeats) == stage)).to(x.device)
        for stage in range(len(model.pyramid))
    ]
    lo, hi = _tensor(np.tile(np.float32(objective.time_ranges)[pattern], (repeats, 1))).T
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
        with _cast():
            value = run(noise, t, label)
        tx.zero_grad(set_to_none=True)
        value.backward()
        tx.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, weights, 1 - EMA)
        return value.detach()

    return lambda: _finished(call)


def _report(cases: list[Case]) -> None:
    kind = torch.cuda.get_device_name() if _device() == "cuda" else f"{_THREADS.value} threads"
    print(
        f"\nJAX {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__} on "
        f"{kind}, {_DTYPE.value}, batch {_BATCH.value} forward and {_TRAIN_BATCH.value} in "
        f"training; medians of {_ROUNDS.value} interleaved rounds"
    )
    print(
        f"{'work':30}{'way':18}{'ms':>9}{'quartiles':>18}{'GFLOP/s':>9}{'jax/this':>10}"
        f"{'cpu ms':>9}{'jax/this':>10}"
    )
    for case in cases:
        medians = case.medians()
        processor = {way: statistics.median(s) for way, s in case.processor.items()}
        for way, median in medians.items():
            low, _, high = statistics.quantiles(case.seconds[way], n=4)
            print(
                f"{case.name if way == 'jax' else '':30}{way:18}{1e3 * median:9.1f}"
                f"{f'{1e3 * low:.1f}-{1e3 * high:.1f}':>18}{case.flops / median / 1e9:9.0f}"
                f"{medians['jax'] / median:10.2f}{1e3 * processor[way]:9.1f}"
                f"{processor['jax'] / processor[way]:10.2f}{' *' if way == case.best() else ''}"
            )
    print(
        "*: the fastest way of PyTorch; its ratio counts. cpu ms: of all threads, on a busy machine"
    )
    if _JSON.value:
        rows = [
            {"work": c.name, "flops": c.flops, "seconds": c.seconds, "ratio": c.ratio()}
            | {"processor_seconds": c.processor}
            for c in cases
        ]
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
