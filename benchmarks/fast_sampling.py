"""Every way to sample faster on one axis of time, beside simply taking fewer steps.

    python -m benchmarks.fast_sampling --runs=RUN,... --features=DIR --reference=DATA --out=DIR \
        [--decode=taesd:DIR] [--cfg=2] [--steps=24] [--num=1024] [--seeds=3] [--docs=FILE.md]

RUN are trained workdirs; the one with a single stage is SiT, against which times and FLOPs are
given. Every row is timed at batch 1 and 64 (all rows in turn, in every round; medians of the ratio
to SiT of the same round), its samples are compared with those of 250 Heun steps from the same
noise under the same guidance (relative root mean square), and judged by `evaluate`'s FID in the
features given; rows are compared by the FID of the first noise seed, which all of them have. A
table, fast_sampling.png and rows.json; rows that are in rows.json already are not judged again,
and plans of `ppflow tune` that are in DIR not fitted again.
--docs: table and picture also there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import ppflow_jax as pf
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.checkpoints.weights import load_weights
from ppflow_jax.console import progress
from ppflow_jax.data.images import array_images
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.devices.sharding import local_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.multistep import MULTISTEP
from ppflow_jax.flow.plan import FITTED, SamplerConfig
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.generate.plan import Plan
from ppflow_jax.metrics.evaluator import Evaluator, open_reference
from ppflow_jax.metrics.networks import load_features
from ppflow_jax.models.network import make_apply
from ppflow_jax.systems.accelerate import PRESETS, AccelerateConfig, accelerated, with_preset
from ppflow_jax.tune.asked import ROUTER, Asked
from ppflow_jax.tune.command import tune

BATCH = 64
PLANS = (5, 6, 8, 12)  # evaluations of tuned plans
SHARES = (0.5, 0.3)  # of the branches of all steps that HarmoniCa computes
TRACED = 16  # images whose error is measured
METHODS = ("forecast", "merge", "preset", "plan", "router")  # what has to beat plain steps
SEEDED = ("plain", "guidance", "preset", "plan", "router")  # judged with every noise seed
PLAIN, FREE = "guided everywhere", "exact: coarse stage unguided"


@dataclass(frozen=True)
class Setting:
    """A row of the table for one model."""

    name: str
    kind: str  # plain, fewer, multistep, guidance, forecast, merge, preset, plan or router
    solver: str
    steps: int  # of a plan: its evaluations
    scales: str  # "all" or "free": the coarsest of several stages unguided
    accelerate: str = "exact"
    share: float | None = None  # of a router


def settings(steps: int, levels: int, depth: int) -> list[Setting]:
    """What is compared for a model with `levels` stages."""
    free = "free" if levels > 1 else "all"
    found = [Setting(PLAIN, "plain", "euler", steps, "all")]
    if levels > 1:
        found.append(Setting(FREE, "guidance", "euler", steps, "free"))
    else:
        found.append(
            Setting("guided for t > 0.5", "guidance", "euler", steps, "all", "guidance=0.5-1")
        )
    for solver, part in (("euler", (3 / 4, 1 / 2, 1 / 3, 1 / 4)), ("heun", (1 / 2, 1 / 4, 1 / 6))):
        for share in part:
            n = round(steps * share)
            found.append(Setting(f"{solver.capitalize()} {n}", "fewer", solver, n, free))
    for solver in MULTISTEP:
        for n in (steps // 2, steps // 3):
            found.append(Setting(f"{solver} {n}", "multistep", solver, n, free))
    third = f"{depth // 3}-{2 * depth // 3}"
    for name, keys in {
        "FORA, interval 2": ".order=0,.schedule=fora,.interval=2",
        "FORA, interval 4": ".order=0,.schedule=fora,.interval=4",
        "TaylorSeer, interval 2, order 1": ".interval=2,.order=1",
        "TaylorSeer, interval 3, order 1": ".interval=3,.order=1",
        "TaylorSeer, interval 4, order 2": ".interval=4,.order=2",
        "HiCache, interval 3, order 2": "=hermite,.interval=3,.order=2",
        "polynomial, interval 3, order 1": "=newton,.interval=3,.order=1",
        "Adams-Bashforth 2, interval 2": "=adams,.place=velocity,.interval=2,.order=1",
        "DeepCache, middle third": f".place=blocks,.blocks={third},.interval=2,.order=0",
    }.items():
        text = ",".join(f"forecast{key}" for key in keys.split(","))
        found.append(Setting(name, "forecast", "euler", steps, free, text))
    for name in ("SDTM", "ToMe"):
        text = f"merge={name.lower()},merge.round_to=1,merge.plateaus=64"
        found.append(Setting(name, "merge", "euler", steps, free, text))
    for name in PRESETS:
        if name != "exact":
            found.append(Setting(f"preset {name}", "preset", "euler", steps, free, name))
    for n in PLANS:
        found.append(Setting(f"tuned plan of {n}", "plan", FITTED, n, free))
    for share in SHARES:
        name = f"HarmoniCa, {share:g} of {steps} steps"
        found.append(Setting(name, "router", FITTED, steps, free, share=share))
    return found


class Model:
    """A run's EMA weights and how they are sampled."""

    def __init__(self, run: str, cfg: float, decode: str, out: Path):
        folder, self.run_folder, self.out = find_checkpoint(run), run, out
        self.card: Card = read_card(folder)
        self.model = self.card.model
        levels = len(self.model.pyramid)
        self.name = "SiT" if levels == 1 else f"{levels} levels"
        self.levels, self.cfg = levels, cfg
        self.apply = make_apply(self.model)
        self.params = load_weights(folder, self.card, local_mesh())
        self.decoder = Decoder.parse(decode, self.card).on(local_mesh())
        self.labels = jnp.arange(BATCH, dtype=jnp.int32) % self.model.num_classes
        self._exact: dict[tuple, Any] = {}

    def sampler(self, s: Setting) -> Sampler:
        scales = (self.cfg,) * self.levels
        if s.scales == "free":
            scales = (1.0, *scales[1:])
        if s.kind in ("plan", "router"):
            plan = self.plan(s, scales)
            given = self.model, self.card.flow, plan.config
            return Sampler(self.apply, *given, segments=plan.segments)
        config = SamplerConfig(s.solver, s.steps, cfg=scales)
        config = with_preset(config, s.accelerate, self.model)
        segments = accelerated(
            config, self.model, self.card.flow, AccelerateConfig.parse(s.accelerate)
        )
        return Sampler(self.apply, self.model, self.card.flow, config, segments=segments)

    def plan(self, s: Setting, scales: tuple[float, ...]) -> Plan:
        """A tuned plan, made unless it is there."""
        name, asked = str(s.steps), {"evaluations": s.steps}
        if s.kind == "router":
            name = f"harmonica-{s.steps}-{s.share:g}"
            asked = {"forecast": ROUTER, "steps": s.steps, "share": s.share}
        file = self.out / f"{self.name.replace(' ', '-')}-{name}.json"
        model = pf.load(self.run_folder)
        if not file.exists():
            tune(model, Asked(str(file), scales, **asked))
        return model.plan(file)

    def run(self, sampler: Sampler):
        """A compiled (noise, labels) -> latents."""
        whole = jax.jit(lambda params, x, y: sampler(params, x, y))

        def call(noise, labels):
            with jax.default_matmul_precision("highest"):
                return whole(self.params, noise, labels)

        return call

    def noise(self, seed: int, first: int) -> jax.Array:
        ids = np.arange(first, first + BATCH, dtype=np.int32)
        return image_noise(seed, ids, self.model.shape)[0]

    def exact(self, s: Setting) -> np.ndarray:
        """250 Heun steps under the guidance of a setting."""
        kind = "guidance=0.5-1" if s.accelerate == "guidance=0.5-1" else "exact"
        if (s.scales, kind) not in self._exact:
            fine = Setting("", "", "heun", 250, s.scales, kind)
            run = self.run(self.sampler(fine))
            first = self.noise(0, 0)[:TRACED], self.labels[:TRACED]
            self._exact[s.scales, kind] = np.asarray(run(*first))
        return self._exact[s.scales, kind]


