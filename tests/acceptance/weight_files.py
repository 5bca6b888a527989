"""Small models in files of weights, and the cases that convert them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.decode import load_autoencoder
from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.convert.autoencoder_keys import autoencoder_state
from ppflow_jax.convert.export import stored_weights
from ppflow_jax.convert.keys import position_names, position_values, to_torch
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.files.store import find_checkpoint, read_json
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import SIT
from tests import commands
from tests.acceptance.case import Case
from tests.convert.pickles import state_of, write_zip

State = dict[str, np.ndarray]
MODEL = ModelConfig(SIT, latent_size=4, channels=4, width=32, depth=2, heads=2, num_classes=3)
VAE = AutoencoderKLConfig(block_out_channels=(32, 64), layers_per_block=1)
FSDP = "_fsdp_wrapped_module._checkpoint_wrapped_module"
QKV = "blocks.0.attn.qkv.weight"


def model_state(config: ModelConfig = MODEL, seed: int = 0) -> State:
    """A state dict of random float32 weights, with positions."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config)
    )
    positions = {n: position_values(config, k) for k, n in enumerate(position_names(config))}
    return {**to_torch(config, params), **positions}


class Maker:
    """Writes files and collects the cases; files of equal weights share one plain conversion."""

    def __init__(self, root: Path):
        self.root, self.cases = root, []
        self.sit, self.other = model_state(), model_state(seed=1)
        self.plain: dict[str, Path] = {}
        self.keep("sit", self.sit, "--heads=2")
        self.keep("other", self.other, "--heads=2")

    def keep(self, key: str, state: State, *flags: str) -> None:
        """Converts a bare safetensors file, for what is to become the same."""
        file, target = self.root / f"plain_{key}.safetensors", self.root / f"plain_{key}"
        save_file(state, file)
        code, _, error = commands.run(
            "convert.__main__", f"--source={file}", f"--target={target}", *flags
        )
        if code:
            raise AssertionError(error)
        self.plain[key] = target

    def path(self, title: str, ending: str) -> Path:
        return self.root / (re.sub(r"\W+", "_", title) + ending)

    def good(self, title: str, source: Path, *flags: str, says: str = "", same: str = "sit"):
        """The file becomes what the plain file `same` does."""
        target = self.root / "out" / source.name.replace(".", "_") / str(len(self.cases))
        args = (f"--source={source}", f"--target={target}", *(flags or ("--heads=2",)))
        check = partial(_difference, target, self.plain[same])
        self.cases.append(Case(title, "convert.__main__", args, 0, says, check))

    def bad(self, title: str, source: Path, says: str, *flags: str):
        """The file is refused in one line, and nothing is written."""
        target = self.root / "out" / str(len(self.cases))
        args = (f"--source={source}", f"--target={target}", "--heads=2", *flags)
        check: Callable[[], str | None] = lambda: "a target was made" if target.exists() else None
        self.cases.append(Case(title, "convert.__main__", args, 1, says, check))

    def torch(self, title: str, tree: dict[str, Any]) -> Path:
        path = self.path(title, ".pt")
        save_torch_file(path, tree)
        return path

    def safetensors(self, title: str, state: State) -> Path:
        path = self.path(title, ".safetensors")
        save_file(state, path)
        return path

    def pickled(self, title: str, more: dict[str, Any], arrays: State | None = None) -> Path:
        """{"model": arrays, **more}, where `more` may be opcodes; __root__ replaces the tree."""
        tree, storages = state_of(self.sit if arrays is None else arrays)
        value = more["__root__"](tree) if "__root__" in more else {"model": tree, **more}
        return write_zip(self.path(title, ".pt"), value, storages)


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    path = find_checkpoint(folder)
    if "autoencoder" in read_json(path):
        params = load_autoencoder(folder)[2]
    else:
        params = stored_weights(path, read_card(path), None)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _difference(target: Path, plain: Path) -> str | None:
    """What differs between two converted folders, bit for bit; None for nothing."""
    ours, theirs = _arrays(target), _arrays(plain)
    if ours.keys() != theirs.keys():
        return f"other arrays: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for key, value in theirs.items():
        if (value.dtype, value.tobytes()) != (ours[key].dtype, ours[key].tobytes()):
            return f"{key} differs"
    return None


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def inside(wrapper: str, state: dict[str, Any], where: str = r"^(blocks\.\d+)") -> dict[str, Any]:
    return {re.sub(where, rf"\1.{wrapper}", key): value for key, value in state.items()}


def make_index(folder: Path, title: str, ending: str, state: State, second: list[str]) -> Path:
    """Writes two shards, of which the second has the names in `second`, and their index."""
    folder.mkdir(parents=True)
    shards = {k: f"{title}-{2 if k in second else 1}{ending}" for k in state}
    for shard in set(shards.values()):
        part = {k: v for k, v in state.items() if shards[k] == shard}
        (
            save_file(part, folder / shard)
            if ending == ".safetensors"
            else save_torch_file(folder / shard, part)
        )
    index = folder / f"{title}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    return index


def vae_state() -> State:
    return {k: np.asarray(v) for k, v in autoencoder_state("vae", Autoencoder(VAE).init(0)).items()}
