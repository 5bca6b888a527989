import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from ppflow_jax.cost.measure import Row, row_figures, table, xla_forward_flops
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from tests.commands import run

MODEL = ModelConfig(PPFLOW2, 16, 4, width=128, depth=3, heads=4, num_classes=10)

# The command with a tiny S of 2 levels only: compiling is its time
TINY = """
from ppflow_jax import bench, cli
from ppflow_jax.cost import command
command.SIZES["S"] = dict(width=32, depth=1, heads=2)
del command.PYRAMIDS["SiT"], command.PYRAMIDS["3 levels"]
cli.run(bench.main)
"""

# The benchmark of tasks with models that train in seconds
TINY_TASKS = """
from benchmarks import conditions
from configs import digits_tasks
from ppflow_jax import cli
made = digits_tasks.get_config
def tiny(name):
    config = made(name)
    config.model.update(dict(width=16, depth=1, heads=2, pyramid="4x4@1"))
    config.data.batch_size, config.sample.count, config.sample.steps = 16, 12, 2
    return config
digits_tasks.get_config = tiny
cli.run(conditions.main, ("out",))
"""


@pytest.mark.parametrize("stage", [0, 1])
def test_xla_counts_what_the_formula_does(stage):
    apply = make_apply(MODEL)
    forward = xla_forward_flops(MODEL, apply, stage, gradient=False)
    # XLA also counts what is done element by element
    assert 1 <= forward / forward_flops(MODEL, stage) < 1.15
    gradient = xla_forward_flops(MODEL, apply, stage, gradient=True)
    assert gradient / forward == pytest.approx(3, rel=0.1)


def test_a_row_is_compared_with_sit_within_the_rounds():
    def row(name, flops, seconds):
        facts = dict(images=2, nfe=4, memory=10**6, compile_cold=2.0, compile_cached=0.5)
        return Row(name, "S", "1.5", lambda: None, flops, 1.1 * flops, **facts, seconds=seconds)

    sit, ours = row("SiT", 1000, [1.0, 9.0, 1.0]), row("2 levels", 500, [0.6, 5.4, 0.6])
    figures = row_figures(ours, sit, ceiling=5000.0)
    assert figures["speedup"] == pytest.approx(1 / 0.6)
    assert figures["speedup_implied"] == 2
    assert figures["seconds_per_image"] == pytest.approx(0.3)
    assert figures["mfu"] == pytest.approx(500 / 0.6 / 5000)
    line = table([figures]).splitlines()[1]
    assert "2.00x" in line and "1.67x" in line and "83%" in line


@pytest.mark.long
def test_the_command_measures_and_writes_json(tmp_path):
    out = tmp_path / "figures.json"
    flags = "--size=S --latent_size=4 --steps=4 --rounds=1 --work=train,sample --train_batch=4"
    command = [sys.executable, "-c", TINY, *flags.split(), f"--json={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [f["model"] for f in figures] == ["2 levels"] * 3
    assert [f["guidance"] for f in figures] == ["", "1.5,1.5", "1,1.5"]
    assert all(f["seconds"] > 0 for f in figures)
    assert "matmul ceiling" in done.stdout


@pytest.mark.long
def test_tasks_are_trained_sampled_and_measured(tmp_path):
    command = [sys.executable, "-c", TINY_TASKS, f"--out={tmp_path}", "--steps=2", "--num=40"]
    command.append("--seeds=2")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "conditions.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows[1:]] == [
        ["super_resolution", "enlarged only"],
        ["super_resolution", "as they are"],
        ["inpainting", "as they are"],
        ["inpainting", "keep=end"],
        ["inpainting", "keep=steps"],
    ]
    mean, low, high = (float(text) for text in re.findall(r"[\d.]+", rows[-3][2]))
    assert rows[-1][2] == rows[-2][2] == "exact" and low <= mean <= high < 30
    enlarged, sampled = (float(row[3].split()[0]) for row in rows[1:3])
    assert enlarged > sampled  # a model that knows nothing yet
    for seed in "01":
        grid = Image.open(tmp_path / seed / "inpainting.png")
        assert grid.size == (12 * 66, 3 * 66)


def test_an_unknown_size_is_refused():
    code, _, err = run("bench", "--size=Q")
    assert code == 1 and "'Q'" in err
