"""The runner of `benchmarks.gpu_hour`: time, records, what goes on after a failure; its report."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from benchmarks.hour import device, models, parity, peer, report, runner, speed
from benchmarks.hour.parts import PARTS
from benchmarks.hour.record import CUT, DONE, FAILED, RUNNING, SKIPPED
from benchmarks.hour.runner import Part, finished
from benchmarks.hour.work import Settings, Skip, Work
from ppflow_jax.errors import InputError
from ppflow_jax.pyramid import SIT
from tests.acceptance import gpu_hour_kills
from tests.commands import ROOT


def parts(*names: str, share: float = 1) -> list[Part]:
    return [Part(name, share, f"tests.hour_parts:{name}") for name in names]


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path / "hour", tiny=True)


@pytest.fixture
def here(settings):
    """As if begun before."""
    settings.out.mkdir()
    return settings


def run(settings, given, minutes=2.0):
    return runner.run(settings, given, minutes, probed=False)


def test_what_fails_does_not_stop_the_rest_and_is_done_again(settings):
    given = parts("fails_once", "ends", "skipped", "over", "broken", "good")
    states = run(settings, given)
    assert states == {
        "fails_once": FAILED,
        "ends": FAILED,
        "skipped": SKIPPED,
        "over": FAILED,
        "broken": FAILED,
        "good": DONE,
    }
    assert not finished(states)
    records = {part.name: settings.record(part.name) for part in given}
    reasons = {name: record.values["reason"] for name, record in records.items()}
    assert reasons["fails_once"] == "second: RuntimeError: out of luck"
    assert "exit code -9, see ends.log" in reasons["ends"]
    assert reasons["broken"] == "InputError: figures of another device"
    assert reasons["over"] == "difference: over its bound"
    assert reasons["skipped"] == "nothing of that kind is here"
    assert [row["key"] for row in records["ends"].rows] == ["kept"]
    assert "out of luck" in (settings.out / "fails_once.log").read_text()
    stamp = records["fails_once"].rows[0]
    done = (settings.out / "good.json").read_bytes()
    states = run(settings, [given[0], given[-1]])
    assert states == {"fails_once": DONE, "good": DONE} and finished(states)
    again = settings.record("fails_once")
    assert sorted(row["key"] for row in again.rows) == ["first", "second", "third"]
    assert again.rows[0] == stamp
    assert (settings.out / "good.json").read_bytes() == done


@pytest.mark.long
def test_a_part_out_of_time_is_ended_and_keeps_its_rows(settings, monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE", 1)
    begin = time.monotonic()
    states = run(settings, parts("hangs"), minutes=5 / 60)
    assert time.monotonic() - begin < 60
    assert states == {"hangs": CUT}
    record = settings.record("hangs")
    assert [row["key"] for row in record.rows] == ["kept"]
    assert record.values["reason"] == "its time was over"


def test_time_that_a_part_leaves_goes_to_those_after_it(here, monkeypatch):
    clock, given = [0.0], {}
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])

    def one(settings, part, seconds):
        given[part.name] = seconds
        clock[0] += {"a": 10.0, "b": 300.0, "c": 0.0}[part.name]
        settings.record(part.name).write(state=DONE)

    monkeypatch.setattr(runner, "_one", one)
    here.record("done").write(state=DONE)
    shares = {"a": 1, "done": 5, "b": 2, "c": 1}
    run(here, [Part(name, share, "") for name, share in shares.items()], 10)
    assert given == {"a": 150, "b": pytest.approx(590 * 2 / 3), "c": pytest.approx(290)}


def test_rows_are_kept_and_none_starts_without_time(here):
    record = here.record("part")
    record.add("old", {"value": 1})
    record.add("bad", {"error": "was"})
    left = Work(here, record, seconds=60)
    left.each([("old", lambda: pytest.fail("done before")), ("bad", lambda: {"value": 2})])
    assert here.record("part").rows[1] == {
        "key": "bad",
        "value": 2,
        "took": pytest.approx(0, abs=1),
    }
    late = Work(here, record, seconds=-1)
    late.longest = 1.0
    late.each([("old", dict), ("next", lambda: pytest.fail("no time")), ("last", dict)])
    assert here.record("part").values["left"] == ["next", "last"]


def test_a_kill_while_a_part_works_is_not_done(here):
    record = here.record("good")
    record.add("one", {"said": "before"})
    record.write(state=RUNNING)
    assert run(here, parts("good")) == {"good": DONE}
    rows = {row["key"]: row for row in here.record("good").rows}
    assert rows["one"]["said"] == "before" and set(rows) == {"one", "two"}


def test_folders_of_other_settings_and_damaged_records_are_refused(settings):
    run(settings, [])
    with pytest.raises(InputError, match="another --latents"):
        run(Settings(settings.out, True, "latents"), [])
    (settings.out / "good.json").write_text("{")
    with pytest.raises(InputError, match=r"good\.json is no record"):
        run(settings, parts("good"))


def test_without_a_device_one_line_says_so(settings, monkeypatch):
    def none(settings):
        (settings.out / "device.json").write_text('{"error": "no GPU"}')

    monkeypatch.setattr(runner, "_started", lambda target, settings: none(settings))
    monkeypatch.setattr(runner, "_ended", lambda *_: True)
    with pytest.raises(InputError, match="no device answers"):
        runner.run(settings, parts("good"), 1.0)
    assert not (settings.out / "device.json").exists()


DEVICE = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "memory": 1.1e11, "peak": 989e12}
SPEED = dict(
    attention="cudnn", batch=64, images_per_second=500.0, seconds=0.128, quartiles=[0.12, 0.13]
)
SPEED |= dict(of_ceiling=0.5, of_peak=None, ceiling=8e14, memory_bytes=10**9, compile_seconds=9.0)
ROWS = {
    "parity": dict(value=1e-7, bound=1e-5, good=True),
    "attention": dict(program="cudnn", shape=[4, 64, 2, 72], forward_ms=0.1, backward_ms=0.3)
    | dict(forward=1e-3, backward=3e-3, good=True),
    "speed": SPEED | dict(peak_bytes=2 * 10**9, peak_grew=False),
    "peer": dict(
        batch=8, ours=0.009, theirs=0.01, ratio=0.9, way="compiled", versions="JAX; torch"
    ),
    "accelerate": dict(model="SiT", name="ToMe", nfe=24, batch=8, seconds=1.0, latency=0.9)
    | dict(flops=0.8),
    "plans": dict(size="B", batch=8, steps=50, sit_seconds=1.0)
    | dict(plans=[dict(evaluations=8, seconds=0.05, faster=20.0, flops_ratio=18.0)]),
    "training": dict(loss=[[20, 1.0], [40, 0.5]], said="40 steps of digits"),
}


def test_the_report_has_every_part_and_its_failures(here):
    (here.out / "device.json").write_text(json.dumps(DEVICE | {"libraries": {"jax": "0.10.2"}}))
    for name, row in ROWS.items():
        record = here.record(name)
        record.add("train" if name == "training" else f"row of {name}", row)
        record.write(state=DONE)
    here.record("parity").add("other", ROWS["parity"] | {"good": False})
    failed = here.record("plans")
    failed.add("XL", {"error": "RESOURCE_EXHAUSTED"})
    failed.write(state=FAILED, reason="a | b", left=["B"])
    report.write(here, tuple(PARTS))
    text = (here.out / "report.md").read_text()
    for found in (
        "| other | 1.0e-07 | 1e-05 | **over** |",
        *("NVIDIA H200 (gpu), 110 GB", "no figure here says anything about speed"),
        *("| row of parity | 1.0e-07 | 1e-05 | good |", "| cudnn | 4 x 64 x 2 x 72 | 0.100 |"),
        *("| row of speed | cudnn | 64 | 500.0 | 0.1280 | 0.1200-0.1300 | 50% |  | 800.0 |",),
        *("| 1.0 | <= 2.0 | 9.0 |",),
        *("| 9.0 | 10.0 | compiled | 0.90 | good |", "| SiT | ToMe | 24 | 8 | 1.000 | 0.900 |"),
        *("| 20.0x | 18.0x |", "* train: 40 steps", "* **failed** XL: RESOURCE_EXHAUSTED"),
        *("Not done: B.", "| plans | failed | 0 | 2 | a / b |", "(images_per_second.png)"),
    ):
        assert found in text, found
    assert "grid.png" not in text
    for name in ("images_per_second.png", "loss.png"):
        assert (here.out / name).read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_can_be_read(here):
    report.write(here, tuple(PARTS))
    assert "| parity | not begun |" in (here.out / "report.md").read_text()


def test_aims_are_of_training_steps_and_only_of_real_sizes(here):
    (here.out / "device.json").write_text(json.dumps(DEVICE | {"libraries": {}}))
    steps, beside = here.record("speed"), here.record("peer")
    steps.add("train XL SiT", ROWS["speed"] | {"kind": "train", "of_ceiling": 0.49})
    steps.add("sample XL SiT", ROWS["speed"] | {"kind": "sample", "of_ceiling": 0.1})
    steps.add("train B SiT", {"error": "no memory"})
    beside.add("train B SiT", ROWS["peer"])
    for tiny in (True, False):
        report.write(Settings(here.out, tiny), tuple(PARTS))
        text = (here.out / "report.md").read_text()
        assert ("## Aims" in text) != tiny
    assert "* train XL SiT: 49% of the ceiling, 50% or more: **missed**" in text
    assert "* train B SiT: 0.90 of PyTorch's time, at most 0.9: reached" in text
    assert "* sample" not in text and text.count("reached") == 1


def test_the_first_batch_fits_and_the_next_are_smaller():
    model = models.config_of("B", SIT, tiny=True)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(model)))
    image = models.KEPT_BYTES * 16 * model.depth * model.width
    memory = (models.STATE_BYTES * parameters + 50 * image) / models.SHARE
    assert models.fitting(model, memory) == [48, 32, 24, 16, 8]
    assert models.fitting(model, None) == models.fitting(model, 1.0) == [8]


@pytest.mark.long
def test_a_batch_that_does_not_fit_is_followed_by_a_smaller_one(here, monkeypatch):
    (here.out / "device.json").write_text(json.dumps(DEVICE))
    monkeypatch.setattr(speed, "fitting", lambda *_: [96, 64, 48])

    def step(work, model, batch):
        if batch > most:
            raise jax.errors.JaxRuntimeError(f"{reason}: 96 GB")
        return {"batch": batch}

    monkeypatch.setattr(speed, "_step", step)
    work, most, reason = Work(here, here.record("speed"), 60), 64, "RESOURCE_EXHAUSTED"
    row = speed._training(work, "B", "SiT")
    assert row == {"size": "B", "model": "SiT", "batch": 64, "did_not_fit": [96]}
    most = 8
    with pytest.raises(jax.errors.JaxRuntimeError):
        speed._training(work, "B", "SiT")
    most, reason = 64, "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        speed._training(work, "B", "SiT")


def test_the_peer_is_skipped_where_it_cannot_be(here, monkeypatch):
    work = Work(here, here.record("peer"), 60)
    (here.out / "device.json").write_text(json.dumps(DEVICE | {"platform": "tpu"}))
    with pytest.raises(Skip, match="this is a tpu"):
        peer.run(work)
    (here.out / "device.json").write_text(json.dumps(DEVICE))
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Skip, match="pip install torch"):
        peer.run(work)


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
    ],
)
def test_the_makers_figure_is_of_that_device_or_unknown(kind, flops):
    assert device.peak(kind) == flops


def test_a_difference_over_its_bound_is_no_parity():
    def result(scale):
        return lambda: {"gradient": lambda: [np.full(4, scale), np.ones(2)]}

    exact = Future()
    exact.set_result(result(1.0)()["gradient"]())
    good = parity._compared("gradient", "float32", result(1 + 1e-5), exact)
    over = parity._compared("gradient", "float32", result(1 + 1e-3), exact)
    assert good["good"] and not over["good"]
    assert over["value"] == pytest.approx(1e-3 * (4 / 6) ** 0.5)


@pytest.mark.long
def test_a_killed_hour_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_hour_kills, "LONGEST", 30.0)
    wrong = gpu_hour_kills.trial(tmp_path / "hour", 1, "attention,plans", random.Random(0))
    assert not wrong


def test_every_part_has_a_function_a_table_and_a_title():
    assert set(PARTS) == set(report.TABLES) == set(report.TITLES)
    for _, target in PARTS.values():
        module, name = target.split(":")
        assert f"def {name}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()
