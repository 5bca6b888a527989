import shutil

import jax
import numpy as np

from ppflow_jax.checkpoint import Card, Checkpoints, load_weights
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.ppflow import ModelConfig
from ppflow_jax.optim import OptimConfig, make_optimizer
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.sharding import make_mesh, tree_shardings
from ppflow_jax.state import init_state

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=4, width=64, depth=2, heads=2, num_classes=10)
CARD = Card(MODEL, Flow(), "latents", experiment={})


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_file_cut_in_half_never_changes_what_is_read(tmp_path):
    mesh, tx = make_mesh(), make_optimizer(OptimConfig(), 10)
    state = jax.jit(lambda key: init_state(MODEL, tx, key))(jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / "good", CARD, keep=1)
    checkpoints.save(3, state)
    checkpoints.close()
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        tree_shardings(state, mesh),
    )
    good = tmp_path / "good" / "checkpoints" / "3"
    files = sorted((f for f in (good / "state").rglob("*") if f.is_file()), key=_size)
    refused = {"weights": [], "resume": []}
    for file in files:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path / "good", bad)
        step = bad / "checkpoints" / "3"
        cut = step / file.relative_to(good)
        cut.write_bytes(cut.read_bytes()[: _size(file) // 2])
        resumed = Checkpoints(bad, CARD, keep=1)
        for name, read, expected in (
            ("weights", lambda step=step: load_weights(step, CARD, mesh), state["ema"]),
            ("resume", lambda resumed=resumed: resumed.restore(3, abstract), state),
        ):
            try:
                assert equal(read(), expected), (name, file)
            except InputError as e:
                assert "damaged or incomplete" in str(e) and "\n" not in str(e)
                refused[name].append(file)
        resumed.close()
    assert files[-1] in refused["resume"]  # the largest file holds arrays of the state
    assert refused["weights"] and len(refused["resume"]) < len(files)


def _size(file):
    return file.stat().st_size
