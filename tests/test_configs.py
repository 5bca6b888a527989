from pathlib import Path

import jax
import pytest
from ml_collections import config_flags

from ppflow_jax.errors import InputError
from ppflow_jax.models.network import abstract_params
from ppflow_jax.train.experiment import Experiment

CONFIGS = sorted(p for p in Path(__file__).parents[1].joinpath("configs").glob("*.py"))
NAMES = [p.name for p in CONFIGS if p.stem not in ("common", "imagenet256", "__init__")] + [
    "digits.py:sit",
    "digits.py:levels3",
    "digits_few_steps.py:meanflow,levels3",
    "digits_few_steps.py:guided,sit",
    "digits_few_steps.py:halved",
    "digits_few_steps.py:mmd",
    "digits_mixers.py:linfusion,sit",
    "digits_mixers.py:dico",
    "digits_ddt.py:levels3",
    "rae.py:s",
    "digits_dense2moe.py:levels3",
    "digits_dense2moe.py:sit,mob",
    "dico.py:h",
    "dico.py:b,ddpm",
    "dico.py:xl,levels2",
    "digits_dico.py:levels2",
    "digits_tasks.py:inpainting",
    "digits_tasks.py:edges",
    "digits_tasks.py:cascade",
    "digits.py:difffit",
    "digits_blocks.py:dimr,levels3",
    "digits_blocks.py:selfcond,sit",
    "haste.py:sit",
    "imagenette.py:sit",
    "imagenette.py:levels3",
]


def load(name):
    path, _, variant = name.partition(":")
    namespace = {}
    source = CONFIGS[0].parent / path
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    config = namespace["get_config"](*([variant] if variant else []))
    config.lock()
    return config, namespace["__doc__"]


def test_all_sizes_and_levels_are_there():
    assert len(NAMES) >= 12 + 7
    assert config_flags is not None


def test_the_table_has_every_name_and_no_other():
    table, doc = load("imagenet256.py:ppflow_b2")
    assert table == load("ppflow_b2.py")[0] and "ppflow_xl3" in doc
    with pytest.raises(ValueError, match=r"one of sit_s, .*ppflow_xl3"):
        load("imagenet256.py:ppflow_m2")


def test_grey_digits_are_not_coloured():
    with pytest.raises(InputError, match=r"task colourisation: pictures of 1 channel\(s\) have no"):
        Experiment.from_config(load("digits_tasks.py:colourisation")[0])
    with pytest.raises(ValueError, match="one of super_resolution, inpainting"):
        load("digits_tasks.py:sharpening")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name):
    config, doc = load(name)
    experiment = Experiment.from_config(config)
    experiment.objective.check_batch(config.data.batch_size, 8)
    params = abstract_params(experiment.card.model)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(params))
    assert "python -m ppflow_jax.main" in doc


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.pyramid", "5x5@1", "not divisible"),
        ("model.dtype", "float16", "float32 or bfloat16"),
        ("flow.path", "spline", "unknown path"),
        ("flow.stage_share", (1, 2, 3), "stage_share"),
        ("flow.stage_times", ((0, 1),), "stage_times"),
        ("optim.lr", -1.0, "lr -1.0 .expected > 0"),
        ("optim.schedule", "step", "constant, cosine"),
        ("train.ema", 1.0, "ema"),
        ("train.accumulate", 0, "at least 1"),
        ("sample.cfg", (1.0, 2.0, 3.0), "give 1 or 2"),
    ],
)
def test_values_out_of_range_are_refused(path, value, words):
    config, _ = load("digits.py")
    config.update_from_flattened_dict({path: value})
    with pytest.raises(InputError, match=words):
        Experiment.from_config(config)
