"""DiT-MoE against arrays of the authors' code (feizc/DiT-MoE)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.keys import to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.devices.programs import Programs
from ppflow_jax.flow.guidance import Cfg
from ppflow_jax.flow.loss import Draws, FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.conditions import split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import Output, PPFlow, make_apply
from ppflow_jax.models.parts import BlockSpec, Execution
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.moe import MoE
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

BALANCE = 0.01  # weight of the term
PROGRAMS = ("ragged", "blocks", "dense")


def rows(ref: Reference) -> Iterator[Row]:
    for case in ("plain", "empty_expert"):
        if f"layer/{case}/x" in ref:
            yield from layer(ref, case)
    if "model/x_embedder.proj.weight" in ref:
        model = Model(ref, "model")
        yield from forward(ref, model)
        yield from training(ref, model)
    if "upcycle/dense/x_embedder.proj.weight" in ref:
        yield from upcycling(ref)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def nchw(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, -3)


def layer(ref: Reference, case: str) -> Iterator[Row]:
    """The mixture alone, by every program."""
    name, x = f"layer/{case}", jnp.asarray(ref[f"layer/{case}/x"])
    weights = {f"blocks.0.moe.{k}": v for k, v in ref.below("layer/weights").items()}
    if f"{name}/gate.weight" in ref:
        weights["blocks.0.moe.gate.weight"] = ref[f"{name}/gate.weight"]
    width = x.shape[-1]
    read, hidden = MoE.read(weights, width)
    part = replace(read, top_k=ref.config["K"])
    heads = ref.config["H"]
    model = ModelConfig(SIT, 8, 4, width, 1, heads, 1, hidden / width, block=BlockSpec(part))
    params = below_moe(part, weights)
    for program in PROGRAMS:
        run = Execution(programs=Programs(experts=program))
        make = lambda run=run: Block(model, run, rngs=nnx.Rngs(0))
        graph, leaves = nnx.split(nnx.eval_shape(make))
        others = jax.tree.map(lambda s: jnp.zeros(s.shape), nnx.to_pure_dict(leaves))

        def value(params, x, graph=graph, others=others):
            block = nnx.merge(graph, others | {"moe": params})
            y, aux = part(block, x)
            return y, BALANCE * aux["balance"]

        y, balance = jax.jit(value)(params, x)
        yield from ref.row(f"{name}/y", y, what=program)
        yield from ref.row(f"{name}/y_eval", y, what=program)
        r = ref[f"{name}/cotangent"]
        whole = jax.grad(lambda p, x, r=r: jnp.sum((o := value(p, x))[0] * r) + o[1], (0, 1))
        grads, dx = jax.jit(whole)(params, x)
        yield from gradient_rows(ref, f"{name}/grad", part, grads, program)
        yield from ref.row(f"{name}/grad/x", dx, what=program)
    yield from ref.row(f"{name}/balance_loss", balance)
    grads, dx = jax.jit(jax.grad(lambda p, x: value(p, x)[1], (0, 1)))(params, x)
    yield from gradient_rows(ref, f"{name}/balance_grad", part, grads)
    yield from ref.row(f"{name}/balance_grad/x", dx)
    scores, gate, expert = part.route(params["router"], x)
    chosen = np.asarray(jax.nn.one_hot(expert, part.experts))
    yield from ref.row(f"{name}/scores", scores.reshape(-1, part.experts))
    yield from ref.row(f"{name}/selected", chosen.sum(2).reshape(-1, part.experts) > 0)
    values = np.sum(chosen * np.asarray(gate)[..., None], axis=2)
    yield from ref.row(f"{name}/gate_value", values.reshape(-1, part.experts))
    ranked = np.sort(np.asarray(scores), axis=-1)[..., ::-1]
    if part.top_k < part.experts:
        gaps = ranked[..., part.top_k - 1] - ranked[..., part.top_k]
        yield from ref.row(f"{name}/margin", gaps.min())


def below_moe(part: MoE, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Leaves of one layer's mixture from tensors of the PyTorch code."""
    leaves: dict[str, Any] = {}
    for key in part.keys(0):
        *parents, last = key.path[2:]
        node = leaves
        for name in parents:
            node = node.setdefault(name, {})
        node.setdefault(last, []).append(key.ours(weights[key.torch]))
    one = {name: leaf[0] for name, leaf in leaves.pop("shared", {}).items()}
    router = leaves.pop("router")[0]
    stacked = {name: np.stack(each) for name, each in leaves.items()}
    shared = {"shared": one} if one else {}
    return jax.tree.map(jnp.asarray, stacked | shared | {"router": router})


