"""The study's table, claims, plots and grid, from what its runs left on disk."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from ppflow_jax.data.save import save_png
from ppflow_jax.files.disk import atomic
from ppflow_jax.metrics.evaluator import NOT_COMPARABLE
from ppflow_jax.report.page import page
from ppflow_jax.report.run import open_runs
from ppflow_jax.train.validate import EVALUATIONS
from study.rows import CLAIMS, ROWS, Claim, Guidance

SHOWN = 10  # samples of every row in the grid
CONFIDENCE = 0.9
PLAIN = ("levels2", "levels3")  # rows that tuned plans of others are compared with
MARKERS = {"one": "o", "stages": "^"}

Values = dict[tuple[str, str], dict[str, list[float]]]


@dataclass(frozen=True)
class Line:
    """A row of the table; costs are shares of SiT's with one scale.

    `guidance` is a key of `ways_of`, `title` what is said of it.
    """

    row: str
    guidance: str
    training: float
    sampling: float
    time: float | None
    metrics: dict[str, list[float]]
    title: str = ""


def write(
    out: Path,
    ways: dict[str, dict[str, Guidance]],
    seeds: int,
    times: dict[str, float],
    docs: str | None,
) -> None:
    """study.md, study.json, study.png, samples.png and report.html in `out`.

    Args:
      ways: how every row is sampled.
    """
    lines, evaluation = collect(out, ways, seeds, times)
    rows = list(ways)
    verdicts = [judged(claim, lines) for claim in CLAIMS]
    text = markdown(out, lines, [v for v in verdicts if v], evaluation, seeds, times)
    with atomic(out / "study.md") as temporary:
        temporary.write_text(text)
    with atomic(out / "study.json") as temporary:
        temporary.write_text(json.dumps([vars(line) for line in lines], indent=1))
    plot(lines, out / "study.png")
    save_png(out / "samples.png", side_by_side(out, rows))
    runs = open_runs([str(out / "0" / name) for name in rows])
    with atomic(out / "report.html") as temporary:
        temporary.write_text(page("The study, first seed", runs, []))
    print(text)
    if docs:
        target = Path(docs)
        for name in ("study.png", "samples.png"):
            shutil.copy(out / name, target.with_name(f"{target.stem}_{name}"))
            text = text.replace(f"]({name})", f"]({target.stem}_{name})")
        target.write_text(text)


def collect(
    out: Path, ways: dict[str, dict[str, Guidance]], seeds: int, times: dict[str, float]
) -> tuple[list[Line], dict[str, Any]]:
    """All lines, and one whole evaluation for what is said about all of them."""
    lines: list[Line] = []
    evaluation: dict[str, Any] = {}
    base = None
    for name in ways:
        for key, guidance in ways[name].items():
            found = [
                json.loads((out / str(seed) / name / EVALUATIONS / f"{key}.json").read_text())
                for seed in range(seeds)
            ]
            evaluation = found[0]
            # of tuned plans it depends on how many steps each stage got
            flops = statistics.mean(e["samples"]["card"]["flops"] for e in found)
            base = base or (_total(out, "sit"), flops)
            training = _total(out, name) / base[0]
            metrics = {m: [e["metrics"][m] for e in found] for m in ("fid", "kid")}
            time = times.get(f"{name} {key}")
            share = flops / base[1]
            lines.append(Line(name, key, training, share, time, metrics, guidance.title))
    return lines, evaluation


def _total(out: Path, name: str) -> int:
    """Training FLOPs of a row, with those of what it started from or learned from."""
    own = json.loads((out / "0" / name / "cost.json").read_text())["training_flops"]
    before = ROWS[name].starts_from or ROWS[name].teacher
    return own + (_total(out, before) if before else 0)


def interval(differences: list[float]) -> tuple[float, float] | None:
    """Student's CONFIDENCE interval of the mean; None for fewer than three."""
    if len(differences) < 3:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * stats.sem(differences)
    mean = statistics.mean(differences)
    return mean - half, mean + half


def judged(claim: Claim, lines: list[Line]) -> tuple[Claim, str, str] | None:
    """Verdict and figures; seeds are paired. None where a row is absent."""
    by_name = {(line.row, line.guidance): line.metrics["fid"] for line in lines}
    if claim.ours not in by_name or claim.theirs not in by_name:
        return None
    ours, theirs = by_name[claim.ours], by_name[claim.theirs]
    differences = [a - b for a, b in zip(ours, theirs)]
    figures = f"{_spread(ours)} against {_spread(theirs)}"
    limits = interval(differences)
    if limits is None:
        return claim, "undecided", f"{figures}; {len(ours)} seed(s), no interval"
    low, high = limits
    allowed = claim.margin * statistics.mean(theirs)
    figures += f"; difference {_difference(ours, theirs)}"
    if high < allowed:
        return claim, "held", figures
    # claimed to be better: did not hold if worse; claimed to be as good: if worse than allowed
    return claim, "did not hold" if low > allowed else "undecided", figures


def _difference(ours: list[float], theirs: list[float]) -> str:
    """Mean and interval; seeds are paired."""
    differences = [a - b for a, b in zip(ours, theirs)]
    limits = interval(differences)
    mean = f"{statistics.mean(differences):+.2f}"
    return mean if limits is None else f"{mean}, {limits[0]:+.2f} to {limits[1]:+.2f}"


