"""What the report says about evaluations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppflow_jax.report.run import Run

# Order and names of the columns; the arrow says which way is better.
METRICS = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "is": "IS ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "kid": "KID ↓",
}


@dataclass(frozen=True)
class Judged:
    """One evaluation of one run.

    Attributes:
      setting: sampler and guidance in a few words, or where the images are.
      network: what the metrics were computed in; only equal ones can be compared.
      seconds: per image as sampled, compilation included; None where it is not known.
    """

    setting: str
    network: str
    count: int
    nfe: str
    seconds: float | None
    metrics: dict[str, float]
    notes: tuple[str, ...]


def judged(evaluation: dict[str, Any]) -> Judged:
    """From the JSON that `evaluate` writes; the card of `sample` is inside if there was one."""
    samples, features = evaluation["samples"], evaluation.get("features", {})
    card = samples.get("card") or {}
    setting, seconds = samples["name"], None
    if settings := card.get("settings"):
        guidance = ",".join(f"{scale:g}" for scale in settings["cfg"])
        setting = f"{settings['solver']} {settings['steps']}, guidance {guidance}"
    if card.get("seconds"):
        seconds = card["seconds"] / card["images_in_these_seconds"]
    if features.get("network") == "inception":
        network = f"Inception, {features['resize']} resize"
    else:
        network = f"small network of {features.get('trained_on', 'unknown')}"
    return Judged(
        setting,
        f"{network} {str(features.get('digest', ''))[:8]}",
        samples["count"],
        str(card.get("nfe", "")),
        seconds,
        evaluation["metrics"],
        tuple(evaluation.get("notes", ())),
    )


def quality_lines(
    runs: Sequence[Run],
) -> dict[str, dict[str, list[tuple[float, float, str]]]]:
    """(seconds, FID, setting) by feature network and run, where both are known."""
    lines: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for one in map(judged, run.evaluations):
            if one.seconds is not None and "fid" in one.metrics:
                point = (one.seconds, one.metrics["fid"], one.setting)
                lines[one.network][run.name].append(point)
    return lines
