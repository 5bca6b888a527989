"""Compares this package with arrays computed by the public PyTorch implementation.

    python -m tests.acceptance.parity DIR

prints measured error beside bound; exit code 1 if one is over. DIR has the layout of
tests/reference (see its README); files that are absent are not compared, so the same code serves
the compact selection in the repository and a full set.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.data.transforms import center_crop
from ppflow_jax.flow import path as paths
from ppflow_jax.flow.guidance import Cfg
from ppflow_jax.flow.likelihood import log_likelihood
from ppflow_jax.flow.loss import Draws, FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.solvers import DIFFUSIONS, ODE_SOLVERS
from ppflow_jax.flow.tables import Facts, Networks, Tables
from ppflow_jax.models.conditions import split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import modulate, timestep_features
from ppflow_jax.models.network import PPFlow, make_apply, nnx
from ppflow_jax.models.patch import patchify, positions, unpatchify
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT
from tests.acceptance.comparison import Row, report

MODELS = ("ppflow_l2", "ppflow_l3", "ppflow_l2_nosigma", "ppflow_l3_nosigma", "sit")
SOLVERS = {
    "euler": "euler",
    "heun2": "heun",
    "midpoint": "midpoint",
    "heun3": "heun3",
    "rk4": "rk4",
}
GUIDED_CHANNELS = 3
FORMS = {"inccreasing-decreasing": "increasing-decreasing"}


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(np.asarray(x), -3, -1))


def load(file: Path) -> dict[str, np.ndarray | jax.Array]:
    """Arrays of a file, on the device unless that would round them."""
    kept = (np.float64, np.str_)
    return {k: v if v.dtype.type in kept else jnp.asarray(v) for k, v in np.load(file).items()}


def max_abs(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.max(np.abs(a - b))) if a.size else 0.0


def relative(a, b) -> float:
    return float(np.max(np.abs(np.float64(a) - np.float64(b)) / np.abs(np.float64(b))))


class Case:
    """One model directory of the reference set."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        raw = json.loads((folder / "config.json").read_text())
        self.pyramid = {2: PPFLOW2, 3: PPFLOW3}.get(raw.get("patch_level"), SIT)
        self.config = ModelConfig(
            pyramid=self.pyramid,
            latent_size=raw["input_size"],
            channels=raw.get("in_channels", 4),
            width=raw["hidden_size"],
            depth=raw["depth"],
            heads=raw["num_heads"],
            num_classes=raw["num_classes"],
            learn_sigma=raw["learn_sigma"],
        )
        self.state = load_file(folder / "model.safetensors")
        self.params = from_torch(self.config, self.state)
        self.apply = make_apply(self.config)
        self.jitted = jax.jit(self.apply, static_argnums=4)

    def load(self, name: str) -> dict[str, np.ndarray | jax.Array]:
        return load(self.folder / f"{name}.npz")

    def shape_of(self, stage: int) -> dict[str, int]:
        """Factors between a stage's patch and the base patch."""
        (ph, pw), (bh, bw) = self.pyramid.stages[stage].patch, self.pyramid.stages[-1].patch
        return dict(i=ph // bh, j=pw // bw)

    def down(self, x: np.ndarray, stage: int) -> np.ndarray:
        """Space to channel of the PyTorch code, NHWC -> NCHW."""
        return einops.rearrange(
            np.asarray(x), "b (h i) (w j) c -> b (c i j) h w", **self.shape_of(stage)
        )

    def up(self, x: np.ndarray, stage: int) -> np.ndarray:
        return einops.rearrange(
            np.asarray(x), "b (c i j) h w -> b (h i) (w j) c", **self.shape_of(stage)
        )


case_of = functools.cache(Case)  # whose programs serve all its files


def forward(case: Case, ref: dict) -> Iterator[Row]:
    x, y = nhwc(ref["x"]), ref["y"]
    for k, t in enumerate(ref["t"]):
        stage = case.pyramid.stage_at(t)
        if "stage" in ref:
            yield Row(f"stage at t={t:.8g}", abs(stage - int(ref["stage"][k])), 0)
        out = case.jitted(case.params, x, np.full(len(x), t, np.float32), y, stage)
        for name in ("out", "out_f64"):
            if name in ref:
                yield Row(f"{name} t={t:.8g}", max_abs(out, nhwc(ref[name][k])), 1e-5)
    for suffix in ("", "_a", "_b"):
        if f"mixed_t{suffix}" in ref:
            t = ref[f"mixed_t{suffix}"]
            out = case.jitted(case.params, x, t, y, case.pyramid.stage_at(t[0]))
            yield Row(f"mixed t{suffix}", max_abs(out, nhwc(ref[f"mixed_out{suffix}"])), 1e-5)
    if "cfg_x" in ref:
        scale = np.full((1, 1), ref["cfg_scale"])
        args = {"x": ref["cfg_x"], "y": ref["cfg_y"], "t": ref["t"]}
        yield from guidance(case, args | {"scales": scale, "out": ref["cfg_out"][None]})
    if "pos_embed" in ref:
        ours = positions(case.pyramid, 0, case.config.latent_size, case.config.width)
        yield Row("pos_embed", max_abs(ours, ref["pos_embed"][0]), 1e-6)


def guidance(case: Case, ref: dict) -> Iterator[Row]:
    n = len(ref["x"]) // 2
    x, y, null = nhwc(ref["x"])[:n], ref["y"][:n], case.config.null_label
    run = jax.jit(
        lambda params, x, t, scale, stage: Cfg(null, GUIDED_CHANNELS)(
            lambda x, t, y: case.apply(params, x, t, y, stage), None, x, t, y, scale
        ),
        static_argnums=4,
    )
    for s, scales in enumerate(ref["scales"]):
        for k, t in enumerate(ref["t"]):
            stage, ts = case.pyramid.stage_at(t), np.full(n, t, np.float32)
            scale = np.float32(scales[min(stage, len(scales) - 1)])
            ours = np.asarray(run(case.params, x, ts, scale, stage))
            theirs = nhwc(ref["out"][s, k])
            # their second half repeats the guided channels and has the rest unconditional
            uncond = case.jitted(case.params, x, ts, np.full(n, null), stage)
            twin = np.concatenate(
                [ours[..., :GUIDED_CHANNELS], np.asarray(uncond)[..., GUIDED_CHANNELS:]], -1
            )
            error = max_abs(np.concatenate([ours, twin]), theirs)
            yield Row(f"cfg {np.round(scales, 2).tolist()} t={t:.8g}", error, 5e-5)


def intermediates(case: Case, ref: dict) -> Iterator[Row]:
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: PPFlow(case.config, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
        )
    )

    @functools.partial(jax.jit, static_argnums=4)
    def run(params, x, t, y, stage):
        model: PPFlow = nnx.merge(graph, params)
        first = jax.tree.map(lambda leaf: leaf[0], model.blocks)
        told = split((), y)
        tokens, (c,) = model.tokens(x, stage, told), model.embeddings((t,), (told,), (stage,))
        silu = jax.nn.silu(c)
        shift, scale, gate, shift2, scale2, _ = mods = first.modulation(silu)
        attended = first.attention(modulate(tokens, shift, scale))
        middle = tokens + gate[:, None] * attended
        hidden, blocks = tokens, {}
        for i in range(case.config.depth):
            hidden = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)(hidden, silu)
            blocks[f"block{i}"] = hidden
        return {
            "tokens_before_pos": model.patchify[stage](
                patchify(x, case.pyramid.stages[stage].patch)
            ),
            "tokens_plus_pos": tokens,
            "t_emb": model.time(t),
            "y_emb": model.label(y),
            "level_emb": model.level(jnp.full(y.shape, stage)),
            "c": c,
            "block0_adaln": jnp.concatenate(mods, -1),
            "block0_attn": attended,
            "block0_mlp": first.mlp(modulate(middle, shift2, scale2)),
            **blocks,
            "final_tokens": model.final(hidden, silu, stage),
            "out": jnp.moveaxis(model(x, t, y, stage), -1, 1),
        }

    x, y = nhwc(ref["x"]), ref["y"]
    base = case.pyramid.stages[-1].patch
    for stage in range(len(case.pyramid)):
        t = np.full(len(x), ref["t"][stage], np.float32)
        ours = run(case.params, x, t, y, stage) | {"x_down": case.down(x, stage)}
        layout = case.shape_of(stage) | dict(p=base[0], q=base[1])
        ours["final_tokens"] = einops.rearrange(
            np.asarray(ours["final_tokens"]), "b n (p i q j o) -> b n (p q o i j)", **layout
        )
        for name, value in ours.items():
            yield Row(f"stage {stage} {name}", max_abs(value, ref[f"s{stage}_{name}"]), 2e-5)


