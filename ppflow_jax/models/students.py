"""Students: blocks and linear maps that stand, in one stage, in the place of blocks (a depth plan).

`0:2-4` is a block of its own that takes the place of blocks 2, 3 and 4 in stage 0; `1:ffn5` is a
linear map, x W + b + x, in the place of the FFN of block 5 in stage 1. Every one works alone: those
that are on are named by the model, or by the call (see `models.network.make_apply`). What a stage
then passes is known before anything is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ppflow_jax.errors import InputError
from ppflow_jax.models.parts import Mlp
from ppflow_jax.models.stack import Taps

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig

NONE = "none"
STUDENTS = "students"  # where the parameters have their leaves
_UNLIKE = "is a linear map in one of the blocks"
_TEXT = re.compile(r"(\d+):(?:(\d+)-(\d+)|ffn(\d+))")


@dataclass(frozen=True, order=True)
class Student:
    """What stands in the place of blocks in one stage.

    Attributes:
      stage: 0 is the coarsest.
      first, last: blocks, from 0; of an FFN the one that it is in, twice.
      ffn: a linear map in the place of an FFN.
    """

    stage: int
    first: int
    last: int
    ffn: bool = False

    def __str__(self) -> str:
        place = f"ffn{self.first}" if self.ffn else f"{self.first}-{self.last}"
        return f"{self.stage}:{place}"

    @property
    def start(self) -> int:
        """The block that it begins as."""
        return (self.first + self.last) // 2


def parse(text: str) -> tuple[Student, ...]:
    """The students of `0:2-4,1:ffn5`, in order; none of `none`.

    Raises:
      InputError: text that is none.
    """
    found = []
    for part in filter(None, ("" if text == NONE else text).split(",")):
        if not (match := _TEXT.fullmatch(part.strip())):
            raise InputError(
                f"students {text!r}: {part!r} is none: write stage:first-last, as 0:2-4 for the "
                "blocks 2 to 4 of stage 0, or stage:ffn and a block, as 1:ffn5"
            )
        stage, first, last, ffn = match.groups()
        found.append(Student(int(stage), int(first or ffn), int(last or ffn), ffn is not None))
    return tuple(sorted(found))


def read_students(state: Iterable[str]) -> tuple[Student, ...]:
    """Those of the names of a PyTorch state dict, see `convert.keys`."""
    names = {name.split(".")[1] for name in state if name.startswith(f"{STUDENTS}.")}
    return parse(",".join(re.sub(r"(\d)_(\d)", r"\1-\2", n.replace("_", ":", 1)) for n in names))


def text(students: tuple[Student, ...]) -> str:
    """What `parse` reads."""
    return ",".join(map(str, students)) or NONE


def check(model: ModelConfig) -> None:
    """
    Raises:
      InputError: students of blocks or stages that there are not, two in one place, or a model
        whose blocks they cannot stand in.
    """
    students = model.students
    if not students:
        return
    if model.adapters:
        raise InputError("a model with students has no adapters: merge them first")
    told = [c for c in model.conditions if c.enters == "blocks"]
    if others := [p for p in (model.block.wrap, model.block.norm, model.network, *told) if p]:
        raise InputError(f"students do not stand in blocks with {others[0]}: leave them out")
    if ffns_of(students) and model.block.ffn != Mlp():
        raise InputError(f"students of FFNs stand for MLPs, the blocks have {model.block.ffn}")
    stages, taken = len(model.pyramid), set()
    for s in students:
        if s.stage >= stages or s.last >= model.depth or s.first >= s.last + s.ffn:
            raise InputError(
                f"student {s}: the model has stages 0 to {stages - 1} and blocks 0 to "
                f"{model.depth - 1}, and one stands for at least two of these, first-last"
            )
        places = {(s.stage, block) for block in range(s.first, s.last + 1)}
        if places & taken:
            raise InputError(f"students {text(students)}: {s} is where another one is")
        taken |= places


class Step(NamedTuple):
    """One block of a stage: of the stack, or a student; `residual` is that of its FFN.

    All are numbers within their stack.
    """

    block: int | None
    student: int | None = None
    residual: int | None = None

    @property
    def row(self) -> int:
        """Of the block or of the student."""
        number = self.student if self.block is None else self.block
        assert number is not None
        return number


def steps(model: ModelConfig, stage: int, on: tuple[Student, ...] | None = None) -> list[Step]:
    """What the tokens of a stage pass, with the students `on` (None: all of the model)."""
    on = model.students if on is None else on
    deep, wide = blocks_of(model.students), ffns_of(model.students)
    first = {s.first: s for s in on if s.stage == stage and not s.ffn}
    inside = {s.first: wide.index(s) for s in on if s.stage == stage and s.ffn}
    found, block = [], 0
    while block < model.depth:
        if student := first.get(block):
            found.append(Step(None, deep.index(student)))
            block = student.last
        else:
            found.append(Step(block, residual=inside.get(block)))
        block += 1
    return found


def blocks_of(students: tuple[Student, ...]) -> list[Student]:
    """Those that are blocks, in the order of their leaves."""
    return [s for s in students if not s.ffn]


def ffns_of(students: tuple[Student, ...]) -> list[Student]:
    """Those that are linear maps, in the order of their leaves."""
    return [s for s in students if s.ffn]


def check_call(
    model: ModelConfig,
    stage: int | tuple[int, ...],
    on: tuple[Student, ...],
    taps: Taps,
    trunk: bool,
) -> None:
    """
    Raises:
      InputError: students that the model does not have, taps of what is inside of one in this
        stage, or a trunk in the place of blocks that are not alike.
    """
    stages = stage if isinstance(stage, tuple) else (stage,)
    if unknown := set(on) - set(model.students):
        raise InputError(f"no student {min(unknown)}: the model has {text(model.students)}")
    for s in (s for s in on if s.stage in stages):
        inside = () if s.ffn else range(s.first, s.last + 1)
        hidden = {i for i in taps.h if i - 1 in inside and i <= s.last}
        hidden |= {i for i in (*taps.logits, *taps.mixed) if i in inside}
        if hidden:
            raise InputError(f"taps of {sorted(hidden)}: student {s} is in their place")
        if trunk and s.ffn:
            raise InputError(
                f"student {s} {_UNLIKE}: this method takes blocks that are alike, leave such "
                "students out"
            )
