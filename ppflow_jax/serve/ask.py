"""What a client asks for, checked at the door."""

from __future__ import annotations

from dataclasses import dataclass

from ppflow_jax.api.model import Model
from ppflow_jax.api.requests import guidance_of, label_of, one_of, parse_object, whole_of
from ppflow_jax.console import say
from ppflow_jax.errors import SEEDS
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.systems.accelerate import PRESETS

TUNED = "tuned"
SOLVERS = ("heun", "euler")  # image k is then a function of its noise alone
MOST_STEPS, MOST_IMAGES = 250, 16


@dataclass(frozen=True)
class Ask:
    """Images 0 to n - 1 of a seed, as `sample` makes them.

    Attributes:
      label: class; the number of classes itself is none.
      guidance: scale of every stage.
      preset: one of `systems.accelerate.PRESETS`, or `TUNED`: the plan of a file, which decides
        steps and solver.
    """

    label: int
    seed: int
    guidance: tuple[float, ...]
    steps: int = 50
    solver: str = SOLVERS[0]
    preset: str = "exact"
    n: int = 1


def tuned_for(model: Model, path: str) -> PlanFile:
    """A plan file of this model; what a person should know of it is said.

    Raises:
      InputError: none, or one of another kind of model.
    """
    for note in model.plan(path).notes:
        say(note)
    return PlanFile.read(path)


def parse(body: bytes, model: Model, presets: tuple[str, ...] = tuple(PRESETS)) -> Ask:
    """The request of a JSON body; what it leaves out is as in the command `sample`.

    Raises:
      InputError: no JSON object, a field that there is not, or a value out of its range.
    """
    known = ("label", "seed", "guidance", "steps", "solver", "preset", "n")
    given = parse_object(body, known)
    return Ask(
        label_of(given, model),
        whole_of("seed", given.get("seed", 0), 0, SEEDS - 1),
        guidance_of(given.get("guidance", 1), len(model.config.pyramid)),
        whole_of("steps", given.get("steps", Ask.steps), 1, MOST_STEPS),
        one_of("solver", given.get("solver", Ask.solver), SOLVERS),
        one_of("preset", given.get("preset", Ask.preset), presets),
        whole_of("n", given.get("n", Ask.n), 1, MOST_IMAGES),
    )
