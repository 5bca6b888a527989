"""What stands for the objects of a file that are not made here."""

from __future__ import annotations

from dataclasses import dataclass

from ppflow_jax.convert.tensors import shown
from ppflow_jax.errors import InputError


@dataclass(frozen=True, slots=True)
class Placeholder:
    """An object of a class that is not imported, or a tensor that cannot be read.

    Calling it, setting attributes or adding items gives the same placeholder, so that nothing of
    what a file puts in is kept.

    Attributes:
      what: "made by datetime.datetime", "a sparse tensor".
      tensor: whether it is a tensor.
    """

    what: str
    tensor: bool = False

    def error(self, name: str) -> InputError:
        """The line that says why `name`, which is needed, cannot be read."""
        if self.tensor:
            return InputError(
                f"{shown(name)} is {self.what}; expected a plain dense one: save it again with "
                "x.detach().to_dense().cpu().float()"
            )
        return InputError(
            f"{shown(name)} is {self.what}, and nothing from a file is run; expected a state dict "
            "of tensors: where you trust the file, save only that again with torch.save"
        )


def made_by(name: str) -> Placeholder:
    """An object that the file makes by calling `name`, a function or class."""
    return Placeholder(f"made by {shown(name)}")


def unreadable(what: str) -> Placeholder:
    """A tensor of a kind that is not read, such as "a sparse tensor"."""
    return Placeholder(what, tensor=True)
