import importlib

import numpy as np
import pytest

from benchmarks import hours_table
from ppflow_jax.cost.chips import CHIPS, GPUS
from ppflow_jax.cost.estimate import IMAGENET, Times, examples, sampler_bytes, training_bytes
from ppflow_jax.cost.published import REACHED, Reached, Share
from ppflow_jax.cost.report_text import duration
from ppflow_jax.models.flops import forward_flops

HALF = Reached(Share(0.5, "a run"), Share(0.1, "another"))


def config(name="ppflow_xl2"):
    return importlib.import_module(f"configs.{name}").get_config()


def test_times_are_ordered_and_wait_where_links_are_slow():
    assert Times.of(dict(compute=2.0, memory=1.0, links=0.5), HALF) == (2, 4, 20)
    # links bind: hidden at best, behind the work otherwise, whatever the share
    assert Times.of(dict(compute=1.0, memory=2.0, links=30.0), HALF) == (30, 32, 32)


def test_every_chip_has_figures_and_a_source():
    assert REACHED.keys() == (CHIPS | GPUS).keys()
    for best, diffusion in REACHED.values():
        assert 0 < diffusion.value <= best.value < 1
        assert best.source and diffusion.source


def test_collectives_take_all_axes_that_they_span():
    chip = CHIPS["v5p"]
    assert chip.sending_rate("4x4x4", (4, 1, 1)) == 2 * chip.link_rate  # a torus: both ways
    assert chip.sending_rate("4x4x4", (4, 2, 1)) == 3 * chip.link_rate  # half an axis is open
    assert chip.sending_rate("4x4x4") == 6 * chip.link_rate
    assert chip.sending_rate("2x2x1") == 2 * chip.link_rate  # open, two axes
    assert chip.sending_rate("4x4x4", (1, 1, 1)) == chip.link_rate  # the devices of one chip
    assert GPUS["h100"].sending_rate("8") == 450e9


def test_a_table_of_one_chip_agrees_with_arithmetic():
    case = hours_table.Case("xl", "sit")
    flops = 3 * 256 * forward_flops(case.model, 0)
    found = hours_table.times(case.training(1), "a100", "1", 1)
    assert found.limits == pytest.approx(flops / 312e12)  # one GPU sends nothing, and HBM keeps up
    assert found.best == pytest.approx(flops / 312e12 / 0.642)
    eight = case.training(8)
    assert eight.sent == pytest.approx(2 * 2 * case.parameters * 7 / 8)
    assert case.sampling(1).flops == pytest.approx(32 * 2 * 99 * forward_flops(case.model, 0), 0.02)


def test_published_runs_that_set_the_slow_end_lie_at_it():
    rows = [line for line in hours_table.runs() if "sets the slow end" in line]
    assert len(rows) == 2 and all("| yes |" in row for row in rows)


# Temporaries that libtpu counts for ppflow_xl2: python -m benchmarks.scaling_table on v5e, and
# --config=ppflow_xl2 --dry_run=tpu:v5p:4x4x4
@pytest.mark.parametrize(
    ("remat", "shards", "images", "counted"),
    [("dots", 16, 16, 2.31e9), ("dots", 16, 4, 0.74e9), ("none", 1, 4, 6.52e9)],
)
def test_memory_by_formula_is_near_what_a_compiler_counts(remat, shards, images, counted):
    c, model = config(), hours_table.Case("xl", "2").model
    c.model.remat = remat
    weights = 4 * 675_059_488 // shards
    each = {0: images / 2, 1: images / 2}
    found = training_bytes(c, model, weights, each)
    assert found == pytest.approx(counted, rel=0.15)
    kept = found - training_bytes(c, model, weights, {0: 0.0})
    c.train.accumulate = 2
    assert found - training_bytes(c, model, weights, each) == pytest.approx(kept / 2)
    assert sampler_bytes(c, model, 4 * 675_059_488, 1.0) == pytest.approx(1.376e9, rel=0.05)


def test_examples_are_counted_where_they_are(tmp_path):
    assert examples(config("digits")) == (1797, "the data")
    c = config("imagenette")
    c.data.path = str(tmp_path)
    np.save(tmp_path / "latents.npy", np.zeros((6, 16, 16, 4), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(6, np.int32))
    assert examples(c) == (6, "the data")
    c.data.path = str(tmp_path / "elsewhere")
    count, why = examples(c)
    assert count == 0 and "cannot read" in why
    assert examples(config("sit_xl")) == (IMAGENET, "ImageNet")


def test_durations_have_units():
    assert [duration(s) for s in (432_000.0, 90.0, 5.25)] == ["120.0 h", "1.5 min", "5.2 s"]


@pytest.mark.long
def test_the_page_is_what_the_command_writes():
    assert hours_table.PAGE.read_text() == hours_table.document()
