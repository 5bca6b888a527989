import dataclasses
import json

import numpy as np
import pytest

from ppflow_jax.cost import calibrate, calibration
from ppflow_jax.cost.calibration import Calibration, Fit, sampling_counts, training_counts
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops, training_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2, SIT
from tests.commands import ROOT, SMALL, run

MODEL = ModelConfig(PPFLOW2, 8, 4, width=32, depth=2, heads=2, num_classes=10)
MADE = dict(device="a machine", jax="1", date="2026-01-01", dtype="float32", ceiling=1e9)
FIT = Fit((1e-12, 2e-12, 1e-10, 1e-9, 1e-5, 1e-3), 0.05)
KEPT = Calibration(**MADE, memory_rate=1e9, fits={"train": FIT, "sample": FIT})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ppflow_jax" / "calibration.json"


def here(**other):
    facts = dict(device=calibration.device_name(), jax=calibration.jax.__version__)
    return dataclasses.replace(KEPT, **facts | other)


def test_counts_have_all_flops():
    counts = training_counts(MODEL, (0, 1), 1000, 8.0, (1,))
    assert counts[0] + counts[1] == pytest.approx(training_flops(MODEL, (0, 1), 8, (1,)))
    assert tuple(counts[3:]) == (1000, 2 * 2, 1)
    steps = plan(SamplerConfig("euler", 4, cfg=(1.0, 2.0)), PPFLOW2, Flow())
    found = sampling_counts(MODEL, steps, 1000, 3.0)
    assert found[0] + found[1] == pytest.approx(3 * sampling_flops(MODEL, steps))
    assert tuple(found[3:]) == (4000, 8, 2)  # two steps of each stage


def test_prices_are_found_again_and_never_negative():
    random = np.random.default_rng(0)
    counts = random.uniform(0.1, 1, (9, 6)) * [1e10, 1e9, 1e8, 1e7, 10, 1]
    fit = Fit.of(list(counts), list(counts @ FIT.prices))
    np.testing.assert_allclose(fit.prices, FIT.prices, rtol=1e-6)
    assert fit.spread < 1e-9
    assert fit.range(counts[0])[1] == pytest.approx(1.1 * fit.seconds(counts[0]))
    noisy = Fit.of(list(counts), list(counts @ FIT.prices * random.uniform(0.5, 1.5, 9)))
    assert min(noisy.prices) >= 0 and noisy.spread > 0.05
    low, high = noisy.range(counts[0])
    assert high / low == pytest.approx((1 + noisy.spread) / (1 - noisy.spread))


def test_kept_and_read_again(cache):
    assert here().write() == cache
    assert Calibration.read() == here()


@pytest.mark.parametrize(
    ("other", "words"),
    [(dict(device="another"), "is of device another"), (dict(jax="0.1"), "is of jax 0.1")],
)
def test_stale_ones_are_refused(cache, other, words):
    here(**other).write()
    with pytest.raises(InputError, match=words):
        Calibration.read()


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"fits": {"train": {"prices": [1]}}})])
def test_damaged_ones_are_refused(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.raises(InputError, match=r"cannot read.*--calibrate"):
        Calibration.read()


def test_a_dry_run_of_this_machine(cache):
    args = [f"--config={ROOT}/configs/digits.py", "--dry_run=here", *SMALL]
    code, _, err = run("main", *args)
    assert code == 1 and "has not been measured: run: ppflow bench --calibrate" in err
    here().write()
    code, out, err = run("main", *args)
    assert code == 0, err
    assert "from programs timed on this machine" in out and "at best" in out and "at worst" in out
    assert "6 steps of 16 images: 0.1 epochs of 1,797 examples (the data)" in out
    code, _, err = run("main", *args, "--config.model.dtype=bfloat16")
    assert code == 1 and "measured in float32" in err and "--dtype=bfloat16" in err


@pytest.mark.long
def test_a_measurement(cache, monkeypatch):
    monkeypatch.setattr(calibrate, "CPU", ((SIT, 4, 32, 1, 4), (PPFLOW2, 8, 32, 1, 4)))
    monkeypatch.setattr(calibrate, "COPIED", 64)
    monkeypatch.setattr(calibrate.Ceiling, "time", lambda self: self.seconds.append(1.0))
    found = calibrate.calibrate("float32", 2)
    assert found.device == calibration.device_name() and found.memory_rate > 0
    assert all(fit.spread < 1 for fit in found.fits.values())
    assert "plain products" in calibrate.text(found)
    found.write()
    assert Calibration.read() == found