def gradient_rows(ref, prefix, part, grads, what="") -> Iterator[Row]:
    for key in part.keys(0):
        leaf = grads
        for name in key.path[2:]:
            leaf = leaf[name]
        name = key.torch.removeprefix("blocks.0.moe.")
        ours = key.theirs(np.asarray(leaf[key.index[1:]]))
        yield from ref.row(f"{prefix}/{name}", ours, what=what)


class Model:
    """A whole model of the file, read as a file of weights is."""

    def __init__(self, ref: Reference, prefix: str):
        self.state = ref.below(prefix)
        config = find_config(self.state, "sit", heads=ref.config["H"])
        parts = {name: getattr(config.block, name) for name in ("ffn", "wrap")}
        for name, part in parts.items():
            if hasattr(part, "top_k"):
                parts[name] = replace(part, top_k=min(ref.config["K"], part.experts))
        self.config = replace(config, block=BlockSpec(**parts))
        self.params = jax.tree.map(jnp.asarray, from_torch(self.config, self.state))
        self.apply = make_apply(self.config)

        make = lambda: PPFlow(self.config, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
        self.graph, _ = nnx.split(nnx.eval_shape(make))

    def full(self, x, t, y) -> jax.Array:
        """The output with the channels of variance, which are not trained."""
        return self.probe(x, t, y)["out"]

    def block(self) -> Any:
        """The first."""
        return jax.tree.map(lambda leaf: leaf[0], nnx.merge(self.graph, self.params).blocks)

    def probe(self, x, t, y) -> dict[str, jax.Array]:
        def run(params, x, t, y):
            network: PPFlow = nnx.merge(self.graph, params)
            h, (c,) = (
                network.tokens(x, 0, split((), y)),
                network.embeddings((t,), (split((), y),), (0,)),
            )
            silu, hidden = jax.nn.silu(c), []
            for i in range(self.config.depth):
                h = jax.tree.map(lambda leaf, i=i: leaf[i], network.blocks)(h, silu)
                hidden.append(h)
            tokens = network.final(h, silu, 0)
            side = self.config.latent_size // 2
            out = tokens.reshape(len(x), side, side, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
            out = out.reshape(len(x), 2 * side, 2 * side, -1)
            return {"cond": c, "hidden": jnp.stack(hidden), "out": out}

        return jax.jit(run)(self.params, x, t, y)


def forward(ref: Reference, model: Model) -> Iterator[Row]:
    x, y = nhwc(ref["run/x"]), jnp.asarray(ref["run/y"], jnp.int32)
    found = model.probe(x, jnp.asarray(ref["run/t"]), y)
    yield from ref.row("run/out", nchw(found["out"]))
    yield from ref.row("run/hidden", found["hidden"])
    yield from ref.row("run/cond", found["cond"])
    if "run/t_ddpm" in ref:
        out = model.full(x, jnp.asarray(ref["run/t_ddpm"]), y)
        yield from ref.row("run/out_ddpm", nchw(out))
    if "run/block_x" in ref:
        out = model.block()(
            jnp.asarray(ref["run/block_x"]), jax.nn.silu(jnp.asarray(ref["run/block_c"]))
        )
        yield from ref.row("run/block_out", out)
    yield from guidance(ref, model, 3)


def guidance(ref: Reference, model: Model, channels: int) -> Iterator[Row]:
    """Labels 1 and 0 of two latents; the second half is the null class with the guided channels.

    The files do not say which of their times it is: that which fits best.
    """
    for name in [name for name in ref.arrays if name.startswith("run/out_cfg_w")]:
        scale, null = float(name.split("_w")[-1]), model.config.null_label
        x, y = nhwc(ref["run/x"])[:2], jnp.array([1, 0])
        found = []
        for time in jnp.asarray(ref["run/t"], jnp.float32):
            t = jnp.full(2, time)
            ours = Cfg(null, channels)(model.full, None, x, t, y, scale)
            plain = model.full(x, t, jnp.full_like(y, null))
            twin = jnp.concatenate([ours[..., :channels], plain[..., channels:]], -1)
            found += ref.row(name, nchw(jnp.concatenate([ours, twin])))
        yield min(found, key=lambda row: row.error)


def training(ref: Reference, model: Model) -> Iterator[Row]:
    """Their time runs from data to noise: v(x, t) is -v of theirs at 1 - t."""
    if "train/t" not in ref:
        return

    def apply(params, xs, ts, ys, stages):
        outputs = model.apply(params, xs, tuple(1 - t for t in ts), ys, stages)
        return tuple(Output(-out.prediction, out.aux) for out in outputs)

    x1, x0 = nhwc(ref["run/x"]), nhwc(ref["train/noise"])
    draws = Draws(x0, 1 - jnp.asarray(ref["train/t"]), jnp.asarray(ref["run/y"], jnp.int32))
    objective = FlowObjective(SIT, Flow(), model.config.null_label)
    run = jax.jit(
        jax.value_and_grad(
            lambda p: objective.loss(apply, p, {}, {"x": x1}, draws, {"balance": BALANCE}),
            has_aux=True,
        )
    )
    (total, metrics), grads = run(model.params)
    yield from ref.row("train/loss", metrics["loss"])
    within = BALANCE * metrics["balance"]
    yield Row("dit_moe total less terms", abs(float(total - within - metrics["loss"])), 1e-6)
    for name, ours in to_torch(model.config, grads).items():
        yield from ref.row(f"train/grad/{name}", ours)
    if "train/sample" in ref:
        states = ref["train/sample"]
        n, steps = states.shape[1], len(states) - 1
        one = lambda p, x, t, y, stage: -model.apply(p, x, 1 - t, y, stage)
        plan = SamplerConfig("euler", steps, "aligned", (2.0,))
        sampler = Sampler(one, model.config, Flow(), plan)
        ys = jnp.asarray(ref["run/y"], jnp.int32)[:n]
        ours = sampler(model.params, nhwc(states[0]), ys, trajectory=True)
        yield from ref.row("train/sample", nchw(ours))


def upcycling(ref: Reference) -> Iterator[Row]:
    """From a mixture of one expert: their router's draw, and as one that sums to 1."""
    dense, experts = Model(ref, "upcycle/dense"), ref.config["E"]
    inputs = (nhwc(ref["upcycle/x"]), jnp.asarray(ref["upcycle/t"]), jnp.asarray(ref["upcycle/y"]))

    def output(config, params) -> jax.Array:
        x, t, y = inputs
        return nchw(jax.jit(make_apply(config), static_argnums=4)(params, x, t, y, 0))

    yield from ref.row("upcycle/dense_out", output(dense.config, dense.params))
    for renormalise, name in ((False, "upcycle/moe_out"), (True, "upcycle/dense_out")):
        ffn = replace(
            dense.config.block.ffn, experts=experts, top_k=ref.config["K"], renormalise=renormalise
        )
        config = replace(dense.config, block=BlockSpec(ffn))
        blocks = config.block.start(config, dense.config, dense.params["blocks"], jax.random.key(0))
        if "upcycle/gate.weight" in ref:
            gate = jnp.asarray(ref["upcycle/gate.weight"]).T
            blocks["moe"]["router"] = jnp.broadcast_to(gate, (config.depth, *gate.shape))
        out = output(config, dense.params | {"blocks": blocks})
        yield from ref.row(name, out, what=f"upcycled, renormalise {renormalise}")
