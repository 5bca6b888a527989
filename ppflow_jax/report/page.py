"""The page: one HTML file with everything inside, no script and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.metadata import version

import numpy as np
from clu import parameter_overview
from jaxtyping import UInt8
from PIL import Image

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import SIT
from ppflow_jax.report.evaluation import METRICS, judged, quality_lines
from ppflow_jax.report.figures import cost_of_steps, curves, quality_against_latency
from ppflow_jax.report.run import Run, differences
from ppflow_jax.report.strip import Strip
from ppflow_jax.tune.pareto import figure_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { border-bottom: 1px solid #ddd; margin-top: 2em; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 12px 3px 0; text-align: left;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0.7em 1.2em 0.7em 0; display: inline-block; vertical-align: top; }
figcaption, .note { color: #666; font-size: 13px; }
img { max-width: 100%; height: auto; } .pixels { image-rendering: pixelated; }
.strip td { border: 0; padding: 2px; text-align: center; font-size: 12px; color: #666; }
.strip td.boundary { border-left: 3px solid #d62728; } .strip img { width: 72px; }
.grid { width: 320px; }
"""


def page(title: str, runs: Sequence[Run], strips: Sequence[Strip]) -> str:
    """The report of `runs`; `strips` has one trajectory for each."""
    sections = [
        ("Runs", _runs(runs)),
        ("Differences in configuration", _differences(runs)),
        ("Curves", _curves(runs)),
        ("Quality", _quality(runs)),
        ("Tuned plans", "".join(map(_plan, runs))),
        ("Samples while training", _grids(runs)),
        ("One sample through the stages", "".join(map(_strip, runs, strips))),
        ("Whole configuration", _configuration(runs)),
    ]
    body = "".join(f"<h2>{escape(head)}</h2>{text}" for head, text in sections if text)
    what = f"ppflow_jax {version('ppflow_jax')}; t = 0 is noise, t = 1 is data; FLOPs by formula"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p class=note>{what}, 2 per multiply-add</p>{body}"
        "</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """The last `numbers` columns are right-aligned."""
    text = len(head) - numbers

    def line(tag: str, cells: Sequence[str]) -> str:
        classes = ["" if i < text else " class=n" for i in range(len(cells))]
        made = (f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, cells))
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _figure(data: bytes, kind: str, caption: str, css: str = "") -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><img class="{css}" alt="{escape(caption)}" src="{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        model = run.card.model
        config = SamplerConfig("euler", 100)
        flops = sampling_flops(model, plan(config, model.pyramid, run.card.flow))
        # of the same with 2x2 patches, which grids of other networks do not allow
        base = replace(model, pyramid=SIT, students=()) if model.has_trunk else None
        sit = base and sampling_flops(base, plan(config, SIT, run.card.flow))
        grids = [model.pyramid.grid(i, model.latent_size) for i in range(len(model.pyramid))]
        parameters = parameter_overview.count_parameters(abstract_params(model))
        losses = [row["loss"] for row in run.metrics if "loss" in row]
        rows.append([
            run.name,
            str(model.pyramid),
            " ".join(str(rows * columns) for rows, columns in grids),
            f"{parameters / 1e6:.1f} M",
            f"{flops / sit:.1%}" if sit else "",
            run.checkpoint.name,
            f"{np.mean(losses[-max(1, len(losses) // 10):]):.4f}" if losses else "",
        ])  # fmt: skip
    head = ["run", "stages", "tokens", "parameters", "FLOPs of SiT", "step", "loss"]
    return _table(head, rows, numbers=4) + (
        "<p class=note>FLOPs of a sample with 100 Euler steps against the same network with 2x2 "
        "patches throughout; the loss is the mean of the last tenth of what was logged.</p>"
    )


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    rows = [[key, *values] for key, values in differences(runs)]
    if not rows:
        return "<p>None: the runs have the same configuration.</p>"
    return _table(["setting", *(run.name for run in runs)], rows)


def _curves(runs: Sequence[Run]) -> str:
    numbers = lambda row: (key for key, value in row.items() if not isinstance(value, list))
    names = dict.fromkeys(key for run in runs for row in run.metrics for key in numbers(row))
    figures = []
    for name in names:
        lines = {
            run.name: [(row["step"], row[name]) for row in run.metrics if name in row]
            for run in runs
        }
        if name != "step":
            figure = curves(lines, name, log=name.startswith("loss"))
            figures.append(_figure(figure, "svg+xml", name))
    return "".join(figures)


def _quality(runs: Sequence[Run]) -> str:
    found = [(run.name, judged(e)) for run in runs for e in run.evaluations]
    if not found:
        return ""
    names = [name for name in METRICS if any(name in one.metrics for _, one in found)]
    rows = [
        [
            run,
            one.setting,
            one.network,
            f"{one.count:,}",
            one.nfe,
            "" if one.seconds is None else f"{one.seconds:.3g}",
            *(f"{one.metrics[name]:.5g}" if name in one.metrics else "" for name in names),
        ]
        for run, one in found
    ]
    head = ["run", "sampler", "features", "images", "NFE", "s/image", *map(METRICS.get, names)]
    notes = dict.fromkeys(note for _, one in found for note in one.notes)
    figures = [
        _figure(
            quality_against_latency(lines, "FID"),
            "svg+xml",
            f"FID against seconds per image, compilation included; {network}",
        )
        for network, lines in quality_lines(runs).items()
    ]
    return (
        _table(head, rows, numbers=4 + len(names) - 1)
        + "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
        + "".join(figures)
    )


def _plan(run: Run) -> str:
    """
    Raises:
      InputError: what the plan says of itself is not what `tune` writes.
    """
    if run.plan is None:
        return ""
    made, steps = run.plan.made, "+".join(map(str, run.plan.fitted.counts.values()))
    try:
        rows = [[name, f"{error:.4f}"] for name, error in made["held_out_errors"].items()]
        front, command = made.get("front"), str(made["command"])
        figure = figure_of(front, "svg") if front else b""
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"plan.json of {run.folder}: `made` is not what `ppflow tune` writes ({e!r}): make it "
            "again"
        ) from e
    text = f"{run.name}: {steps} steps, made by {command}; errors on held-out noise"
    caption = f"cost and error of other patches, {run.name}"
    return (
        f"<p>{escape(text)}</p>{_table(['rows', 'error'], rows, numbers=1)}"
        f"{_figure(figure, 'svg+xml', caption) if front else ''}"
    )


def _grids(runs: Sequence[Run]) -> str:
    figures = []
    for run in runs:
        for path in dict.fromkeys([*run.grids[:1], *run.grids[-1:]]):
            step = int(path.stem.removeprefix("step_"))
            caption = f"{run.name}, EMA, step {step}"
            figures.append(_figure(path.read_bytes(), path.suffix[1:], caption, "pixels grid"))
    return "".join(figures)


def _strip(run: Run, strip: Strip) -> str:
    rows = []
    for pictures, what in ((strip.states, "x(t)"), (strip.estimates, "clean image it aims at")):
        cells = [f"<td>{escape(what)}</td>"]
        for picture, i in zip(pictures, strip.shown):
            cells.append(f"<td{_edge(strip, i)}>{_thumbnail(picture, strip.times[i])}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    times = "".join(f"<td{_edge(strip, i)}>t={strip.times[i]:.3g}</td>" for i in strip.shown)
    guidance = ", ".join(f"{scale:g}" for scale in strip.cfg)
    ends = ", ".join(f"{b:g}" for b in run.card.model.pyramid.boundaries)
    caption = (
        f"{run.name}: class {strip.label}, {len(strip.stages)} Euler steps, guidance {guidance}"
        + (f"; red: stage boundary, t = {ends}" if ends else "")
    )
    return (
        f"<p>{escape(caption)}</p><table class=strip>{''.join(rows)}<tr><td></td>{times}</tr>"
        f"</table>{_figure(cost_of_steps(strip), 'svg+xml', f'cost of every step, {run.name}')}"
    )


def _edge(strip: Strip, i: int) -> str:
    inside = 0 < i < len(strip.stages)
    return " class=boundary" if inside and strip.stages[i] != strip.stages[i - 1] else ""


def _thumbnail(picture: UInt8[np.ndarray, "h w c"], t: float) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "png")
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class=pixels alt="t={t:.3g}" src="data:image/png;base64,{code}">'


def _configuration(runs: Sequence[Run]) -> str:
    return "".join(
        f"<details><summary>{escape(run.name)}</summary>"
        f"{_table(['setting', 'value'], list(map(list, run.settings.items())))}</details>"
        for run in runs
    )
