"""Compares token merging with arrays computed by the public SDTM and tomesd code.

    python -m tests.acceptance.merge_parity FOLDER    # with sdtm.npz and tome.npz, compact or full

prints measured error beside bound; exit code 1 if one is over. The compact selection in
tests/reference/accelerate has the same names and fewer arrays.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import operator
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.convert.load import from_torch
from ppflow_jax.flow.guidance import Cfg
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems import token_groups, tome
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.merged_blocks import Merging, Parts, full_layer, parts
from ppflow_jax.systems.sdtm import MergeConfig, full_steps, ratios, schedule
from tests.acceptance.comparison import Row, report
from tests.acceptance.parity import max_abs, nhwc


def differences(ours, theirs) -> int:
    """Decisions that are not the same; the bound is none."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return max(ours.size, theirs.size, 1)
    return int(np.sum(ours != theirs))


@functools.partial(jax.jit, static_argnames=("frequency", "grid", "count"))
def _windows(x, counter, frequency, *, grid, count):
    scores = token_groups.window_scores(x, counter, grid, frequency)
    groups = token_groups.merge_windows(scores, grid, count)
    return token_groups.similarity(x, grid), scores, token_groups.best(scores), groups


@functools.partial(jax.jit, static_argnames=("grid", "count"))
def _nearest(x, counter, drawn, *, grid, count):
    position = token_groups.oldest(counter, grid) if drawn is None else drawn
    args = token_groups.in_windows(x, grid).reshape(x.shape), position, token_groups.windows(grid)
    return position, *token_groups.nearest(*args), token_groups.merge_nearest(*args, count)


@jax.jit
def _back_and_forth(groups, values, cached):
    merged = token_groups.merge(groups, values)
    unmerged = token_groups.unmerge(groups, merged)
    mixed = [
        None if cached is None else token_groups.mix(groups, unmerged, cached, w) for w in _WEIGHTS
    ]
    return merged, unmerged, mixed


_WEIGHTS = (0.1, 0.2)


def tokens(
    name: str, groups: token_groups.Groups, ref: dict, inputs: dict, bound: float
) -> Iterator[Row]:
    """Merged and unmerged tokens; the order of rows is not compared."""
    if "compact" not in ref:
        return
    merged, unmerged, mixed = _back_and_forth(groups, inputs["values"], inputs.get("cached"))
    b, theirs = np.arange(len(merged))[:, None], ref["compact"]
    yield Row(f"{name} length", differences(merged.shape, theirs.shape), 0)
    yield Row(f"{name} merged", max_abs(merged[b, groups.row], theirs[b, ref["row"]]), bound)
    if "unmerged" in ref:
        yield Row(f"{name} unmerged", max_abs(unmerged, ref["unmerged"]), bound)
    for weight, ours in zip(_WEIGHTS, mixed):
        if (key := f"unmerged_cached_mcw{weight}") in ref:
            yield Row(f"{name} mixed {weight}", max_abs(ours, ref[key]), bound)


def single_calls(ref: dict) -> Iterator[Row]:
    """Scores, decisions, merged and unmerged tokens, and counters of one call.

    In the original's prune mode, which is not offered, only decisions are compared.
    """
    for name in sorted({k.split("/")[1] for k in ref if re.fullmatch(r"single/\d+/spec", k)}):
        case, spec = under(ref, f"single/{name}/"), json.loads(str(ref[f"single/{name}/spec"]))
        side = spec["grid"]
        inputs, n, grid = under(ref, f"single/g{side}/"), side * side, (side, side)
        x, table = jnp.asarray(inputs["metric"]), token_groups.windows(grid)
        rows = np.arange(len(x))[:, None]
        counter = jnp.asarray(case.get("T_before", np.zeros((len(x), n), np.int32)))
        windows = spec["function"] == "SSM"
        setting = MergeConfig(ratio=spec["ratio"], deviation=0.0, switch=float(windows))
        method = schedule(setting, 1, grid)[0] if windows else schedule(setting, 2, grid)[1]
        label = f"{name} {spec['function']}"
        if windows:
            similarity, scores, best, groups = _windows(
                x, counter, spec["a_s"], grid=grid, count=method.count
            )
            yield Row(f"{label} S", max_abs(similarity, case["S"]), 2e-6)
            yield Row(f"{label} P", max_abs(scores, case["P"]), 2e-6)
            chosen = best[:, : method.count]
            yield Row(f"{label} windows", differences(chosen, case["windows"]), 0)
        else:
            # the original draws destinations where it has no counter
            drawn = jnp.asarray(case["dst"]) if "drawn" in case else None
            position, score, target, groups = _nearest(
                x, counter, drawn, grid=grid, count=method.count
            )
            yield Row(f"{label} destinations", differences(position, case["dst"]), 0)
            into, source = np.asarray(groups.order[:, : len(table)]), np.isfinite(score)
            theirs = (case[key][:, table.ravel()][source] for key in ("best_score", "best_dst"))
            yield Row(f"{label} score", max_abs(score[source], next(theirs)), 2e-6)
            ours = into[rows, target][source]
            yield Row(f"{label} nearest", differences(ours, next(theirs)), 0)
            yield Row(f"{label} merged sources", differences(member(groups), case["merged"]), 0)
        if not spec["prune"]:
            after = token_groups.count_up(groups, counter)
            yield Row(f"{label} counter", differences(after, case["T_after"]), 0)
            yield from tokens(label, groups, case, inputs, 2e-6)


