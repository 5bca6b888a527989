import dataclasses
import importlib
from types import SimpleNamespace

import jax
import pytest

from ppflow_jax.cost import dry_run, report_text
from ppflow_jax.cost.chips import CHIPS
from ppflow_jax.cost.collectives import Collective
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import training_flops
from ppflow_jax.models.flops import forward_flops
from tests.commands import ROOT, SMALL, run

CHIP = CHIPS["v5e"]


def report(chip=CHIP, **mesh):
    config = importlib.import_module("configs.digits").get_config()
    config.model.update(dict(width=64, depth=3, heads=4))
    config.data.batch_size = 32
    config.mesh.update(mesh)
    target = dry_run.Target("tpu:v5e:2x4", tuple(jax.devices()), chip)
    return dry_run.dry_run(config, target, sampler=False)


@pytest.fixture(scope="module")
def sharded():
    return report(data=2, fsdp=4)


def test_only_weights_and_gradients_cross_the_mesh(sharded):
    (step,) = sharded.programs
    causes = sharded.causes(step)
    assert not [c for c in causes if c[0].startswith("unexplained")], causes
    gathered = [c for c in causes if c[0] == "weights gathered (blocks)"]
    # five weights of three blocks, forward and backward: once for both stages
    assert [(kind, runs) for _, kind, _, runs, _ in gathered] == [("all-gather", 30)]


def test_state_is_one_nth_and_within_the_arguments_of_the_compiler(sharded):
    for part in ("params", "ema", "opt_state"):
        assert 3 < sharded.whole[part] / sharded.parts[part] <= 4
    assert sharded.peak > sum(sharded.parts.values())
    assert sharded.parameters * 4 == sharded.whole["params"]


def test_the_rate_of_a_collective_is_by_where_its_group_lies(sharded, monkeypatch):
    slice_ = [SimpleNamespace(coords=(k // 4, k % 4, 0)) for k in range(8)]
    assert dry_run.spanned(slice_) == [2, 4, 1] and dry_run.spanned(slice_[::4]) == [2, 1, 1]
    (step,) = sharded.programs
    for spans, ways in (([2, 4, 1], 2), ([1, 4, 1], 1)):
        monkeypatch.setattr(dry_run, "spanned", lambda devices, spans=spans: spans)
        for kind, at_once in (("all-reduce", ways), ("collective-permute", 1)):
            moved = Collective(kind, 8000, (2000,), 1, (0, 1), "")
            program = dataclasses.replace(step, network=[moved])
            seconds = moved.sent / (at_once * CHIP.link_rate)
            assert sharded.seconds(program)["links"] == pytest.approx(seconds)


def test_estimates_and_what_does_not_fit(sharded, monkeypatch):
    monkeypatch.setattr(dry_run, "spanned", lambda devices: [2, 4])  # CPU devices are nowhere
    (step,) = sharded.programs
    assert sharded.misfit == ""
    assert sharded.seconds(step)["compute"] == pytest.approx(step.flops / 8 / CHIP.flops)
    assert "fits" in report_text.text(sharded) and "not measured" in report_text.text(sharded)
    small = dataclasses.replace(CHIP, memory=1e5)
    tight = dataclasses.replace(sharded, target=dataclasses.replace(sharded.target, chip=small))
    assert "do not fit" in tight.misfit and "does not fit" in report_text.text(tight)
    failed = dataclasses.replace(step, temporaries=None, failure="out of memory")
    assert "out of memory" in dataclasses.replace(sharded, programs=[failed]).misfit


def test_training_flops_are_three_forward_passes():
    config = importlib.import_module("configs.ppflow_xl3").get_config()
    experiment = dry_run.Experiment.from_config(config)
    model, pattern = experiment.card.model, experiment.objective.pattern
    share = [2, 1, 1]
    whole = sum(n * forward_flops(model, stage) for stage, n in enumerate(share))
    assert training_flops(model, pattern, 256) == 3 * 64 * whole


def test_the_command_needs_no_data_and_no_workdir():
    args = [f"--config={ROOT}/configs/sit_s.py", "--dry_run=cpu:8", *SMALL]
    code, out, err = run("main", *args, "--config.mesh.fsdp=8", "--config.model.width=64")
    assert code == 0, err
    assert "on cpu:8" in out and "sampler of 8 images" in out and "unexplained" not in out


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu", "unknown --dry_run=cpu: give here, cpu:8"),
        ("gpu:v100:8", "unknown --dry_run"),
        ("16xH100", "--dry_run=gpu:h100:16: the links between machines are not known"),
        ("tpu:v9:2x2", "unknown --dry_run"),
        ("cpu:64", "64 CPU devices are asked for, and 8 exist"),
    ],
)
def test_bad_targets_are_refused_in_one_line(target, words):
    code, _, err = run("main", f"--config={ROOT}/configs/digits.py", f"--dry_run={target}")
    assert code == 1 and words in err and "Traceback" not in err


def test_gpus_by_formula():
    args = [f"--config={ROOT}/configs/sit_s.py", "--dry_run=8xH100", *SMALL]
    code, out, err = run("main", *args, "--config.data.batch_size=32")
    assert code == 0, err
    assert "parameters on gpu:h100:8" in out and "fits (roughly, by formula)" in out
    assert "gradients summed" in out and "limits" in out and "46%: the most of public runs" in out
    assert "6 steps of 32 images: 0.0 epochs of 1,281,167 examples (ImageNet)" in out
    assert "50,000 samples by euler, 2 intervals" in out
    code, out, _ = run("main", *args, "--dry_run=gpu:l4:1", "--config.model.width=16384")
    assert code == 1 and "does not fit" in out  # nothing was compiled


def test_gradients_as_gpus_send_them():
    twice = Collective("all-reduce", 48, (4, 2, 4, 2), 3, (0, 1), "")
    once = dataclasses.replace(twice, size=24, elements=(4, 2))
    assert dry_run.as_gpus_send(twice, 2, 4) == once
    assert dry_run.as_gpus_send(twice, 2, 2).size == 12  # in bfloat16
    assert dry_run.as_gpus_send(twice, 1, 4) == twice
    assert dry_run.as_gpus_send(twice, 3, 4) == twice  # not the gradients of three stages
    outside = dataclasses.replace(once, times=1)
    assert dry_run.as_gpus_send(outside, 1, 2) == outside
    gather = dataclasses.replace(twice, kind="all-gather")
    assert dry_run.as_gpus_send(gather, 2, 2) == gather


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jax\[tpu\]'"):
        dry_run.Target.parse("tpu:v5e:4x4")


def test_workdir_is_needed_without_it():
    code, _, err = run("main", f"--config={ROOT}/configs/digits.py")
    assert code == 2 and "--workdir is required" in err
