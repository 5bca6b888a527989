"""Compiles the XL training step and sampler for TPU slices, and writes docs/scaling.md.

    pip install libtpu
    python -m benchmarks.scaling_table [--only=v5e:4x4]

No TPU is needed and none is measured. Every row takes one to ten minutes of one core; finished
rows are kept in docs/scaling.json, so that the command continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

from ppflow_jax.cost.dry_run import Report, dry_run
from ppflow_jax.cost.report_text import text
from ppflow_jax.cost.targets import Target
from ppflow_jax.files.disk import atomic

DOCS = Path(__file__).parents[1] / "docs"
# (slice, global batch); every chip gets whole stage patterns: 2 images at 2 levels, 4 at 3
SLICES = [
    ("v5e:4x4", 256),
    ("v5e:16x16", 1024),
    ("v6e:16x16", 4096),
    ("v5p:8x8x16", 4096),
    ("v5p:2x2x4", 256),
    ("v5e:16x16", 4096),
]
CONFIGS = {"ppflow_xl2": "XL, 2 levels", "ppflow_xl3": "XL, 3 levels"}
FSDP = 16


def compiled(name: str, topology: str, batch: int) -> dict:
    """One row: the numbers of a dry run."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.batch_size = batch
    config.model.remat = "dots"
    config.mesh.fsdp = FSDP
    config.sample.count = 16
    start = time.monotonic()
    report = dry_run(config, Target.parse(f"tpu:{topology}"))
    print(text(report), flush=True)
    return row(report) | {"compile_s": round(time.monotonic() - start)}


def row(report: Report) -> dict:
    programs = []
    for program in report.programs:
        programs.append(
            {
                "name": program.name,
                "flops": program.flops,
                "temporaries": program.temporaries,
                "limits_s": report.seconds(program),
                "collectives": report.causes(program),
                "failure": program.failure,
            }
        )
    return {
        "mesh": dict(report.mesh.shape),
        "parameters": report.parameters,
        "parts": report.parts,
        "peak": report.peak,
        "misfit": report.misfit,
        "programs": programs,
    }


def times(limits: dict[str, float]) -> tuple[float, float]:
    """Seconds of one run if transfers hide behind work, and if none do."""
    work = max(limits["compute"], limits["memory"])
    return max(work, limits["links"]), work + limits["links"]


def table(rows: dict[str, dict], which: int) -> list[str]:
    lines = [
        "| model | slice | batch | mesh (data x fsdp) | state / peak GB a chip | fits | TFLOPs | "
        "sent a chip: weights, gradients, other | compute / HBM / links ms | images/s | of peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, value in rows.items():
        name, topology, batch = key.split()
        program = value["programs"][which]
        size = int(program["name"].split()[2]) if which else int(batch)
        state = sum(v for k, v in value["parts"].items() if k != "batch")
        start = f"| {CONFIGS[name]} | {topology} | {size} | {value['mesh']['data']} x "
        start += f"{value['mesh']['fsdp']} | {state / 1e9:.2f} / "
        if program["failure"]:
            lines.append(f"{start}- | no: {program['failure']} | | | | | |")
            continue
        sent = {"weights": 0.0, "gradients": 0.0, "other": 0.0}
        for cause, _, _, _, amount in program["collectives"]:
            kind = next((k for k in ("weights", "gradients") if cause.startswith(k)), "other")
            sent[kind] += amount
        limits = program["limits_s"]
        best, worst = times(limits)
        lines.append(
            start + f"{value['peak'] / 1e9:.2f} | {'no' if value['misfit'] else 'yes'} | "
            f"{program['flops'] / 1e12:,.0f} | "
            + ", ".join(f"{v / 1e9:.2f} GB" for v in sent.values())
            + " | "
            + " / ".join(f"{1e3 * v:.1f}" for v in limits.values())
            + f" | {size / worst:,.0f} to {size / best:,.0f} | "
            f"{limits['compute'] / worst:.0%} to {limits['compute'] / best:.0%} |"
        )
    return lines


def efficiency(rows: dict[str, dict]) -> list[str]:
    """Training images/s a chip against the slice of 16 chips of the same kind."""
    lines = ["| model | from | to | images/s a chip kept |", "|---|---|---|---|"]
    rates = {}
    for key, value in rows.items():
        name, topology, batch = key.split()
        program, chips = value["programs"][0], value["mesh"]["data"] * value["mesh"]["fsdp"]
        if not program["failure"]:
            best, worst = times(program["limits_s"])
            rates[name, topology, batch] = (
                chips,
                int(batch) / chips / worst,
                int(batch) / chips / best,
            )
    for (name, topology, batch), (chips, *ends) in rates.items():
        for (other, base, first), (count, *starts) in rates.items():
            same = other == name and base.split(":")[0] == topology.split(":")[0]
            if same and count == 16 and chips > 16:
                kept = " to ".join(f"{b / a:.0%}" for a, b in zip(starts, ends))
                lines.append(
                    f"| {CONFIGS[name]} | {base}, batch {first} | {topology}, batch {batch} | "
                    f"{kept} |"
                )
    return lines


def document(rows: dict[str, dict]) -> str:
    others: dict[str, float] = {}
    for value in rows.values():
        for program in value["programs"]:
            for cause, kind, _, _, sent in program["collectives"]:
                if cause.startswith("unexplained"):
                    name = f"{kind} ({cause.removeprefix('unexplained: ') or 'no name'})"
                    others[name] = max(others.get(name, 0.0), sent)
    found = "; ".join(f"{k}, {v / 1e3:,.1f} kB" for k, v in sorted(others.items())) or "none"
    return "\n".join(
        [
            "# Scaling, by estimate",
            "",
            "**Nothing here was measured on a TPU.** `python -m benchmarks.scaling_table` compiled",
            "every row ahead of time with libtpu for the real topology. Memory and collectives are",
            "the compiler's; FLOPs are by formula (`models/flops.py`); times are what the",
            "published peak FLOP/s, HBM and link bandwidth (`cost/chips.py`) allow at best: `A",
            "to B` is from transfers that wait for the work to transfers hidden behind it. Real",
            "steps are slower.",
            "",
            f"Float32 state, bfloat16 products, `config.model.remat=dots`, fsdp {FSDP}, no tensor",
            "parallelism. What is sent is gathered weights, summed gradients, scalars and labels,",
            f"except, with the most that a chip sends in one run: {found}.",
            "",
            "## Training step",
            "",
            *table(rows, 0),
            "",
            "## Sampler",
            "",
            "Heun, 50 intervals, guidance everywhere, one image a chip; weights stay split and are",
            "gathered for every evaluation, which a larger batch would spread over more images.",
            "",
            *table(rows, 1),
            "",
            "## From 16 chips to more",
            "",
            "Images/s a chip of the training step, by the same limits.",
            "",
            *efficiency(rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="slices whose name contains this")
    only = parser.parse_args().only
    cache = DOCS / "scaling.json"
    rows = json.loads(cache.read_text()) if cache.exists() else {}
    wanted = [f"{name} {s} {batch}" for s, batch in SLICES for name in CONFIGS if only in s]
    for key in wanted:
        if key not in rows:
            print(f"== {key}", flush=True)
            name, topology, batch = key.split()
            rows[key] = compiled(name, topology, int(batch))
            with atomic(cache) as temporary:
                temporary.write_text(json.dumps(rows, indent=1) + "\n")
        with atomic(DOCS / "scaling.md") as temporary:
            temporary.write_text(document(rows))


if __name__ == "__main__":
    main()