def under(ref: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in ref.items() if k.startswith(prefix)}


def joined(groups: token_groups.Groups) -> np.ndarray:
    """The tokens that join a group."""
    return np.asarray(groups.order[:, groups.count : groups.count + groups.target.shape[1]])


def member(groups: token_groups.Groups) -> np.ndarray:
    """Whether each token is a source that joined a group."""
    out = np.zeros(groups.row.shape, bool)
    np.put_along_axis(out, joined(groups), True, axis=1)
    return out


def settings(args: dict, steps: int) -> MergeConfig:
    """A reference run's, in our terms."""
    return MergeConfig(
        plateaus=64,  # as many as the public code has
        ratio=args["ratio"],
        deviation=args["deviation"],
        switch=args["switch_step"] / steps,
        protect=args["protect_steps_frequency"] or 0,
        mixing=args["mcw"],
    )


def schedules(ref: dict) -> Iterator[Row]:
    """Ratios, and tokens that leave attention and MLP at every step."""
    for name in sorted({k.split("/")[1] for k in ref if k.startswith("schedule/")}):
        pattern = r"K(\d+)_rho(.+)_delta(.+)_switch(\d+)_protect(.+)"
        k, rho, delta, switch, protect = re.fullmatch(pattern, name).groups()
        steps, key = int(k), f"schedule/{name}"
        args = {"ratio": float(rho), "deviation": float(delta), "switch_step": int(switch)}
        args |= {"protect_steps_frequency": None if protect == "None" else int(protect), "mcw": 0.1}
        config = settings(args, steps)
        ours = ratios(steps, config.ratio, config.deviation)
        yield Row(f"{name} ratio", max_abs(ours, ref[f"{key}/ratio"]), 1e-15)
        full = full_steps(config, steps)
        for side in (8, 16, 32):
            left = np.array([m.tokens() for m in schedule(config, steps, (side, side))])
            removed = np.where(full[:, None], 0, side**2 - left)
            for i, branch in enumerate(("attn", "mlp")):
                theirs = ref[f"{key}/removed_{branch}_N{side**2}"]
                label = f"{name} {branch} {side**2}"
                yield Row(label, differences(removed[:, i], theirs), 0)


KINDS = {"nothing": 0, "windows": 1, "tokens": 2}


class Decisions:
    """What was decided at every step and layer, as the reference stores it."""

    def __init__(self, ref: dict, key: str, rows: int):
        self.ref, self.key, self.rows = ref, key, rows
        self.wrong: dict[str, int] = collections.defaultdict(int)

    def see(self, i: int, layer: int, method: Merging | None, groups: token_groups.Groups | None):
        """`groups` None: a dense call."""
        kind = 0 if groups is None else KINDS[method.kind]
        self._compare("kind", kind, self._at("kind", i, layer))
        table = token_groups.windows((16, 16))
        merged = np.zeros((self.rows, table.size), bool)
        windows = np.zeros((self.rows, len(table)), bool)
        position = np.full((self.rows, len(table)), -1)
        if kind == 1:
            windows = ~np.asarray(groups.alone)[:, table].all(axis=2)
        if kind == 2:
            merged = member(groups)
            position = np.argmax(table == np.asarray(groups.order)[:, : len(table), None], axis=2)
        self._compare("windows", windows, self._at("windows", i, layer))
        self._compare("dst", position, self._at("dst", i, layer))
        self._compare("merged", merged, self._at("merged", i, layer))

    def counter(self, i: int, counter):
        self._compare("T", counter, self.ref[f"{self.key}/T"][i])

    def _at(self, name: str, i: int, layer: int):
        return self.ref[f"{self.key}/{name}"][i, layer]

    def _compare(self, name: str, ours, theirs):
        self.wrong[name] += differences(ours, theirs)

    def report(self, label: str) -> Iterator[Row]:
        for name, wrong in self.wrong.items():
            yield Row(f"{label} {name}", wrong, 0)


