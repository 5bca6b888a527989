import re
import resource
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.run import Checkpoints
from ppflow_jax.checkpoints.weights import load_weights, save_weights
from ppflow_jax.devices.sharding import make_mesh, tree_shardings
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files.store import digest, load_stored
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import init_state

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=4, width=64, depth=2, heads=2, num_classes=10)
CARD = Card(MODEL, Flow(), "latents", experiment={})
DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "missing": None,
}


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 2 and 3, and the state in both."""
    folder, tx = tmp_path_factory.mktemp("saved"), make_optimizer(OptimConfig(), 10)
    state = jax.jit(lambda key: init_state(MODEL, tx, key))(jax.random.key(0))
    checkpoints = Checkpoints(folder, CARD, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state)
    checkpoints.close()
    return folder, state


def placed(state):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        tree_shardings(state, make_mesh()),
    )


def files_of(folder):
    return [f for f in sorted(folder.rglob("*")) if f.is_file()]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_found(saved, tmp_path, kind):
    folder, state = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "checkpoints" / "3"
    checkpoints, abstract, mesh = Checkpoints(tmp_path, CARD, keep=2), placed(state), make_mesh()
    harmless = []
    for file in files_of(step):
        whole, name = file.read_bytes(), str(file.relative_to(step))
        if DAMAGE[kind] is None:
            file.unlink()
        elif not whole or DAMAGE[kind](whole) == whole:
            continue
        else:
            file.write_bytes(DAMAGE[kind](whole))
        assert checkpoints.latest() == 3
        if file.parent == step and file.name != "SHA256SUMS":  # written after the checksums
            assert equal(load_weights(step, CARD, mesh), state["ema"]), name
            assert equal(checkpoints.restore(3, abstract), state), name
            harmless.append(name)
        else:
            for read in (
                lambda: load_weights(step, CARD, mesh),
                lambda: load_stored(step, {"ema": {}}),
                lambda: checkpoints.restore(3, abstract),
            ):
                with pytest.raises(InputError, match="damaged or incomplete") as e:
                    read()
                assert "SHA256SUMS" in str(e.value) and "\n" not in str(e.value)
            assert name in str(e.value) or name == "SHA256SUMS"
            assert str(e.value).endswith("that of step 2 is intact")
        file.write_bytes(whole)
    assert set(harmless) <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert equal(checkpoints.restore(3, abstract), state)
    checkpoints.close()


def test_a_file_that_does_not_belong_is_found(saved, tmp_path):
    shutil.copytree(saved[0] / "checkpoints" / "3", tmp_path / "3")
    (tmp_path / "3" / "state" / "d" / "stray").touch()
    with pytest.raises(InputError, match="state/d/stray is not as it was written"):
        load_weights(tmp_path / "3", CARD, make_mesh())


def test_checksums_are_those_of_sha256sum(saved):
    steps = sorted((saved[0] / "checkpoints").iterdir())
    assert [s.name for s in steps] == ["2", "3"]
    for step in steps:
        command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        assert subprocess.run(command, cwd=step, check=False).returncode == 0
        listed = {line.split("  ")[1] for line in (step / "SHA256SUMS").read_text().splitlines()}
        assert {"config/metadata", "state/manifest.ocdbt"} <= listed


def test_digest_names_the_content(saved, tmp_path):
    first = digest(saved[0])
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == digest(saved[0] / "checkpoints" / "3")
    assert first != digest(saved[0] / "checkpoints" / "2")
    shutil.copytree(saved[0] / "checkpoints" / "3", tmp_path / "moved")
    assert digest(tmp_path / "moved") == first
    save_weights(tmp_path / "weights", CARD, {"a": np.ones(3, np.float32)})
    assert digest(tmp_path / "weights") != first
    (tmp_path / "moved" / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="SHA256SUMS cannot be read"):
        digest(tmp_path / "moved")


def test_a_write_that_fails_in_the_background_is_said_and_leaves_the_one_before(
    saved, tmp_path, caplog
):
    state = saved[1]
    checkpoints = Checkpoints(tmp_path, CARD, keep=2)
    checkpoints.save(1, state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CARD, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"step 2 .*File too large.*that of step 1 is good") as e:
            checkpoints.save(2, state)
            for _ in range(1000):
                checkpoints.check()  # does not wait
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value) and not caplog.records
    checkpoints.close()
    again = Checkpoints(tmp_path, CARD, keep=2)
    assert again.latest() == 1 and equal(again.restore(1, placed(state)), state)
    again.save(2, state)
    again.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert equal(Checkpoints(tmp_path, CARD, keep=2).restore(2, placed(state)), state)
