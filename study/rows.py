"""The rows of the study: what is trained, how it is sampled, and what is claimed of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from configs import digits_ddt
from ppflow_jax.flow.cost import training_flops
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.ppcl import TRAINABLE
from ppflow_jax.train.experiment import Experiment

COARSE_END = 0.5  # where the coarsest stage of the main rows ends
TWO, THREE = "4x4@0.5,2x2@1", "4x4@0.5,4x2@0.75,2x2@1"
REPA = {
    "data.fields": ("teacher",),
    "flow.terms": ("repa:layer=3,dims=64,hidden=128",),
}
DYDIT = {
    "model.wrap": "dydit",
    "flow.objective": "dydit:share=0.6,warmup=300",
    "optim.clip": 50.0,
}
PPCL = {"flow.objective": "ppcl", "train.trainable": TRAINABLE}
GUIDED = {
    "model.conditions": ("scalar:name=guidance",),
    "flow.objective": "guided:low=1,high=4",
    "flow.label_drop": 0.0,
}
DISTIL = {"flow.objective": "distil:kd=0.5,features=0.5,every=2"}
# At the FLOPs of the digits' SiT
DICO = {
    "model.network": "dico:depths=2/2/2/2/1",
    "model.width": 48,
    "model.depth": 9,
    "model.heads": 1,
    "model.mlp_ratio": 2.0,
}
MOE = "moe:experts=4,shared=0,expert=gelu"
DDT = {f"model.{name}": value for name, value in digits_ddt.MODEL.items()}
SLICES = "dense2moe:experts=12,top_k=2,shared=1.0"


@dataclass(frozen=True)
class Row:
    """One training run, equal in all but what is named here.

    Attributes:
      title: in the table.
      pyramid: stages.
      changes: further settings, as `model.level_embedding`.
      starts_from: the row of the same seed with whose weights training starts; they are expanded
        where the pyramid is another.
      teacher: the row of the same seed that it is distilled from, and starts from.
      steps: as a share of the budget.
      costs_as: the row whose training costs as many FLOPs, where that sets the number of steps.
      phases: weights of terms, each until a share of the steps.
      accelerate: how it is sampled, as `--accelerate`.
      ranked: the hidden units of what training starts from are put in the order of their importance
        first.
    """

    title: str
    pyramid: str
    changes: dict[str, Any] = field(default_factory=dict)
    starts_from: str = ""
    teacher: str = ""
    steps: float = 1.0
    costs_as: str = ""
    phases: tuple[tuple[float, dict[str, float]], ...] = ()
    accelerate: str = ""
    ranked: bool = False


ROWS = {
    "sit": Row("SiT", "2x2@1"),
    "levels2": Row("2 levels", TWO),
    "levels3": Row("3 levels", THREE),
    "levels2_flops": Row("2 levels, SiT's training FLOPs", TWO, costs_as="sit"),
    "levels3_flops": Row("3 levels, SiT's training FLOPs", THREE, costs_as="sit"),
    "no_level": Row("2 levels, no level embedding", TWO, {"model.level_embedding": False}),
    "early": Row("2 levels, boundary 0.25", "4x4@0.25,2x2@1"),
    "late": Row("2 levels, boundary 0.75", "4x4@0.75,2x2@1"),
    "large": Row("2 levels, 8x8 then 2x2", "8x8@0.5,2x2@1"),
    "all_times": Row(
        "2 levels, every patch size trained on all times", TWO,
        {"flow.stage_times": ((0.0, 1.0), (0.0, 1.0))},
    ),
    "expand2": Row("SiT expanded to 2 levels, 10% more steps", TWO, starts_from="sit", steps=0.1),
    "expand3": Row("SiT expanded to 3 levels, 10% more steps", THREE, starts_from="sit", steps=0.1),
    "repa": Row("2 levels, REPA", TWO, REPA, phases=((1.0, {"repa": 0.5}),)),
    "repa_half": Row(
        "2 levels, REPA for half of the steps", TWO, REPA, phases=((0.5, {"repa": 0.5}), (1.0, {}))
    ),
    "tdln": Row("2 levels, TD-LN", TWO, {"model.norm": "tdln"}),
    "multires": Row(
        "2 levels, loss at two resolutions", TWO, {"flow.terms": ("multires:factors=2",)},
        phases=((1.0, {"multires": 1.0}),),
    ),
    "selfcond": Row(
        "2 levels, self-conditioning", TWO, {"model.conditions": ("selfcond:name=middle",)}
    ),
    "longer": Row("2 levels, 50% more steps", TWO, starts_from="levels2", steps=0.5),
    "twice": Row("2 levels, 100% more steps", TWO, starts_from="levels2"),
    "moe1": Row(
        "2 levels, upcycled to 1 of 4 experts, 50% more steps", TWO,
        {"model.ffn": f"{MOE},top_k=1"}, starts_from="levels2", costs_as="longer",
    ),
    "moe2": Row(
        "2 levels, upcycled to 2 of 4 experts, FLOPs of 50% more steps", TWO,
        {"model.ffn": f"{MOE},top_k=2,renormalise=true"}, starts_from="levels2", costs_as="longer",
    ),
    "switch": Row(
        "2 levels, Switch-DiT with 2 of 3 experts", TWO, {"model.wrap": "switch:experts=3,top_k=2"}
    ),
    "shifted": Row(
        "2 levels, logit-normal times shifted by 2", TWO,
        {"flow.shift": 2.0, "flow.times": "logit_normal:mean=0,std=1"},
    ),
    "rope": Row(
        "2 levels, rotary positions and SwiGLU", TWO, {"model.mixer": "rope", "model.ffn": "swiglu"}
    ),
    "ddt": Row("SiT with a wide head, like FLOPs", "2x2@1", DDT),
    "ddt2": Row("2 levels with a wide head, like FLOPs", TWO, DDT),
    "dydit": Row(
        "2 levels, DyDiT to 60% of the blocks' FLOPs, 100% more steps", TWO, DYDIT,
        starts_from="levels2", accelerate="width=1",
    ),
    "slices": Row(
        "2 levels, 37.5% of the MLPs active, distilled for 50% more steps", TWO,
        {"model.ffn": SLICES, "flow.objective": "dense2moe"}, starts_from="levels2", steps=0.5,
        phases=((1 / 3, {"shared": 1.0, "experts": 0.0}), (1.0, {})), ranked=True,
        teacher="levels2",
    ),
    "slices_mob": Row(
        "the same, and 2 of 3 blocks, 50% more steps", TWO,
        {"model.ffn": SLICES, "model.wrap": "mob:group=3,kept=2",
         "flow.objective": "dense2moe:every=3"}, starts_from="slices", steps=0.5, teacher="levels2",
    ),
    "slices_flow": Row(
        "2 levels, 37.5% of the MLPs active, 50% more steps without a teacher", TWO,
        {"model.ffn": SLICES}, starts_from="levels2", steps=0.5, ranked=True,
    ),
    "ppcl_coarse": Row(
        "2 levels, the coarse stage passes 4 of 6 blocks, distilled", TWO,
        PPCL | {"model.students": "0:0-1,0:3-4"}, starts_from="levels2", steps=0.5,
    ),
    "ppcl_fine": Row(
        "2 levels, the fine stage passes 4 of 6 blocks, distilled", TWO,
        PPCL | {"model.students": "1:0-1,1:3-4"}, starts_from="levels2", steps=0.5,
    ),
    "clear": Row(
        "2 levels, taught local attention (CLEAR), 50% more steps", TWO,
        DISTIL | {"model.mixer": "clear:radius=2"}, teacher="levels2", steps=0.5,
    ),
    "linfusion": Row(
        "2 levels, taught linear attention (LinFusion), 50% more steps", TWO,
        DISTIL | {"model.mixer": "linfusion"}, teacher="levels2", steps=0.5,
    ),
    "guided": Row(
        "2 levels, guided in one evaluation, distilled for 50% more steps", TWO, GUIDED,
        teacher="levels2", steps=0.5,
    ),
    "dico_mixer": Row("2 levels, DiCo's convolutions", TWO, {"model.mixer": "dico"}),
    "dico": Row("DiCo's network, an image costs as SiT's", "1x1@1", DICO),
    "dico2": Row("DiCo's network, 2 levels", "2x2@0.5,1x1@1", DICO),
}  # fmt: skip


def configured(base: ConfigDict, row: Row, seed: int) -> ConfigDict:
    """`base` with the row's model, steps and seed.

    The horizon of the EMA and the warm-up are as much shorter as a run that starts from another.
    """
    config = base.copy_and_resolve_references().unlock()
    config.seed = seed
    config.model.pyramid = row.pyramid
    for name, value in row.changes.items():
        part, name = name.split(".")
        config[part][name] = value
    config.train.steps = max(1, round(config.train.steps * row.steps))
    if row.phases:
        ends = [(round(config.train.steps * share), weights) for share, weights in row.phases]
        config.train.phases = tuple(ends)
    if row.costs_as:
        wanted = training_cost(configured(base, ROWS[row.costs_as], seed))
        config.train.steps = round(wanted / _step_flops(config))
    if row.starts_from or row.teacher:
        share = config.train.steps / base.train.steps
        config.train.ema = 1 - min(1.0, (1 - config.train.ema) / share)
        config.optim.warmup_steps = round(config.optim.warmup_steps * share)
    config.train.save_every = config.train.steps
    config.sample.every, config.sample.count = 0, 20  # the study makes its own
    return config


def _step_flops(config: ConfigDict) -> int:
    experiment = Experiment.from_config(config)
    pattern, evaluated = experiment.objective.pattern, experiment.objective.evaluated
    return training_flops(experiment.card.model, pattern, config.data.batch_size, evaluated)


def training_cost(config: ConfigDict) -> int:
    """FLOPs of the run, without those of what it started from."""
    return config.train.steps * _step_flops(config)


@dataclass(frozen=True)
class Guidance:
    """A way to guide and sample; `scales` of the stages and the interval of time.

    `tuned`: by a plan of so many evaluations that is fitted to the run, instead of the experiment's
    solver.
    """

    title: str
    scales: tuple[float, ...]
    interval: tuple[float, float] = (0.0, 1.0)
    tuned: int = 0


def ways_of(row: Row, scale: float, tuned: Iterable[int] = ()) -> dict[str, Guidance]:
    """How a row is sampled, by name; plan files are not for `--accelerate` nor told scales."""
    found = {"one": Guidance("one scale", (scale,))}
    if (levels := len(Pyramid.parse(row.pyramid))) > 1:
        found["stages"] = Guidance("coarsest stage unguided", (1.0, *[scale] * (levels - 1)))
    else:
        text = f"guided for t > {COARSE_END:g}"
        found["stages"] = Guidance(text, (scale,), (COARSE_END, 1.0))
    told = row.changes.get("model.conditions") == GUIDED["model.conditions"]
    for count in () if row.accelerate or told else tuned:
        title = f"one scale, tuned plan of {count} evaluations"
        found[f"tuned{count}"] = Guidance(title, (scale,), tuned=count)
    return found


@dataclass(frozen=True)
class Claim:
    """`ours` compared with `theirs`, each a row and a guidance.

    Attributes:
      paper: the figures of the paper, if it has them.
      margin: 0 where `ours` is claimed to be better; where it is claimed to be as good, how much
        worse it may be, as a share of `theirs`.
    """

    text: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    paper: str = ""
    margin: float = 0.0


ALIKE = 0.05
CLAIMS = (
    Claim("2 levels are no worse than SiT", ("levels2", "one"), ("sit", "one"), "3.83 against 4.46",
          ALIKE),
    Claim("3 levels are about as good as SiT", ("levels3", "one"), ("sit", "one"),
          "4.43 against 4.46", ALIKE),
    Claim("2 levels beat SiT at equal training FLOPs", ("levels2_flops", "one"), ("sit", "one")),
    Claim("3 levels beat SiT at equal training FLOPs", ("levels3_flops", "one"), ("sit", "one")),
    Claim("the level embedding helps", ("levels2", "one"), ("no_level", "one"),
          "4.30 against 4.44"),
    Claim("guidance by stage helps, 2 levels", ("levels2", "stages"), ("levels2", "one"),
          "4.22 against 4.30"),
    Claim("guidance by stage helps, 3 levels", ("levels3", "stages"), ("levels3", "one")),
    Claim("guidance by stage helps, 2 levels at SiT's training FLOPs (asked after the first seed)",
          ("levels2_flops", "stages"), ("levels2_flops", "one")),
    Claim("guidance by stage helps, 3 levels at SiT's training FLOPs (asked after the first seed)",
          ("levels3_flops", "stages"), ("levels3_flops", "one")),
    Claim("training a patch size on its own times beats all times", ("levels2", "one"),
          ("all_times", "one"), "15.68 against 18.77"),
    Claim("10% of fine-tuning makes 2 levels no worse than SiT", ("expand2", "one"),
          ("sit", "one"), "1.99 against 2.15 (XL)", ALIKE),
    Claim("10% of fine-tuning makes 3 levels about as good as SiT", ("expand3", "one"),
          ("sit", "one"), "2.23 against 2.15 (XL)", ALIKE),
    Claim("not the guidance alone: 2 levels by stage beat SiT guided for the same times",
          ("levels2", "stages"), ("sit", "stages")),
    Claim("a boundary at 0.5 beats one at 0.25", ("levels2", "one"), ("early", "one")),
    Claim("a boundary at 0.5 beats one at 0.75", ("levels2", "one"), ("late", "one")),
    Claim("4x4 first beats 8x8 first", ("levels2", "one"), ("large", "one")),
    Claim("REPA helps", ("repa", "one"), ("levels2", "one")),
    Claim("REPA helps, coarsest stage unguided (asked when the seeds were known)",
          ("repa", "stages"), ("levels2", "stages")),
    Claim("REPA for half of the steps helps", ("repa_half", "one"), ("levels2", "one")),
    Claim("REPA for half of the steps beats REPA for all", ("repa_half", "one"), ("repa", "one")),
    Claim("1 of 4 experts beats dense at equal FLOPs", ("moe1", "one"), ("longer", "one")),
    Claim("2 of 4 experts beat dense at equal training FLOPs", ("moe2", "one"), ("longer", "one")),
    Claim("one evaluation of a guided student is as good as its teacher's two", ("guided", "one"),
          ("levels2", "one"), margin=ALIKE),
    Claim("a guided student is as good as 50% more steps with two evaluations", ("guided", "one"),
          ("longer", "one"), margin=ALIKE),
    Claim("Switch-DiT's experts help", ("switch", "one"), ("levels2", "one")),
    Claim("shifted logit-normal times help", ("shifted", "one"), ("levels2", "one")),
    Claim("DiCo's network beats SiT at equal FLOPs", ("dico", "one"), ("sit", "one")),
)  # fmt: skip
