"""Checkpoints on disk: orbax, with the model's configuration inside.

    WORKDIR/checkpoints/STEP/{state,config}/

`state` is the training state, or only `ema` in a converted checkpoint; `config` is JSON with the
entries `model`, `flow`, `data` and, for a trained one, `experiment`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.ppflow import ModelConfig, Params, abstract_params
from ppflow_jax.sharding import tree_shardings

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about itself.

    Attributes:
      model, flow: architecture; path and prediction.
      space: `pixels` (in [-1, 1]) or `latents`.
      experiment: configuration of the training run, if it was trained here.
    """

    model: ModelConfig
    flow: Flow
    space: str
    experiment: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model.to_json(),
            "flow": asdict(self.flow),
            "data": {"space": self.space},
            "experiment": self.experiment,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Card:
        return cls(
            ModelConfig.from_json(values["model"]),
            Flow(**values["flow"]),
            values["data"]["space"],
            values.get("experiment"),
        )

    def differences(self, other: Card) -> str:
        """Settings of model and flow that differ, as `name: ours -> theirs`."""
        ours = self.model.to_json() | asdict(self.flow)
        theirs = other.model.to_json() | asdict(other.flow)
        return ", ".join(f"{k}: {ours[k]} -> {theirs[k]}" for k in ours if ours[k] != theirs[k])


class Checkpoints:
    """The checkpoints of one workdir, saved in the background, the newest `keep` kept."""

    def __init__(self, workdir: Path, card: Card, *, keep: int):
        self.card = card
        self.manager = ocp.CheckpointManager(
            workdir / FOLDER,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Start writing; the state may be donated as soon as this returns."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self.card.to_json())
        )
        self.manager.save(step, args=args)

    def restore(self, step: int, abstract: Any) -> Any:
        """State of `step`, placed as `abstract` (shapes, dtypes and shardings) says.

        Raises:
          InputError: made by another model, or not readable.
        """
        path = Path(self.manager.directory) / str(step)
        found = read_card(path)
        if difference := found.differences(self.card):
            raise InputError(
                f"{path} is a checkpoint of another model ({difference}): use another --workdir, "
                "or the configuration it was made with"
            )
        with _readable(path):
            return self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    # Orbax and TensorStore report damage with many exception types.
    try:
        yield
    except Exception as e:
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise InputError(
            f"checkpoint {path} is damaged or incomplete ({reason}): remove that folder to go on "
            "from the one before, or give another checkpoint"
        ) from e


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def find_checkpoint(path: str | Path) -> Path:
    """Folder of one step: `path` itself, or the latest step of a workdir.

    Raises:
      InputError: there is none.
    """
    path = Path(path).absolute()
    for folder in (path / FOLDER, path):
        if folder.is_dir() and (steps := _steps(folder)):
            return folder / str(steps[-1])
    if (path / "state").is_dir():
        return path
    raise InputError(
        f"no checkpoint in {path}: expected a workdir with {FOLDER}/, or the folder of one step"
    )


def read_card(path: Path) -> Card:
    """Model, flow and data of the checkpoint at `path` (the folder of one step).

    Raises:
      InputError: missing or unreadable.
    """
    with _readable(path):
        return Card.from_json(json.loads((path / "config" / "metadata").read_text()))


def load_weights(path: Path, card: Card, mesh: Mesh, which: str = "ema") -> Params:
    """Parameters of the checkpoint at `path`: `ema`, or `params` as last trained.

    Raises:
      InputError: unreadable, or not there.
    """
    abstract = {which: abstract_params(card.model)}
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        tree_shardings(abstract, mesh),
    )
    with _readable(path):
        return ocp.PyTreeCheckpointer().restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )[which]
