"""Checkpoints on disk: orbax, with the model's configuration inside.

    WORKDIR/checkpoints/STEP/{state,config}/

`state` is the training state, or only `ema` (and `positions`, see `save_weights`) in a converted
checkpoint; `config` is JSON with the entries `model`, `flow`, `data` and, for a trained one,
`experiment`. A converted autoencoder or feature network lies in the same folders: see
decode.py and features.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.ppflow import ModelConfig, Params, abstract_params
from ppflow_jax.sharding import tree_shardings

FOLDER = "checkpoints"
LATENT_SCALE = 0.18215  # of the Stable Diffusion autoencoders, as in SiT and PPFlow


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about itself.

    Attributes:
      model, flow: architecture; path and prediction.
      space: `pixels` (in [-1, 1]) or `latents`.
      experiment: configuration of the training run, if it was trained here.
      latent_scale: what the autoencoder's latents were multiplied by; says nothing for pixels.
    """

    model: ModelConfig
    flow: Flow
    space: str
    experiment: dict[str, Any] | None = None
    latent_scale: float = LATENT_SCALE

    def to_json(self) -> dict[str, Any]:
        scale = {"latent_scale": self.latent_scale} if self.space == "latents" else {}
        return {
            "model": self.model.to_json(),
            "flow": asdict(self.flow),
            "data": {"space": self.space} | scale,
            "experiment": self.experiment,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Card:
        return cls(
            ModelConfig.from_json(values["model"]),
            Flow(**values["flow"]),
            values["data"]["space"],
            values.get("experiment"),
            values["data"].get("latent_scale", LATENT_SCALE),
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
        if found.experiment is None:
            raise InputError(
                f"{path} holds converted weights, not a run to go on with: give it as "
                "--config.init_from, and another --workdir"
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
    values = read_json(path)
    if "autoencoder" in values:
        raise InputError(
            f"{path} holds an autoencoder: give it as --decode of sample, and a model here"
        )
    if "inception" in values:
        raise InputError(f"{path} holds an Inception network, for metrics: give a model here")
    with _readable(path):
        return Card.from_json(values)


def read_json(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` says about itself, of whatever kind it is.

    Raises:
      InputError: missing or unreadable.
    """
    with _readable(path):
        return dict(json.loads((path / "config" / "metadata").read_text()))


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


def load_stored(path: Path, tree: Any) -> Any:
    """Those leaves of the state at `path` that `tree` has, in the dtypes they are stored in.

    Raises:
      InputError: unreadable, or not there.
    """
    with _readable(path):
        return ocp.PyTreeCheckpointer().restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                tree,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
                partial_restore=True,
            ),
        )


def stored_tree(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of everything in the state at `path`; reads no array."""
    with _readable(path):
        return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def check_new(target: str | Path) -> Path:
    """Absolute path of a folder or file to make, where nothing is yet.

    Raises:
      InputError: something is there, or it cannot be made.
    """
    target = Path(target).absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists: give a --target that does not, or remove it")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {target} in {parent}: choose a folder where you may write")
    return target


def save_weights(
    target: str | Path, card: Card, params: Params, positions: Mapping[int, np.ndarray] = {}
) -> None:
    """A checkpoint of step 0 with `params` as its EMA, in the dtypes they have.

    Arrays may be of any floating-point dtype: `load_weights` gives float32. `positions` by stage
    are kept for the way back to PyTorch only.

    Raises:
      InputError: see `check_new`.
    """
    kept = {"positions": {str(k): v for k, v in positions.items()}} if positions else {}
    write_checkpoint(target, {"ema": params} | kept, card.to_json())


def write_checkpoint(target: str | Path, state: Any, values: dict[str, Any]) -> None:
    """A checkpoint of step 0 in a new folder, which appears when it is complete.

    Beyond the NumPy arrays of `state` it needs about half of their memory: Orbax by default
    copies them, and then holds all of them again on the way to the disk.

    Raises:
      InputError: see `check_new`; the disk is full.
    """
    target = check_new(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    saved = ocp.args.PyTreeSave(
        state,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2**24), state),
        ocdbt_target_data_file_size=2**26,
    )
    try:
        manager = ocp.CheckpointManager(
            partial / FOLDER,
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
            item_handlers={"state": handler, "config": ocp.JsonCheckpointHandler()},
        )
        manager.save(0, args=ocp.args.Composite(state=saved, config=ocp.args.JsonSave(values)))
        manager.close()
        os.replace(partial, target)  # an empty folder is replaced, any other is not
    except Exception as e:  # TensorStore reports a full disk as a ValueError, among others
        reason = str(e).strip().rsplit('": ', 1)[-1][:200] or type(e).__name__
        raise InputError(f"cannot write {target} ({reason}): is the disk full?") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
