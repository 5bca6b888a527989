"""An evaluation as a person reads it."""

from __future__ import annotations

from typing import Any

from ppflow_jax import console

_SHOWN = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}


def table(result: dict[str, Any]) -> str:
    """What a person reads of an evaluation."""
    samples, reference, network = (result[k] for k in ("samples", "reference", "features"))
    size = "x".join(map(str, samples["shape"]))
    known = f"{reference['count']:,} images" if "count" in reference else "statistics of the file"
    if network["network"] == "inception":
        made = f"Inception {network['digest']}, resize {network['resize']}"
    else:
        made = f"small network {network['digest']} trained on {network['trained_on']}"
    rows = [
        ("samples", f"{samples['name']}: {samples['count']:,} images of {size}"),
        ("reference", f"{reference['name']}: {known}"),
        ("features", made),
    ]
    values = result["metrics"]
    for metric, value in values.items():
        if metric in _SHOWN:
            spread = ""
            if metric == "kid":
                size, subsets = (result["settings"][k] for k in ("kid_subset_size", "kid_subsets"))
                spread = f" ± {values['kid_std']:.5f} ({subsets} subsets of {size:,})"
            rows.append((_SHOWN[metric], f"{value:.5f}{spread}"))
    rows += [(f"no {_SHOWN[m]}", why) for m, why in result["left_out"].items()]
    rows += [("note", note) for note in result["notes"]]
    return console.table(rows, left=(0, 1))
