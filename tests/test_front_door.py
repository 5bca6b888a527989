"""What somebody meets first: help, versions, commands and configs by name, the wheel."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from absl import flags

from ppflow_jax.__main__ import COMMANDS
from ppflow_jax.flow.plan import GRIDS, SOLVERS, SamplerConfig
from ppflow_jax.flow.solvers import DIFFUSIONS, LAST_STEPS
from tests import commands

# Runs a module and then fails if JAX was imported, or if it took too long.
WITHOUT_JAX = """
import atexit, os, runpy, sys
def check():
    if "jax" in sys.modules:
        print("jax was imported")
        sys.stdout.flush()
        os._exit(9)
atexit.register(check)
module, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
MODULES = [f"ppflow_jax.{module}" for module, _ in COMMANDS.values()]


def python(*args, cwd=commands.ROOT, **env):
    kept = os.environ | {"PYTHONPATH": str(commands.ROOT)} | env
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, env=kept, timeout=120
    )


@pytest.mark.parametrize("module", ["ppflow_jax", *MODULES])
@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_and_version_need_no_jax(module, asked, tmp_path):
    done = python("-c", WITHOUT_JAX, module, asked, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if asked == "--version":
        assert done.stdout.startswith("ppflow_jax 0.")
    else:
        assert "Flags:" in done.stdout or "Commands:" in done.stdout
        assert max(map(len, done.stdout.splitlines())) < 200 and not done.stderr


@pytest.mark.parametrize("name", [module for module, _ in COMMANDS.values()])
def test_every_flag_has_help(name):
    module = commands._load(name)
    found = [v for v in vars(module).values() if isinstance(v, flags.FlagHolder)]
    text = commands.cli.usage(module.main)
    assert found and all(f"--{holder.name}  " in text for holder in found)
    assert all(flags.FLAGS[holder.name].help for holder in found)


def test_the_help_of_sampling_says_what_the_sampler_takes():
    module = commands._load("sample")
    text = " ".join(commands.cli.usage(module.main).split())
    for names in (SOLVERS, GRIDS, DIFFUSIONS, LAST_STEPS):
        assert all(name in text for name in names)
    known = {field.name: field.default for field in dataclasses.fields(SamplerConfig)}
    for name in ("solver", "steps", "grid", "rtol", "atol", "diffusion", "diffusion_norm"):
        assert flags.FLAGS[name].default == known[name], name
    for name in ("last_step", "last_step_size"):
        assert flags.FLAGS[name].default == known[name], name


def test_choices_of_other_commands_are_those_of_the_package():
    from ppflow_jax.convert.infer import KINDS
    from ppflow_jax.data.sources import SOURCES
    from ppflow_jax.metrics.evaluator import METRICS
    from ppflow_jax.metrics.resize import CONVENTIONS
    from ppflow_jax.models.stack import REMAT_POLICIES

    def choices(name, flag):
        commands._load(name)
        return tuple(flags.FLAGS[flag].parser.enum_values)

    assert choices("convert", "kind") == KINDS
    assert choices("evaluate", "resize") == choices("prepare", "resize") == CONVENTIONS
    assert choices("evaluate.probe", "source") == choices("evaluate.prune", "source") == SOURCES
    assert set(choices("bench", "remat")) == set(REMAT_POLICIES)
    commands._load("evaluate")
    assert all(metric in flags.FLAGS["metrics"].help for metric in METRICS)


def test_ppflow_runs_commands_by_name(tmp_path):
    done = python("-m", "ppflow_jax", "smaple")
    assert done.returncode == 2 and "did you mean sample?" in done.stderr
    done = python("-m", "ppflow_jax", "sample", f"--checkpoint={tmp_path}", "--out=x")
    assert done.returncode == 1 and done.stderr.startswith("sample: no checkpoint in")


def test_configs_by_name_from_any_folder(tmp_path):
    (tmp_path / "configs").mkdir()  # of somebody else
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not this one')")
    done = python("-m", "ppflow_jax.main", "--config=imagenet256:sit_xl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "main: --workdir is required\n", done.stderr
    assert commands.run("main", "--config=digits:sit")[::2] == (2, done.stderr)
    code, _, err = commands.run("main", "--config=ppflow_b22")
    assert code == 2 and "no config ppflow_b22" in err
    assert "as ppflow_b2" in err and err.count("\n") == 1


def test_unknown_keys_list_the_near_ones(tmp_path):
    for key, words in {
        "optim.lrr": "--config.optim.lrr: unknown key 'lrr': Did you mean lr? There are b1, b2, ",
        "optim.rl": "Did you mean lr?",
        "optm.lr": "unknown key 'optm': Did you mean optim?",
        "optim.zzz": "unknown key 'zzz': There are b1, b2, ",
        "optim.lr.x": "'x' is below a value",
    }.items():
        code, _, err = commands.train(tmp_path, f"--config.{key}=1")
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_a_config_that_fails_is_said(tmp_path):
    (tmp_path / "bad.py").write_text("def get_config():\n    return {}['gone']\n")
    code, _, err = commands.run("main", f"--config={tmp_path}/bad.py", f"--workdir={tmp_path}/run")
    assert code == 2 and "bad.py raises KeyError('gone')" in err and err.count("\n") == 1, err


def test_a_weight_file_is_no_checkpoint(tmp_path):
    (tmp_path / "sit.pt").write_bytes(b"x")
    code, _, err = commands.run("sample", f"--checkpoint={tmp_path}/sit.pt", f"--out={tmp_path}/x")
    assert code == 1 and "ppflow convert --source=sit.pt --target=DIR" in err


@pytest.mark.long
def test_the_architecture_comes_from_the_weights(small_sit, tmp_path):
    shutil.copytree(small_sit, tmp_path / "start")
    data = ["--config.data.batch_size=16", "--config.train.steps=2", "--config.sample.count=8"]
    data += [
        "--config.optim.schedule=constant",
        "--config.sample.solver=euler",
        "--config.sample.steps=2",
        f"--config.init_from={tmp_path}/start",
    ]
    config = f"--config={commands.ROOT}/configs/digits.py:sit"
    code, out, err = commands.run("main", config, f"--workdir={tmp_path}/tuned", *data)
    assert code == 0 and "width 16 (not 128)" in out and "depth 1 (not" in out, err
    sizes = [
        {k: v.shape for k, v in commands.weights(tmp_path / n).items()} for n in ("start", "tuned")
    ]
    assert sizes[0] == sizes[1]
    # continued, also where the weights are gone
    (tmp_path / "start").rename(tmp_path / "moved")
    code, out, err = commands.run(
        "main", config, f"--workdir={tmp_path}/tuned", *data, "--config.train.steps=3"
    )
    assert code == 0 and "continuing from step 2" in out, err
    # but what is told must fit
    told = [f"--config.init_from={tmp_path}/moved", "--config.model.width=32"]
    code, out, err = commands.run("main", config, f"--workdir={tmp_path}/other", *data, *told)
    assert code == 1 and "width" in err and err.strip().count("\n") == 0


def test_the_wheel_has_configs_and_launch_scripts(tmp_path):
    line = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", str(commands.ROOT), str(copy)], check=True)
    done = python(*line, str(copy))
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for folder in ("configs", "launch"):
        for path in (commands.ROOT / folder).glob("[!_]*.*"):
            assert f"ppflow_jax/{folder}/{path.name}" in names
    assert "ppflow_jax/serve/page.html" in names
    assert "ppflow_jax/py.typed" in names and not any(name.startswith("tests") for name in names)


def test_launch_scripts_say_how_they_are_used():
    for path in sorted((commands.ROOT / "launch").glob("*.sh")):
        if path.name in ("flags.sh", "hosts.sh"):  # sourced
            continue
        done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"launch/{path.name}" in done.stdout, path
        assert "shellcheck" not in done.stdout and "#" not in done.stdout


def test_a_platform_that_is_not_there():
    done = python("-m", "ppflow_jax.bench", "--steps=1", JAX_PLATFORMS="nonsense")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "JAX_PLATFORMS=nonsense" in done.stderr and "ppflow_jax[gpu]" in done.stderr


def test_a_config_of_ones_own_builds_on_those_of_the_package(tmp_path):
    own = "from configs import digits\n\ndef get_config():\n    return digits.get_config()\n"
    (tmp_path / "own.py").write_text(own)
    # As installed: the package is found, the folder that it lies in is not searched.
    code = f"""
import sys
from ppflow_jax.__main__ import main
sys.path.remove({str(commands.ROOT)!r})
main()
"""
    asked = ["-c", code, "train", "--config=own.py", "--config.train.steps=0"]
    done = python(*asked, f"--workdir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 1 and "steps, *_every" in done.stderr, done.stderr
