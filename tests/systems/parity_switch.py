"""Switch-DiT against arrays of the authors' code (byeongjun-park/Switch-DiT)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.keys import to_torch
from ppflow_jax.models.conditions import split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import PPFlow
from ppflow_jax.models.parts import BlockSpec, Execution
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.switch import TIMES, Experts, Switch, divergence, matched
from tests.acceptance.comparison import Row
from tests.systems.parity_moe import Model, guidance, nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference


def rows(ref: Reference) -> Iterator[Row]:
    """Times are their steps n: the network takes any number."""
    if "model/x_embedder.proj.weight" in ref:
        yield from network(ref, SwitchModel(ref, "model"))
    elif "model/routers.0.experts.w" in ref:
        yield from multipliers(ref)
    yield from prior(ref)


class SwitchModel(Model):
    def __init__(self, ref: Reference, prefix: str):
        super().__init__(ref, prefix)
        self.part = self.config.block.wrap

    def run(self, params, x, t, y, prior=True) -> dict[str, jax.Array]:
        """Everything the arrays have, as one program."""
        net: PPFlow = nnx.merge(self.graph, params)
        part, leaves = self.part, params["blocks"]["switch"]
        h, (c,) = net.tokens(x, 0, split((), y)), net.embeddings((t,), (split((), y),), (0,))
        gates = part.gates(leaves, net.time(t))
        weights = jnp.where(part.kept(gates), gates, 0)
        c, hidden, factors = jax.nn.silu(c), [], []
        for i in range(self.config.depth):
            block: Block = jax.tree.map(lambda leaf, i=i: leaf[i], net.blocks).given(
                weights[i], (0, 0)
            )
            factors.append(block.switch(h, weights[i]))
            h = block(h, c)
            hidden.append(h)
        side = self.config.latent_size // 2
        out = net.final(h, c, 0).reshape(len(x), side, side, 2, 2, -1)
        out = out.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 2 * side, 2 * side, -1)
        found = {"out": nchw(out), "hidden": jnp.stack(hidden), "multiplier": jnp.stack(factors)}
        if prior:
            found["full_temb"] = net.time(jnp.arange(TIMES, dtype=jnp.float32))
            found["topk_map"] = part.kept(part.gates(leaves, found["full_temb"]))
        return found | {"probs": gates}

    def probe(self, x, t, y) -> dict[str, jax.Array]:
        found = jax.jit(lambda p: self.run(p, x, t, y, prior=False))(self.params)
        return {"out": jnp.moveaxis(found["out"], 1, -1)}

    def given_prior(self, ref, found) -> jax.Array:
        """The prior with the assignment of the file: several are optimal."""
        mask = self.part.prior(self.config.depth)
        n = np.asarray(ref["run/t"])
        q = jnp.float32(mask[n][:, ref["prior/match"]] / mask[0].sum())
        return divergence(jnp.concatenate([*found["probs"]], -1) / self.config.depth, q)


def network(ref: Reference, model: SwitchModel) -> Iterator[Row]:
    x, y = nhwc(ref["run/x"]), jnp.asarray(ref["run/y"], jnp.int32)
    t = jnp.asarray(ref["run/t"], jnp.float32)

    def whole(params):
        found = model.run(params, x, t, y)
        prior = model.given_prior(ref, found)
        return jnp.sum(found["out"] * ref["run/cotangent"]) + prior, (found, prior)

    grads, (found, prior) = jax.jit(jax.grad(whole, has_aux=True))(model.params)
    for name, value in found.items():
        yield from ref.row(f"run/{name}", value)
    yield from ref.row("run/prior_loss", prior)
    alone = lambda params: model.given_prior(ref, model.run(params, x, t, y))
    for prefix, tree in (("grad", grads), ("prior_grad", jax.jit(jax.grad(alone))(model.params))):
        for name, value in to_torch(model.config, tree).items():
            yield from ref.row(f"run/{prefix}/{name}", value)
    yield from guidance(ref, model, model.config.channels)


def multipliers(ref: Reference) -> Iterator[Row]:
    """Gates and factors of the layers from what enters them."""
    settings = ref.config
    part = Switch(settings["E"], settings["K"])
    weights, hidden = ref.below("model"), ref["run/hidden"]
    temb = jnp.asarray(ref["run/temb"])
    model = ModelConfig(SIT, 8, 4, hidden.shape[-1], 1, 1, 1, block=BlockSpec(wrap=part))
    make = lambda: Experts(part, model, Execution(), nnx.Rngs(0))
    graph, _ = nnx.split(nnx.eval_shape(make))
    for layer in range(1, settings["L"]):
        leaves = {}
        for key in part.keys(layer):
            leaves[key.path[2:]] = jnp.asarray(key.ours(weights[key.torch]))
        gate = {"kernel": leaves["gate", "kernel"], "bias": leaves["gate", "bias"]}
        gates = part.gates(jax.tree.map(lambda leaf: leaf[None], {"gate": gate}), temb)
        yield _layer(ref, "run/probs", layer, gates[0])
        chosen = jnp.where(part.kept(gates), gates, 0)[0]
        experts = nnx.merge(graph, {"gate": gate, "w": leaves["w",], "b": leaves["b",]})
        factor = experts(jnp.asarray(hidden[layer - 1]), chosen)
        yield _layer(ref, "run/multiplier", layer, factor)


def _layer(ref: Reference, name: str, layer: int, ours) -> Row:
    error = np.max(np.abs(np.float64(ours) - ref[name][layer]))
    deviation, largest = ref.deviation.get(name, (0.0, 1.0))
    return Row(f"switch_dit {name} {layer}", float(error), 5 * deviation + 2e-6 * max(1, largest))


def prior(ref: Reference) -> Iterator[Row]:
    settings = ref.config
    units = settings["E"] * settings["L"]
    mask = Switch(settings["E"], settings["K"]).prior(settings["L"])
    yield from ref.row("prior/mask", mask)
    if "prior/geometry" in ref:
        for depth, u, w, *starts in ref["prior/geometry"]:
            found = Switch(3, 2).prior(int(depth))
            ours = [
                int(depth) * 3,
                found[0].sum(),
                *(found[n].argmax() for n in (0, 250, 500, 750, 999)),
            ]
            yield Row(
                f"switch_dit prior/geometry {depth}", float(ours != [u, w, *starts]), 0, "differ"
            )
    if "run/topk_map" in ref:
        used = np.concatenate([*ref["run/topk_map"]], axis=-1)
        cost = np.abs(used[:, :, None].astype(int) - mask[:, None]).sum(0)
        yield from ref.row("prior/cost_matrix", cost)
        match = np.asarray(jax.jit(lambda u: matched(u, mask))(jnp.asarray(used)))
        yield from ref.row("prior/optimal_cost", cost[np.arange(units), match].sum())
        if "run/probs" in ref:
            p = np.concatenate([*ref["run/probs"]], axis=-1) / settings["L"]
            q = mask[ref["run/t"]][:, ref["prior/match"]] / mask[0].sum()
            ours = divergence(jnp.asarray(p), jnp.float32(q))
            yield from ref.row("run/prior_loss", ours, what="from probabilities")
