"""PyTorch's calls that `peer_torch` times: those of `torch_model` with our weights."""

from __future__ import annotations

import copy
from multiprocessing.connection import Connection

import jax
import numpy as np
import torch

from benchmarks.peer_calls import EMA, LABEL_DROP, Call, Work, serve
from benchmarks.torch_model import TorchPPFlow


def serve_theirs(works: list[Work], pipe: Connection) -> None:
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(works[0].threads)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any, as JAX's default
    torch._dynamo.config.recompile_limit = 64  # one program a stage
    kind = torch.cuda.get_device_name() if _device() == "cuda" else f"{works[0].threads} threads"

    def ways(work: Work) -> dict[str, Call]:
        return _their_steps(work) if work.stage is None else _their_forwards(work)

    serve(works, pipe, ways, (_device(), f"torch {torch.__version__} on {kind}"))


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
