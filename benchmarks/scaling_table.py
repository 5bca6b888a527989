"""Compiles the XL training step and sampler for TPU slices, and writes docs/scaling.md.

    pip install 'jax[tpu]'
    python -m benchmarks.scaling_table [--only=v5e:4x4]

No TPU is needed and none is measured. Every row takes about a minute of one core; finished rows
are kept in docs/scaling.json, so that the command continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import textwrap
import time
from pathlib import Path

from ppflow_jax.cost.dry_run import Report, dry_run
from ppflow_jax.cost.report_text import text
from ppflow_jax.cost.targets import Target
from ppflow_jax.files.disk import atomic

DOCS = Path(__file__).parents[1] / "docs"
# (slice, global batch, fsdp where weights are gathered once); every device gets whole stage
# patterns: 2 images at 2 levels, 4 at 3
SIZES = [
    ("v5e:4x4", 256, 8),
    ("v5e:16x16", 1024, 16),
    ("v5e:16x16", 4096, 16),
    ("v6e:16x16", 4096, 16),
    ("v5p:2x2x4", 256, 8),
    ("v5p:8x8x16", 4096, 16),
    ("tpu7x:2x2x2", 256, 8),
    ("tpu7x:4x4x4", 1024, 16),
    ("tpu7x:8x8x8", 4096, 16),
]
CONFIGS = {"ppflow_xl2": "XL, 2 levels", "ppflow_xl3": "XL, 3 levels"}
IN_TURN = (16, 3)  # fsdp and stage of ZeRO: blocks gathered in turn
AIM = 0.45  # of peak FLOP/s
LAYOUTS = {3: "in turn", 2: "once"}


def keys() -> list[str]:
    """Of all rows: what is compiled, and how weights are gathered."""
    return [
        f"{name} {topology} {batch} fsdp={fsdp} zero={zero}"
        for topology, batch, wide in SIZES
        for name in CONFIGS
        for fsdp, zero in (IN_TURN, (wide, 2))
    ]


def parts(key: str) -> tuple[str, str, int, int, int]:
    """Configuration, slice, batch, fsdp and stage of ZeRO of a row."""
    name, topology, batch, fsdp, zero = key.split()
    return name, topology, int(batch), int(fsdp.split("=")[1]), int(zero.split("=")[1])


def compiled(key: str) -> dict:
    """One row: the numbers of a dry run."""
    name, topology, batch, fsdp, zero = parts(key)
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.batch_size = batch
    config.model.remat = "dots"
    config.mesh.update(fsdp=fsdp, zero=zero)
    config.sample.count = 16
    start = time.monotonic()
    report = dry_run(config, Target.parse(f"tpu:{topology}"))
    print(text(report), flush=True)
    return row(report) | {"compile_s": round(time.monotonic() - start)}


def row(report: Report) -> dict:
    programs = []
    chip, shape = report.target.chip, report.target.shape
    one_ring = chip.sending_rate(shape, [int(shape.split("x")[0]), 1, 1])
    for program in report.programs:
        sent, limits = sum(c.sent for c in program.network), report.seconds(program)
        programs.append(
            {
                "name": program.name,
                "flops": program.flops,
                "temporaries": program.temporaries,
                "limits_s": limits | {"links": sent / one_ring},
                "all_links_s": limits["links"],
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


def reached(rows: dict[str, dict]) -> list[str]:
    """Which rows of weights gathered once come to 45% of peak, if transfers hide behind work."""
    short, good = [], 0
    for key, value in rows.items():
        name, topology, batch, _, zero = parts(key)
        program = value["programs"][0]
        if zero == 3 or program["failure"]:
            continue
        best, _ = times(program["limits_s"])
        of_peak = program["limits_s"]["compute"] / best
        if of_peak >= AIM:
            good += 1
        else:
            short.append(f"{CONFIGS[name]} {topology} batch {batch} {of_peak:.1%}")
    text = f"With weights gathered once, {AIM:.0%} of peak are within reach of {good} of "
    text += f"{good + len(short)} rows, if transfers hide behind work. Not of: "
    return [*textwrap.wrap(text + ("; ".join(short) or "none") + ".", 90), ""]


def times(limits: dict[str, float]) -> tuple[float, float]:
    """Seconds of one run if transfers hide behind work, and if none do."""
    work = max(limits["compute"], limits["memory"])
    return max(work, limits["links"]), work + limits["links"]


def table(rows: dict[str, dict], which: int) -> list[str]:
    lines = [
        "| model | slice | batch | mesh (data x fsdp) | weights | "
        "state / peak GB a device | fits | TFLOPs | sent a device: weights, gradients, other | "
        "compute / HBM / links ms | images/s | of peak | of peak, all links |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, value in rows.items():
        name, topology, batch, fsdp, zero = parts(key)
        program = value["programs"][which]
        size = int(program["name"].split()[2]) if which else batch
        state = sum(v for k, v in value["parts"].items() if k != "batch")
        start = f"| {CONFIGS[name]} | {topology} | {size} | {value['mesh']['data']} x "
        start += f"{fsdp} | {LAYOUTS[zero]} | {state / 1e9:.2f} / "
        if program["failure"]:
            lines.append(f"{start}- | no: {program['failure']} | | | | | | |")
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
            + f" | {size / worst:,.0f} to {size / best:,.0f} | {share(limits)} | "
            + (share(limits | {"links": found}) if (found := program.get("all_links_s")) else "-")
            + " |"
        )
    return lines


def share(limits: dict[str, float]) -> str:
    """Of peak FLOP/s."""
    best, worst = times(limits)
    return f"{limits['compute'] / worst:.0%} to {limits['compute'] / best:.0%}"


def efficiency(rows: dict[str, dict]) -> list[str]:
    """Training images/s a device against the slice of 16 devices of the same kind."""
    lines = ["| model | from | to | images/s a device kept |", "|---|---|---|---|"]
    rates = {}
    for key, value in rows.items():
        name, topology, batch, _, zero = parts(key)
        if zero != 2:
            continue
        program, chips = value["programs"][0], value["mesh"]["data"] * value["mesh"]["fsdp"]
        if not program["failure"]:
            best, worst = times(program["limits_s"])
            rates[name, topology, batch] = (
                chips,
                batch / chips / worst,
                batch / chips / best,
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
            "Float32 state, bfloat16 products, `config.model.remat=dots`, no tensor parallelism.",
            "Weights are gathered block by block, twice a step (`in turn`, `config.mesh.zero=3`,",
            "as earlier versions did), or once a step (`once`, `zero=2`: see [Pods](pods.md)),",
            "over groups of `fsdp` devices. `Links` counts one axis of the slice, as one ring has",
            "it; `all links` counts every axis that a group spans (`cost/chips.py`). A chip of",
            "TPU7x is two devices.",
            "",
            "Where one group is the whole slice (16 of 16), XLA sums gradients by moving parts",
            "round, which sends two to three times as much: two groups of 8 send less.",
            "",
            *textwrap.wrap(
                "What is sent is gathered weights, summed gradients, scalars and labels, except, "
                f"with the most that a device sends in one run: {found}. It does not grow with the "
                "batch, as the work does: with four times the images a device, four times the "
                "share of peak, until the work takes longer than the transfers.",
                90,
            ),
            "",
            *reached(rows),
            "## Training step",
            "",
            *table(rows, 0),
            "",
            "## Sampler",
            "",
            "Heun, 50 intervals, guidance everywhere, one image a chip. Sample grids gather the",
            "weights once, whatever `config.mesh.zero` is, if these take at most a quarter of the",
            "memory; `in turn` is what earlier versions did, and what is done if they take more.",
            "",
            *table(rows, 1),
            "",
            "## From 16 chips to more",
            "",
            "Images/s a device of the training step, weights gathered once, by the same limits.",
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
    for key in keys():
        if key not in rows and only in key:
            print(f"== {key}", flush=True)
            rows[key] = compiled(key)
            rows = {key: rows[key] for key in keys() if key in rows}
            with atomic(cache) as temporary:
                temporary.write_text(json.dumps(rows, indent=1) + "\n")
    with atomic(DOCS / "scaling.md") as temporary:
        temporary.write_text(document(rows))


if __name__ == "__main__":
    main()