def judge(model: Model, s: Setting, run, evaluator: Evaluator, num: int, seeds: int) -> dict:
    """Trajectory error and FID, of several noise seeds for the plain rows."""
    fids, error = [], 0.0
    for seed in range(seeds if s.kind in SEEDED else 1):
        pictures = []
        for first in range(0, num, BATCH):
            labels = jnp.asarray((first + np.arange(BATCH)) % model.model.num_classes, jnp.int32)
            latents = np.asarray(run(model.noise(seed, first), labels))
            if seed == first == 0:
                exact = model.exact(s)
                difference = latents[:TRACED] - exact
                error = float(np.sqrt(np.mean(difference**2) / np.mean(exact**2)))
            pictures.append(model.decoder.pictures(latents, 16))
        samples = array_images(f"{num} of {model.name}", np.concatenate(pictures)[:num])
        fids.append(evaluator(samples)["metrics"]["fid"])
    return {"error": error, "fid": fids}


def timed(runs: dict[tuple, Any], base: tuple, rounds: int) -> dict[tuple, float]:
    """Median over rounds of every run's time by that of `base` in the same round."""
    for run in runs.values():
        run().block_until_ready()
    seconds: dict[tuple, list[float]] = {key: [] for key in runs}
    with progress(rounds * len(runs), 0, "run", "time") as bar:
        for _ in range(rounds):
            for key, run in runs.items():
                start = time.perf_counter()
                run().block_until_ready()
                seconds[key].append(time.perf_counter() - start)
                bar.update(1)
    return {
        key: statistics.median(a / b for a, b in zip(spent, seconds[base]))
        for key, spent in seconds.items()
    } | {"seconds": statistics.median(seconds[base])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=lambda text: text.split(","), required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--size", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--decode", default="none")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--num", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_scratch()
    args.out.mkdir(parents=True, exist_ok=True)
    network = load_features(args.features, "tf1")
    evaluator = Evaluator(network, open_reference(args.reference, args.size), ("fid",))
    models = [Model(run, args.cfg, args.decode, args.out) for run in args.runs]
    if [m.levels for m in models].count(1) != 1:
        raise InputError("exactly one of --runs must have a single stage: SiT, the base of ratios")
    store = args.out / "rows.json"
    rows = json.loads(store.read_text()) if store.exists() else {}
    one, many, table = {}, {}, []
    for model in models:
        first, second = model.noise(0, 0)[:1], model.noise(0, 0)
        for s in settings(args.steps, model.levels, model.model.depth):
            sampler = model.sampler(s)
            run = model.run(sampler)
            key = f"{model.name} | {s.name} | {s.accelerate}"
            if key not in rows:
                rows[key] = judge(model, s, run, evaluator, args.num, args.seeds)
                with atomic(store) as temporary:
                    temporary.write_text(json.dumps(rows, indent=1))
            flops = sampling_flops(model.model, sampler.segments)
            table.append(
                {"key": key, "model": model.name, **asdict(s), "flops": flops, **rows[key]}
            )
            one[key] = lambda run=run, x=first, y=model.labels[:1]: run(x, y)
            many[key] = lambda run=run, x=second, y=model.labels: run(x, y)
            print(f"{key}: {rows[key]}", flush=True)
    base = next(r for r in table if r["model"] == "SiT" and r["kind"] == "plain")
    ratios = [timed(runs, base["key"], args.rounds) for runs in (one, many)]
    for row in table:
        row["latency1"], row["latency64"] = (r[row["key"]] for r in ratios)
        row["share"] = row["flops"] / base["flops"]
    text = markdown(table, base, [r["seconds"] for r in ratios], args)
    print(text)
    (args.out / "table.md").write_text(text)
    (args.out / "table.json").write_text(json.dumps(table, indent=1))
    plot(table, args.out / "fast_sampling.png")
    if args.docs:
        picture = args.docs.with_suffix(".png")
        plot(table, picture)
        args.docs.write_text(f"# Fast sampling, measured\n\n{text}\n![]({picture.name})\n")


