"""Which of the methods that change how a plan is sampled go together, and why others do not.

`PAIRS` is the table of docs/systems.md. A step is computed by one method, so that two of them share
a plan by stages: each has some of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Method
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.systems.forecast import alike

# A method, which of its steps are full, and its inputs; None leaves the steps as they are
Made = tuple[Method, Bool[np.ndarray, " k"], dict[str, np.ndarray]] | None

WORKS, STAGES, REFUSED = "works", "other stages", "refused"


@dataclass(frozen=True)
class Pair:
    """Two of `METHODS`.

    Attributes:
      verdict: `works` in one stage; `other stages` only; `refused`.
      reason: of a refusal, words of the line that a person gets.
    """

    first: str
    second: str
    verdict: str = WORKS
    reason: str = ""


# On the sampler's seam, and with what they meet: by what switches them on
METHODS = {
    "forecast": "TaylorSeer and its relatives, `--accelerate=forecast...`",
    "merge": "SDTM and ToMe, `--accelerate=merge...`",
    "ras": "RAS, `--accelerate=ras=std`",
    "rettention": "Re-ttention, `--accelerate=rettention=0.25`",
    "width": "slices where DyDiT's routers switch off the rest, `--accelerate=width=1`",
    "experts": "another number of experts, `--accelerate=experts=1/2`",
    "mob": "without the blocks that a router leaves out, `--accelerate=mob=true`",
    "cfg": "classifier-free guidance, `--cfg`",
    "interval": "guidance in an interval, `--accelerate=guidance=0.5-1,...`",
    "weak": "autoguidance, `--weak`",
    "told": "a student of guided distillation",
    "meanflow": "jumps of MeanFlow, `--solver=meanflow`",
    "multistep": "`--solver=ab2`",
    "sde": "stochastic solvers",
    "dopri5": "the adaptive solver",
    "plan": "tuned plans and HarmoniCa, `--plan`",
    "keep": "known parts put in their place at every step, `--keep=steps`",
    "moe": "blocks with experts (DiT-MoE, Dense2MoE)",
    "switch": "blocks of Switch-DiT",
    "tdln": "blocks with TD-LN (DiMR)",
    "selfcond": "self-conditioning of DDAE++",
    "students": "students in the place of blocks (PPCL)",
    "mixer": "blocks without full attention (CLEAR, LinFusion, DiCo)",
    "dydit": "blocks with routers (DyDiT)",
    "ddt": "the wide head of RAE, `--config.model.network=ddt`",
    "dico": "the network of DiCo, `--config.model.network=dico`",
}
SMOOTH = ("forecast", "merge", "ras", "rettention")  # by what is alike from step to step
ENGINES = (*SMOOTH, "width", "experts", "mob")  # change the evaluations
_NOISE = "adds noise at every step"
_GRID = "chooses its own steps"
_JUMPS = "evaluates another average at every step"
_APART = "takes blocks apart"
_FULL = "is for full attention"
_ROUTER = "is for blocks with a router"
_EXPERTS = "is for blocks with experts"
_ONE = "cannot have both"
_OTHER = "works on the transformer's blocks"
_FILE = "a plan file decides"
_ROUTERS = "is for models trained with"

_EXCEPTIONS = (
    *(Pair(a, b, STAGES, _ONE) for a, b in itertools.combinations(SMOOTH, 2)),
    Pair("forecast", "width", STAGES, _ONE),
    *(Pair(a, b, STAGES, _ONE) for a in SMOOTH for b in ("experts", "mob")),
    Pair("experts", "mob", STAGES, _ONE),
    *(Pair(a, b, REFUSED, _APART) for a in SMOOTH[1:] for b in ("width", "dydit")),
    *(Pair("width", other, REFUSED, _ROUTERS) for other in ("experts", "mob", "moe", "switch")),
    *(Pair("width", other, REFUSED, _ROUTERS) for other in ("mixer", "ddt", "tdln")),
    Pair("mob", "tdln", REFUSED, "goes through the gates of adaLN"),
    Pair("width", "weak", REFUSED, "a weak model has another"),
    *(Pair(engine, "meanflow", REFUSED, _JUMPS) for engine in ("forecast", "ras", "rettention")),
    *(Pair("merge", other, REFUSED, _APART) for other in ("switch", "mob")),
    *(Pair("experts", other, REFUSED, _EXPERTS) for other in ("dydit", "ddt")),
    *(Pair("mob", other, REFUSED, _ROUTER) for other in ("switch", "dydit", "ddt")),
    *(Pair(engine, "students", REFUSED, "do not stand in blocks") for engine in ("width", "mob")),
    *(Pair(engine, "selfcond", REFUSED, _APART) for engine in (*SMOOTH, "width", "mob")),
    *(
        Pair(engine, other, REFUSED, _FULL)
        for engine in ("merge", "ras", "rettention")
        for other in ("mixer", "ddt")
    ),
    *(Pair(engine, "dico", REFUSED, _OTHER) for engine in ENGINES),
    *(Pair(engine, "plan", REFUSED, _FILE) for engine in ENGINES),
    *(Pair(engine, "sde", REFUSED, _NOISE) for engine in SMOOTH),
    *(Pair(engine, "dopri5", REFUSED, _GRID) for engine in ENGINES),
)


def pairs() -> tuple[Pair, ...]:
    """Every engine with every other method."""
    named = {(pair.first, pair.second): pair for pair in _EXCEPTIONS}
    names = list(METHODS)
    found = []
    for i, first in enumerate(ENGINES):
        found += [named.get((first, b), Pair(first, b)) for b in names[i + 1 :]]
    return tuple(found)


def table() -> list[str]:
    """Of docs/systems.md."""
    lines = [
        "What changes the evaluations of a plan, beside each other and beside what it meets. A "
        "step has one such method, so that two share a plan by stages; what is refused says why.",
        "",
        "| | " + " | ".join(ENGINES) + " |",
        "|---" * (len(ENGINES) + 1) + "|",
    ]
    by_names = {(pair.first, pair.second): pair for pair in pairs()}
    for name, what in METHODS.items():
        row = []
        for engine in ENGINES:
            pair = by_names.get((engine, name))
            reason = f": {pair.reason}" if pair and pair.verdict == REFUSED else ""
            row.append(pair.verdict + reason if pair else "")
        lines.append(f"| {name}: {what} | " + " | ".join(row) + " |")
    return lines


def in_stages(
    segments: Iterable[Segment],
    model: ModelConfig,
    name: str,
    stages: tuple[int, ...],
    make: Callable[[int, int], Made],
) -> list[Segment]:
    """The plan with a method in the steps of some stages; other stages stay as they are.

    A change between guided and unguided begins anew, because the batch rows differ. Steps that
    straddle two stages stay.

    Args:
      name: of the method in settings.
      stages: 0 the coarsest; empty: the finest alone.
      make: of a stage and how many steps follow one another in it.

    Raises:
      InputError: a stage that the model does not have, or that has another method.
    """
    levels, out = len(model.pyramid), []
    chosen = stages or (levels - 1,)
    if wrong := [s for s in chosen if not 0 <= s < levels]:
        raise InputError(
            f"{name}.stages has {wrong[0]}: the model has {levels} stage(s), 0 to {levels - 1}"
        )
    for group in alike(segments):
        stage = group[0].stages[0]
        here = len(set(group[0].stages)) == 1 and stage in chosen
        made = make(stage, sum(s.steps for s in group)) if here else None
        if made is None:
            out.extend(group)
            continue
        if group[0].method is not None:
            raise InputError(
                f"stage {stage} {_ONE} {group[0].method.name} and {name} steps: choose one"
                + (f", or another stage for {name}.stages" if levels > 1 else "")
            )
        out.extend(_pieces(group, *made))
    return out


def _pieces(
    group: list[Segment], method: Method, full: Bool[np.ndarray, " k"], inputs: dict[str, Any]
) -> Iterable[Segment]:
    first = 0
    for segment in group:
        now = slice(first, first + segment.steps)
        yield replace(
            segment,
            method=method,
            full=tuple(full[now].tolist()),
            inputs={key: values[now] for key, values in inputs.items()},
            keeps=first > 0,
        )
        first = now.stop