def _interleave(case: Case, objective: FlowObjective, batch: int) -> np.ndarray:
    """Order that turns their contiguous stages into our strided pattern."""
    pattern = np.tile(objective.pattern, batch // len(objective.pattern))
    order = np.empty(batch, int)
    order[np.argsort(pattern, kind="stable")] = np.arange(batch)
    return order


def train(case: Case, ref: dict) -> Iterator[Row]:
    flow = Flow()
    objective = FlowObjective(case.pyramid, flow, case.config.null_label)
    order = _interleave(case, objective, len(ref["x1"]))
    x1, x0 = nhwc(ref["x1"])[order], nhwc(ref["x0"])[order]
    draws = Draws(x0, ref["t"][order], ref["y_used"][order])
    xt, velocity = paths.interpolate(paths.LINEAR, nhwc(ref["x0"]), nhwc(ref["x1"]), ref["t"])
    cuts = ref["stage_slices"]
    predictions = []
    for stage, (a, b) in enumerate(zip(cuts, cuts[1:])):
        yield Row(
            f"x_t stage {stage}", max_abs(case.down(xt[a:b], stage), ref[f"xt_s{stage}"]), 1e-5
        )
        yield Row(
            f"target stage {stage}",
            max_abs(case.down(velocity[a:b], stage), ref[f"ut_s{stage}"]),
            1e-5,
        )
        out = case.jitted(case.params, xt[a:b], ref["t"][a:b], ref["y_used"][a:b], stage)
        predictions.append(case.down(out, stage))
        theirs = ref[f"isolated_pred_s{stage}"]
        yield Row(f"isolated prediction stage {stage}", max_abs(predictions[-1], theirs), 1e-5)
    losses = jax.jit(lambda p: stage_losses(objective, case.apply, p, x1, draws))(case.params)
    losses = jnp.concatenate(losses)
    for name in ("isolated_loss", "isolated_loss_f64"):
        yield Row(name, relative(losses, ref[name]), 2e-6, "max rel")
    grads = gradients(case, objective, x1, draws)
    yield from gradient_rows(grads, ref, "isolated_grad:")
    if "isolated_gradnorm" in ref:
        for name, theirs in zip(ref["gradnorm_names"], ref["isolated_gradnorm"]):
            if name in grads:  # positions are constants here
                norm = np.linalg.norm(np.float64(grads[name]))
                yield Row(f"gradient norm {name}", relative(norm, theirs), 1e-5, "max rel")


def train_steps(case: Case, ref: dict) -> Iterator[Row]:
    objective = FlowObjective(case.pyramid, Flow(), case.config.null_label)
    tx = optax.adamw(
        float(ref["lr"]), *map(float, ref["betas"]), eps=float(ref["eps"]), weight_decay=0.0
    )
    params, opt_state = jax.tree.map(jnp.asarray, case.params), tx.init(case.params)
    order = _interleave(case, objective, ref["x1"].shape[1])

    @jax.jit
    def step(params, opt_state, x1, draws):
        loss, grads = jax.value_and_grad(
            lambda p: objective.loss(case.apply, p, {}, {"x": x1}, draws, {})[0]
        )(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in range(len(ref["loss"])):
        y = np.where(ref["drop_u"][i] < 0.1, case.config.null_label, ref["y"][i])
        draws = Draws(nhwc(ref["x0"][i])[order], ref["t"][i][order], y[order])
        params, opt_state, loss = step(params, opt_state, nhwc(ref["x1"][i])[order], draws)
        yield Row(f"loss of step {i}", relative(loss, ref["loss"][i]), 2e-6, "max rel")
    before, after = to_torch(case.config, case.params), to_torch(case.config, params)
    for key, theirs in ref.items():
        if key.startswith("delta:"):
            name = key.split(":", 1)[1]
            delta = np.abs((after[name] - before[name]) - theirs)
            # a gradient near zero can flip Adam's first step: 99.9 % of the entries count
            yield Row(
                f"change of {name}",
                float(np.quantile(delta, 0.999, method="higher")),
                2e-6,
                "99.9 %",
            )


def sit_train(case: Case, ref: dict) -> Iterator[Row]:
    x1, x0, y = nhwc(ref["x1"]), nhwc(ref["x0"]), ref["y_used"]
    for key, theirs in ref.items():
        if not key.startswith("loss_"):
            continue
        _, path, prediction, weighting = key.split("_")
        flow = Flow(path.lower(), prediction)
        weighting = weighting.replace("None", "none")
        objective = FlowObjective(case.pyramid, flow, case.config.null_label, weighting)
        (lo, hi) = objective.time_ranges[0]
        draws = Draws(x0, ref["u"] * np.float32(hi - lo) + np.float32(lo), y)
        (losses,) = jax.jit(lambda p, o=objective, d=draws: stage_losses(o, case.apply, p, x1, d))(
            case.params
        )
        yield Row(key, relative(losses, theirs), 2e-6, "max rel")
    objective = FlowObjective(case.pyramid, Flow(), case.config.null_label)
    draws = Draws(x0, ref["u"], y)
    yield from gradient_rows(gradients(case, objective, x1, draws), ref, "grad:")


def stage_losses(objective, apply, params, x1, draws):
    """Loss of every sample, by stage."""
    each = objective.predicted(apply, params, {}, {"x": x1}, draws)
    return tuple(map(objective.errors, *each))


def gradients(case: Case, objective: FlowObjective, x1, draws: Draws) -> dict[str, np.ndarray]:
    """Gradient of the mean loss under the PyTorch names and layouts."""
    loss = lambda p: objective.loss(case.apply, p, {}, {"x": x1}, draws, {})[0]
    return to_torch(case.config, jax.jit(jax.grad(loss))(case.params))


def gradient_rows(grads: dict[str, np.ndarray], ref: dict, prefix: str) -> Iterator[Row]:
    for key, theirs in ref.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            error = max_abs(grads[name], theirs) / np.max(np.abs(theirs))
            yield Row(f"gradient {name}", error, 1e-5, "of max")


def ode(case: Case, ref: dict) -> Iterator[Row]:
    n = len(ref["z"])
    z, y = jnp.asarray(nhwc(ref["z"])), jnp.asarray(ref["y"])
    scales = tuple(map(float, np.atleast_1d(ref["scales"])))

    def sampler(solver, steps, mode, grid="reference"):
        cfg = scales if mode == "cfg" else (1.0,)
        config = SamplerConfig(solver, steps, grid, cfg, GUIDED_CHANNELS)
        return Sampler(case.apply, case.config, Flow(), config)

    for key, theirs in ref.items():
        solver, *rest = key.split("_")
        kind = rest[-1] if rest else ""
        if solver in SOLVERS and kind in ("traj", "final"):
            points, mode = int(rest[0][1:]), rest[1]
            run = sampler(SOLVERS[solver], points, mode)
            states = run(case.params, z, y, trajectory=kind == "traj")
            if kind == "traj" and points == ref["n_sub"]:
                states = states[::5]
            theirs = theirs[..., :n, :, :, :]
            yield Row(key, max_abs(states, nhwc(theirs)), 2e-5)
        elif solver in SOLVERS and kind == "evals":
            segments = sampler(SOLVERS[solver], int(rest[0][1:]), rest[1]).segments
            ours = np.concatenate([_evaluation_times(SOLVERS[solver], s) for s in segments])
            yield Row(key, max_abs(ours, theirs), 2e-7)
    for mode in ("nocfg", "cfg"):
        if f"exact_{mode}" not in ref:
            continue
        exact = nhwc(ref[f"exact_{mode}"][:, :n])
        at = ref[f"exact_{mode}_at"]
        run = sampler("dopri5", 2, mode)
        states = run(case.params, z, y, trajectory=True)
        inner = states[1:] if len(at) == len(run.segments) else states[-1:]
        yield Row(f"dopri5 {mode} against the exact solution", max_abs(inner, exact), 0.15)
        if f"dopri5smooth_{mode}_traj" in ref:
            t0, t1 = np.float32(ref["smooth_t0_t1"])
            stage = case.pyramid.stage_at((t0 + t1) / 2)
            scale = run.config.scales(case.pyramid)[stage]
            (final, _), _ = run.compiled(
                run.start(z),
                Networks(case.params, None, y),
                Tables(np.float32([t0, t1]), np.float32([[scale]])),
                Facts("adaptive", (stage,), (scale != 1,)),
                None,
                0,
                None,
            )
            for name in ("traj", "f64_final"):
                theirs = ref[f"dopri5smooth_{mode}_{name}"]
                theirs = nhwc(theirs[-1] if name == "traj" else theirs)[:n]
                yield Row(f"dopri5smooth {mode} {name}", max_abs(final, theirs), 3e-2)
    if len(case.pyramid) == 1:
        for key, theirs in ref.items():
            # the float64 runs need the same step control, and ours is of every image alone
            if key.startswith("dopri5_") and key.endswith("traj"):
                run = sampler("dopri5", 2, "nocfg" if "nocfg" in key else "cfg")
                final = run(case.params, z, y)
                yield Row(key, max_abs(final, nhwc(theirs[-1])[:n]), 3e-2)


def _evaluation_times(solver: str, segment) -> np.ndarray:
    t = np.float32(segment.times)
    nodes = np.float32(ODE_SOLVERS[solver].nodes)
    return (t[:-1, None] + nodes[None] * np.diff(t)[:, None]).ravel()


def sde(case: Case, ref: dict) -> Iterator[Row]:
    b, n = len(ref["z"]), int(ref["n"])
    z, y = jnp.asarray(nhwc(ref["z"])), jnp.asarray(ref["y"])
    noise = jnp.asarray(nhwc(ref["noise"][:, :b]))
    for key, theirs in ref.items():
        method, *rest = key.split("_")
        if method not in ("Euler", "Heun"):
            continue
        if method == "Heun" and "None" in rest:
            continue  # NaN in the original
        form, *middle, mode, kind = rest
        norm, size = 1.0, float(ref["last_step_size"])
        last = middle[-1]
        if middle[0].startswith("norm"):
            norm, last, size = float(middle[0][4:]), "Mean", float(middle[1][4:])
        config = SamplerConfig(
            solver=f"sde-{method.lower()}",
            steps=n,
            grid="reference",
            cfg=tuple(map(float, np.atleast_1d(ref["scales"]))) if mode == "cfg" else (1.0,),
            cfg_channels=GUIDED_CHANNELS,
            diffusion=FORMS.get(form, form),
            diffusion_norm=norm,
            last_step=last.lower(),
            last_step_size=size,
        )
        run = Sampler(case.apply, case.config, Flow(), config)
        states = run(case.params, z, y, replay=noise, trajectory=True)[1:]
        if kind == "final":
            states = states[-1]
        elif len(theirs) != len(states):
            states = states[np.array([0, n // 2, n - 2, n - 1])]
        yield Row(key, max_abs(states, nhwc(theirs[..., :b, :, :, :])), 2e-5)


def likelihood(case: Case, ref: dict) -> Iterator[Row]:
    x, y = jnp.asarray(nhwc(ref["x"])), jnp.asarray(ref["y"])
    for key in ref:
        if not key.endswith("_logp"):
            continue
        run = key.removesuffix("_logp")
        solver, points = run.split("_n")
        config = SamplerConfig(SOLVERS[solver], int(points), "reference")
        probes = jnp.asarray(nhwc(ref[f"{run}_eps"]), jnp.float32)
        logp, z = log_likelihood(case.apply, case.config, Flow(), config, case.params, x, y, probes)
        yield Row(f"{run} z", max_abs(z, nhwc(ref[f"{run}_z"])), 1e-5)
        yield Row(f"{run} logp", relative(logp, ref[key]), 1e-6, "max rel")


def ops(ref: dict) -> Iterator[Row]:
    yield from _ops_layout(ref)
    for name, value in ref.items():
        if name.startswith("grid_") and not name.endswith("second"):
            points = int(name.removeprefix("grid_"))
            config = SamplerConfig("heun", points, "reference")
            times = [plan(config, p, Flow()) for p in (SIT, PPFLOW3)]
            for segments in times:
                ours = np.concatenate([[segments[0].times[0]], *(s.times[1:] for s in segments)])
                yield Row(name, max_abs(ours, value), 0)
            second = np.concatenate([_evaluation_times("heun", s)[1::2] for s in times[0]])
            yield Row(f"{name}_heun2_second", max_abs(second, ref[f"{name}_heun2_second"]), 0)
        if name.startswith("sdegrid_"):
            _, points, size = name.split("_")
            config = SamplerConfig(
                "sde-euler", int(points), "reference", last_step_size=float(size)
            )
            (segment, _) = plan(config, SIT, Flow())
            yield Row(name, max_abs(segment.times, value), 6e-8)
    yield Row("temb_256", max_abs(timestep_features(ref["temb_t"]), ref["temb_256"]), 2e-6)
    t, x, v = ref["path_t"], nhwc(ref["path_x"]), nhwc(ref["path_v"])
    for title in ("Linear", "GVP", "VP"):
        path = paths.PATHS[title.lower()]
        flow = {p: Flow(title.lower(), p) for p in paths.PREDICTIONS}
        ours = {
            "alpha": path.alpha(t),
            "d_alpha": path.d_alpha(t),
            "sigma": path.sigma(t),
            "d_sigma": path.d_sigma(t),
            "alpha_ratio": path.alpha_ratio(t),
            "driftvar": paths.score_coefficient(path, t)[:, None, None, None],
            "drift": np.moveaxis(-paths.expand(path.alpha_ratio(t)) * x, -1, 1),
            "score_from_v": np.moveaxis(paths.score_from(flow["velocity"], v, x, t), -1, 1),
            "v_from_score": np.moveaxis(paths.velocity_from(flow["score"], v, x, t), -1, 1),
            "noise_from_v": np.moveaxis(
                -paths.score_from(flow["velocity"], v, x, t) * paths.expand(path.sigma(t)), -1, 1
            ),
        }
        for form, function in DIFFUSIONS.items():
            key = {"sbdm": "SBDM", "increasing-decreasing": "inccreasing-decreasing"}.get(
                form, form
            )
            ours[f"diff_{key}_norm0.7"] = function(path, t, 0.7)[:, None, None, None]
        for name, value in ours.items():
            theirs = ref.get(f"path_{title}_{name}")
            if theirs is not None:
                scale = max(1.0, float(np.max(np.abs(theirs))))
                yield Row(f"{title} {name}", max_abs(value, theirs) / scale, 1e-5, "of max(1, |.|)")


def _ops_layout(ref: dict) -> Iterator[Row]:
    """Layouts of the PyTorch patch operations, through the key table's reordering."""
    x = nhwc(ref["x"])
    for name, (i, j) in {"down_square": (2, 2), "down_w": (1, 2)}.items():
        ours = einops.rearrange(x, "b (h i) (w j) c -> b (c i j) h w", i=i, j=j)
        yield Row(name, max_abs(ours, ref[name]), 0)
    pyramid = PPFLOW3
    config = ModelConfig(pyramid, 8, 4, 8, 1, 1, 1)
    table = {e.path: e for e in key_table(config)}
    for stage in range(3):
        tokens = ref[f"unpatchify_s{stage}_in"]
        entry = table[("unpatchify", stage, "bias")]
        ours = np.stack([[entry.ours(token) for token in row] for row in tokens])
        patch, grid = pyramid.stages[stage].patch, pyramid.grid(stage, config.latent_size)
        image = unpatchify(jnp.asarray(ours), grid, patch)
        i, j = patch[0] // 2, patch[1] // 2
        down = einops.rearrange(image, "b (h i) (w j) c -> b (c i j) h w", i=i, j=j)
        yield Row(f"unpatchify stage {stage}", max_abs(down, ref[f"unpatchify_s{stage}_out"]), 0)
    for name, size, width in (("B", 32, 768), ("XL", 32, 1152), ("XL512", 64, 1152)):
        for stage in range(3):
            ours = positions(pyramid, stage, size, width)
            shape = ref[f"pos_{name}_s{stage}_shape"]
            yield Row(f"pos {name} {stage} shape", max_abs(ours.shape, shape[-2:]), 0)
            theirs = ref[f"pos_{name}_s{stage}_slice_17_37"]
            yield Row(f"pos {name} {stage}", max_abs(ours[::17, ::37], theirs), 1e-6)


def crops(ref: dict) -> Iterator[Row]:
    for name in ref:
        if name.startswith("image"):
            k = name.removeprefix("image")
            ours = center_crop(np.asarray(ref[name]), int(ref[f"size{k}"]))
            yield Row(f"crop {k}", max_abs(ours, ref[f"crop{k}"]), 0)


CHECKS = {
    "forward": forward,
    "cfg": guidance,
    "intermediates": intermediates,
    "train": train,
    "train_steps_isolated": train_steps,
    "ode": ode,
    "sde": sde,
    "likelihood": likelihood,
}


def groups(folder: Path) -> dict[str, Callable[[], Iterator[Row]]]:
    """Comparisons that the files in `folder` allow, by the file they read."""

    def of_model(name: str, file: str) -> Iterator[Row]:
        case = case_of(folder / name)
        check = sit_train if (name, file) == ("sit", "train") else CHECKS[file]
        return check(case, case.load(file))

    found = {}
    for name in MODELS:
        if (folder / name / "model.safetensors").exists():
            found[f"{name}/pos_embed"] = lambda name=name: embeddings(case_of(folder / name))
        for file in CHECKS:
            if (folder / name / f"{file}.npz").exists():
                found[f"{name}/{file}"] = lambda name=name, file=file: of_model(name, file)
    for name, check in {"ops": ops, "data": crops}.items():
        file = folder / f"{name}.npz"
        if file.exists():
            found[name] = lambda check=check, file=file: check(load(file))
    return found


def embeddings(case: Case) -> Iterator[Row]:
    for key, value in case.state.items():
        if key.startswith("pos_embed"):
            stage = int(key.rsplit(".", 1)[1]) if "." in key else 0
            ours = positions(case.pyramid, stage, case.config.latent_size, case.config.width)
            yield Row(key, max_abs(ours, value[0]), 1e-6)


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not Path(argv[1]).is_dir():
        print("usage: python -m tests.acceptance.parity DIR   (laid out like tests/reference)")
        return 2
    with jax.default_matmul_precision("highest"):
        return report(
            replace(row, name=f"{name}: {row.name}")
            for name, check in groups(Path(argv[1])).items()
            for row in check()
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