def rival(row: dict, table: list[dict], measure: str) -> float:
    """The best value of plain steps of the same model, of any solver, that take no longer."""
    kinds = ("fewer", "multistep")
    plain = [r for r in table if r["model"] == row["model"] and r["kind"] in kinds]
    fast = [r for r in plain if r["latency64"] <= 1.02 * row["latency64"]]
    return min(_value(r, measure) for r in fast) if fast else float("inf")


def _value(row: dict, measure: str) -> float:
    return row["fid"][0] if measure == "fid" else row[measure]


def markdown(table: list[dict], base: dict, seconds: list[float], args) -> str:
    """The table; its first lines say where fewer steps win."""
    methods = [r for r in table if r["kind"] in METHODS]
    lost = {m: [r for r in methods if rival(r, table, m) <= _value(r, m)] for m in ("error", "fid")}
    lines = [
        f"**Plain steps of some solver, at the same latency or less, have the lower trajectory "
        f"error in {len(lost['error'])} of {len(methods)} rows of accelerators and plans and the "
        f"lower FID in {len(lost['fid'])}** (marked >).",
        "",
        f"`python -m benchmarks.fast_sampling --steps={args.steps} --cfg={args.cfg:g} "
        f"--num={args.num} --seeds={args.seeds}` on {jax.devices()[0].device_kind}; SiT takes "
        f"{seconds[0]:.3g} s for 1 image and {seconds[1]:.3g} s for {BATCH}. Times and FLOPs are "
        f"shares of SiT's with {args.steps} Euler steps guided everywhere; error is that against "
        f"250 Heun steps; FID is in the features of `--features`, of {args.num} samples from the "
        f"same noise in all rows (in parentheses the range over {args.seeds} noise seeds). One "
        "training run of each model.",
        "",
        "| model | setting | FLOPs | time, batch 1 | time, batch 64 | error | FID |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in table:
        marks = {m: "> " if r in lost[m] else "" for m in lost}
        fid = f"{_value(r, 'fid'):.3f}"
        if len(r["fid"]) > 1:
            fid += f" ({min(r['fid']):.3f} to {max(r['fid']):.3f})"
        name = r["name"] + (f" `{r['accelerate']}`" if r["kind"] in ("forecast", "merge") else "")
        lines.append(
            f"| {r['model']} | {name} | {r['share']:.1%} | {r['latency1']:.1%} | "
            f"{r['latency64']:.1%} | {marks['error']}{r['error']:.4f} | {marks['fid']}{fid} |"
        )
    lines += ["", *verdicts(table)]
    return "\n".join(lines) + "\n"


def verdicts(table: list[dict]) -> list[str]:
    """Whether something is four times as fast as SiT and within the spread of plain sampling."""
    lines = []
    for model in dict.fromkeys(r["model"] for r in table if r["model"] != "SiT"):
        plain = next(r for r in table if r["model"] == model and r["kind"] == "plain")
        good = [
            r
            for r in table
            if r["model"] == model
            and r["latency64"] <= 0.25
            and _value(r, "fid") <= max(plain["fid"])
        ]
        names = ", ".join(f"{r['name']} ({1 / r['latency64']:.2f}x)" for r in good)
        lines.append(
            f"{model}, at least 4x faster than SiT at batch 64 with a FID within the spread of "
            f"plain sampling ({min(plain['fid']):.3f} to {max(plain['fid']):.3f} over noise "
            f"seeds): {names or 'none'}."
        )
    return lines


def plot(table: list[dict], path: Path) -> None:
    """FID and trajectory error against latency at batch 64."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    markers = {
        "plain": "*", "guidance": "P", "fewer": "o", "multistep": "x", "forecast": "^",
        "merge": "v", "preset": "D", "plan": "X", "router": "h",
    }  # fmt: skip
    models = list(dict.fromkeys(r["model"] for r in table))
    for axis, measure in zip(axes, ("fid", "error")):
        for i, model in enumerate(models):
            mine = sorted((r for r in table if r["model"] == model), key=lambda r: r["latency64"])
            fewer = [r for r in mine if r["kind"] in ("fewer", "plain")]
            for solver, line in (("euler", "-"), ("heun", ":")):
                part = [r for r in fewer if r["solver"] == solver]
                points = [r["latency64"] for r in part], [_value(r, measure) for r in part]
                axis.plot(*points, line, color=f"C{i}", alpha=0.6, lw=1)
            for r in mine:
                axis.plot(
                    r["latency64"], _value(r, measure), markers[r["kind"]], color=f"C{i}",
                    ms=7 if r["kind"] != "fewer" else 4,
                )  # fmt: skip
        axis.set(xlabel="time of a batch of 64, SiT = 1", xscale="log")
        if measure == "fid":
            axis.set_ylabel("FID")
        else:
            axis.set(ylabel="error against 250 Heun steps", yscale="log")
        axis.grid(alpha=0.3, which="both")
    for i, model in enumerate(models):
        axes[0].plot([], [], "s", color=f"C{i}", label=model)
    for kind, marker in markers.items():
        if any(r["kind"] == kind for r in table):
            label = "fewer steps (line: Euler, dots: Heun)" if kind == "fewer" else kind
            axes[0].plot([], [], marker, color="gray", label=label)
    figure.tight_layout()
    figure.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=5)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