def replays(ref: dict) -> Iterator[Row]:
    """Layers h + gate sin(h) + gate cos(h) on given tokens, many steps."""
    for name in sorted({k.split("/")[1] for k in ref if re.fullmatch(r"replay/.+/args", k)}):
        key, args = f"replay/{name}", json.loads(str(ref[f"replay/{name}/args"]))
        steps, depth = args["steps"], args["layers"]
        config = settings(args, steps)
        methods, full = schedule(config, steps, (16, 16)), full_steps(config, steps)
        x, gates = jnp.asarray(ref["replay/x"]), (ref["replay/gate_attn"], ref["replay/gate_mlp"])
        counter, stored = jnp.zeros(x.shape[1:3], jnp.int32), [None] * depth
        seen, worst = Decisions(ref, key, x.shape[1]), 0.0

        def layer_of(gate1, gate2):
            return Parts(
                lambda tokens: tokens,
                lambda tokens, _: gate1[:, None] * jnp.sin(tokens),
                lambda tokens: tokens,
                lambda tokens: gate2[:, None] * jnp.cos(tokens),
            )

        @functools.partial(jax.jit, static_argnums=0)
        def cheap(method, gate1, gate2, h, counter, stored):
            return method.layer(layer_of(gate1, gate2), h, counter, stored)

        for i in range(steps):
            h = x[i]
            for layer in range(depth):
                gate, groups = (jnp.asarray(g[i, layer]) for g in gates), None
                if full[i]:
                    h, stored[layer] = full_layer(layer_of(*gate), h)
                else:
                    h, counter, groups = cheap(methods[i], *gate, h, counter, stored[layer])
                seen.see(i, layer, methods[i], groups)
            worst = np.maximum(worst, max_abs(h, ref[f"{key}/out"][i]))
            seen.counter(i, counter)
        yield Row(f"replay {name} out", worst, 1e-5)
        yield from seen.report(f"replay {name}")


class Network:
    """The reference's SiT; steps of a stage are those of the whole run."""

    def __init__(self, ref: dict):
        self.ref = ref
        raw = json.loads(str(ref["model_config"]))
        sizes = ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
        self.model = ModelConfig(SIT, *(raw[name] for name in sizes), learn_sigma=False)
        state = {k.removeprefix("model/"): v for k, v in ref.items() if k.startswith("model/")}
        self.params = from_torch(self.model, state)
        self.apply = make_apply(self.model)

    def runs(self) -> list[str]:
        return sorted({k.split("/")[1] for k in self.ref if re.fullmatch(r"run/.+/args", k)})

    def rows(self, name: str, decisions: bool = True) -> Iterator[Row]:
        """Trajectories, and if asked every decision along them."""
        key, args = f"run/{name}", json.loads(str(self.ref[f"run/{name}/args"]))
        scale = float(self.ref["run/cfg_scale"]) if args["cfg"] else 1.0
        config = SamplerConfig("euler", args["steps"], cfg=(scale,), cfg_channels=3)
        setting = settings(args, args["steps"])
        segments = accelerated(config, self.model, Flow(), AccelerateConfig(merge=setting))
        sampler = Sampler(self.apply, self.model, Flow(), config, segments=segments)
        x0, y = nhwc(self.ref[f"{key}/x0"]), jnp.asarray(self.ref[f"{key}/y"], jnp.int32)
        states = sampler(self.params, x0, y, trajectory=True)
        for step, theirs in zip(self.ref[f"{key}/steps"], self.ref[f"{key}/x"]):
            yield Row(f"run {name} x after {step}", max_abs(states[step], nhwc(theirs)), 2e-5)
        if not decisions:
            return
        if f"{key}/plain_final" in self.ref:
            plain = Sampler(self.apply, self.model, Flow(), config)(self.params, x0, y)
            theirs = nhwc(self.ref[f"{key}/plain_final"])
            yield Row(f"run {name} without", max_abs(plain, theirs), 2e-5)
        yield from self._decided(name, setting, states, y, scale)

    def _decided(self, name: str, setting: MergeConfig, states, y, scale: float) -> Iterator[Row]:
        steps, (grid, depth) = len(states) - 1, ((16, 16), self.model.depth)
        methods, full = schedule(setting, steps, grid), full_steps(setting, steps)
        rows = len(y) * (2 if scale != 1 else 1)
        counter, stored = jnp.zeros((rows, 256), jnp.int32), None
        seen = Decisions(self.ref, f"run/{name}", rows)

        @functools.partial(jax.jit, static_argnums=0)
        def evaluate(method, x, t, counter, stored):
            extra = None

            def trunk(blocks, h, c):
                def body(carry, xs):
                    block, stored = xs
                    if method is None:
                        h, stored = full_layer(parts(block, c), carry[0])
                        return (h, carry[1]), stored
                    h, counter, groups = method.layer(parts(block, c), *carry, stored)
                    return (h, counter), groups

                (h, after), per_layer = jax.lax.scan(body, (h, counter), (blocks, stored))
                return h, (after, per_layer)

            def apply(*args):
                nonlocal extra
                out, extra = self.apply(*args, trunk=trunk)
                return out

            t = jnp.full(len(x), t)
            if scale == 1:
                apply(self.params, x, t, y, 0)
            else:
                predict = lambda x, t, y: apply(self.params, x, t, y, 0)
                Cfg(self.model.null_label, 3)(predict, None, x, t, y, scale)
            return extra

        for i in range(steps):
            method, groups = None if full[i] else methods[i], None
            given = None if method is None else stored
            counter, extra = evaluate(method, states[i], i / steps, counter, given)
            if method is None:
                stored = extra
            else:
                groups = extra
            for layer in range(depth):
                now = jax.tree.map(operator.itemgetter(layer), groups)
                seen.see(i, layer, method, now)
            seen.counter(i, counter)
        yield from seen.report(f"run {name}")

    def block(self) -> Iterator[Row]:
        """One block at some steps of a run, on tokens of their own."""
        ref, args = self.ref, json.loads(str(self.ref["block/args"]))
        setting = settings(args, args["steps"])
        methods = schedule(setting, args["steps"], (16, 16))
        full = full_steps(setting, args["steps"])
        hidden, c = jnp.asarray(ref["block/hidden"]), jax.nn.silu(jnp.asarray(ref["block/c"]))
        counter, stored = jnp.zeros((1, 256), jnp.int32), None

        @functools.partial(jax.jit, static_argnums=0)
        def run(method, t, h, c, counter, stored):
            middle = None

            def watched(block, c):
                layer = parts(block, c)

                def before_mlp(h):
                    nonlocal middle
                    middle = h
                    return layer.before_mlp(h)

                return layer._replace(before_mlp=before_mlp)

            def trunk(blocks, _, __):
                first = jax.tree.map(lambda p: p[0], blocks)
                if method is None:
                    out, new = full_layer(watched(first, c), h)
                    after = counter
                else:
                    out, after, _ = method.layer(watched(first, c), h, counter, stored)
                    new = stored
                return h, (out, middle, after, new)

            x = jnp.zeros((1, *self.model.shape))
            return self.apply(self.params, x, t, jnp.zeros(1, int), 0, trunk=trunk)[1]

        for k, i in enumerate(ref["block/steps"]):
            method = None if full[i] else methods[i]
            kind = 0 if method is None else KINDS[method.kind]
            yield Row(f"block {i} kind", differences(kind, ref["block/kind"][k]), 0)
            out, middle, counter, stored = run(
                method, jnp.zeros(1), hidden[k], c[k], counter, stored
            )
            yield Row(f"block {i} T", differences(counter, ref["block/T"][k]), 0)
            yield Row(f"block {i} out", max_abs(out, ref["block/out"][k]), 2e-5)
            attention, mlp = middle - hidden[k], out - middle
            yield Row(f"block {i} attention", max_abs(attention, ref["block/attn_branch"][k]), 2e-5)
            yield Row(f"block {i} mlp", max_abs(mlp, ref["block/mlp_branch"][k]), 2e-5)