def beside_plans(lines: list[Line]) -> list[str]:
    """A table: every other row beside plain stages that are sampled by tuned plans.

    A row that no plan is for is sampled by its own solver. Empty where nothing was tuned.
    """
    found = {(line.row, line.guidance): line for line in lines}
    tuned = dict.fromkeys(line.guidance for line in lines if line.guidance.startswith("tuned"))
    text = []
    for way in tuned:
        plain = [found[name, way] for name in PLAIN if (name, way) in found]
        heads = ["row", "sampled by", "training FLOPs", "sampling FLOPs", "FID"]
        heads += [f"difference to {ROWS[line.row].title}" for line in plain]
        text += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name in dict.fromkeys(line.row for line in lines):
            line = found.get((name, way), found[name, "one"])
            cells = [ROWS[name].title, line.title, f"{line.training:.1%}", f"{line.sampling:.1%}"]
            cells.append(_spread(line.metrics["fid"]))
            for other in plain:
                same = other.row == name
                cells.append("" if same else _difference(line.metrics["fid"], other.metrics["fid"]))
            text.append("| " + " | ".join(cells) + " |")
    note = (
        f"Differences are given with their {CONFIDENCE:.0%} interval, seeds paired; costs as above."
    )
    return ["", "## Beside tuned plans", "", note, *text] if text else []


def _spread(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(
    out: Path,
    lines: list[Line],
    verdicts: list[tuple[Claim, str, str]],
    evaluation: dict[str, Any],
    seeds: int,
    times: dict[str, float],
) -> str:
    """The page of the study."""
    settings = json.loads((out / "settings.json").read_text())
    config, samples = settings["config"], evaluation["samples"]
    s, m = config["sample"], config["model"]
    network, known = evaluation["features"], evaluation["reference"]
    made = (
        f"Inception {network['digest'][:8]}, resize {network['resize']}"
        if network["network"] == "inception"
        else f"of a small network trained on {network['trained_on']}, {NOT_COMPARABLE}"
    )
    text = [
        f"Model: width {m['width']}, depth {m['depth']}, {m['heads']} heads, "
        f"{m['latent_size']}x{m['latent_size']}x{m['channels']}; {config['train']['steps']:,} "
        f"steps of {config['data']['batch_size']}; {seeds} seed(s). "
        f"{samples['count']:,} samples a run, the same noise and labels for all, {s['solver']} "
        f"{s['steps']}, guidance scale {s['cfg'][0]:g}; FID and KID against "
        f"{known['count']:,} pictures of {Path(known['name']).name}, features: {made}. "
        "Mean ± standard deviation over training seeds. FLOPs and times are shares of SiT's "
        "with one scale; training FLOPs of rows that start or learn from another include "
        "those of the other.",
        "",
        "| row | guidance | training FLOPs | sampling FLOPs | sampling time | FID | KID |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        time = "not measured" if line.time is None else f"{line.time:.1%}"
        fid, kid = _spread(line.metrics["fid"]), _spread(line.metrics["kid"], 4)
        text.append(
            f"| {ROWS[line.row].title} | {line.title} | {line.training:.1%} | "
            f"{line.sampling:.1%} | {time} | {fid} | {kid} |"
        )
    text += beside_plans(lines)
    text += [
        "",
        "## Claims",
        "",
        f"Held or not: the {CONFIDENCE:.0%} interval of the difference in FID, seeds paired, "
        "lies wholly on that side of zero, or of 5% of the other's FID where the claim is to be as "
        "good.",
        "",
        "| claim | paper (FID-50K, ImageNet) | here (FID) | |",
        "|---|---|---|---|",
    ]
    for claim, verdict, figures in verdicts:
        text.append(f"| {claim.text} | {claim.paper or '-'} | {figures} | **{verdict}** |")
    if times:
        text += ["", f"SiT takes {times['seconds']:.3g} s for a batch; medians, interleaved."]
    text += ["", "![FID against sampling FLOPs](study.png)", ""]
    text += ["Same noise and labels in every row, in the order of the table, one scale:", ""]
    return "\n".join([*text, "![samples](samples.png)", ""])


def plot(lines: list[Line], path: Path) -> None:
    """FID of every row against its sampling FLOPs; bars span the seeds."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5))
    for i, name in enumerate(dict.fromkeys(line.row for line in lines)):
        for line in (one for one in lines if one.row == name):
            fid = line.metrics["fid"]
            mean = statistics.mean(fid)
            bars = [[mean - min(fid)], [max(fid) - mean]]
            one = line.guidance == "one"
            marker = MARKERS.get(line.guidance, "s")
            axis.errorbar(
                line.sampling, mean, yerr=bars, fmt=marker, color=f"C{i % 10}",
                mfc=None if i < 10 else "white", capsize=3, label=ROWS[name].title if one else None,
            )  # fmt: skip
    axis.set(xlabel="sampling FLOPs, SiT = 1", ylabel="FID", yscale="log")
    title = "circles: one guidance scale; triangles: by stage or interval; squares: tuned plans"
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def side_by_side(out: Path, rows: list[str]) -> np.ndarray:
    """Samples of the first seed, a row of pictures for every row, uint8 [y, x, c]."""
    parts = []
    for name in rows:
        pictures = np.load(out / "0" / name / EVALUATIONS / "one.npy")
        if pictures.shape[1] > 64:  # half the size, the mean of four pixels each
            n, h, w, c = pictures.shape
            pictures = pictures.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4)).astype(np.uint8)
        scale = max(1, 32 // pictures.shape[1])
        pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
        framed = np.pad(pictures, [(0, 0), (1, 1), (1, 1), (0, 0)])
        parts.append(np.concatenate(list(framed), axis=1))
    return np.concatenate(parts)