_tome = jax.jit(tome.match, static_argnums=(2, 3, 4))


def tome_calls(ref: dict) -> Iterator[Row]:
    for name in sorted({k.split("/")[0] for k in ref}):
        case, spec = under(ref, f"{name}/"), json.loads(str(ref[f"{name}/spec"]))
        grid, cell = (spec["rows"], spec["cols"]), (spec["sy"], spec["sx"])
        x, position = jnp.asarray(case["metric"]), jnp.asarray(case["drawn"].ravel())
        groups = _tome(x, position, grid, spec["r"], cell)
        into = np.asarray(groups.order[:, : groups.count])
        both = np.sort(into[0]), np.sort(case["dst_token"])
        yield Row(f"tome {name} destinations", differences(*both), 0)
        yield Row(f"tome {name} sources", differences(joined(groups), case["merged_src"]), 0)
        chosen = np.take_along_axis(into, np.asarray(groups.target), axis=1)
        yield Row(f"tome {name} joined", differences(chosen, case["merged_into"]), 0)
        yield from tokens(f"tome {name}", groups, case, {"values": case["values"]}, 1e-6)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m tests.acceptance.merge_parity FOLDER")
        return 2
    sdtm, tomesd = (dict(np.load(Path(argv[1]) / f)) for f in ("sdtm.npz", "tome.npz"))
    network = Network(sdtm)
    groups = [single_calls(sdtm), schedules(sdtm), replays(sdtm), tome_calls(tomesd)]
    groups += [network.block(), *(network.rows(name) for name in network.runs())]
    with jax.default_matmul_precision("highest"):
        return report(itertools.chain.from_iterable(groups))


if __name__ == "__main__":
    # Compiling is most of the time: LLVM need not polish what runs once.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv))
