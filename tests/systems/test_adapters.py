"""What presets train, and the numbers of peft and of a port of DiffFit."""

from pathlib import Path

import jax
import pytest

from configs import digits
from ppflow_jax.errors import InputError
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.models.trees import leaves, split
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.adapters import PRESETS, tune
from tests.systems.checks import within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"


def test_lora_and_difffit_are_their_authors():
    ref = Reference(REFERENCE / "peft" / "peft.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS["peft"](ref))
    assert len(rows) > 40
    within(rows)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # 28 blocks of width 1152; A and B have rank 8
        ("lora", 28 * 8 * (4 + 2 + 5 + 5 + 7) * 1152),
        ("bitfit", 28 * 15 * 1152 + 4 * 1152 + 1001 * 1152),
        ("difffit", 28 * 15 * 1152 + 4 * 1152 + 1001 * 1152 + 28 * 6 * 1152),
    ],
)
def test_what_is_trained_of_the_largest_model(name, count):
    sizes = SIZES["XL"] | dict(latent_size=32, channels=4, num_classes=1000)
    config = tune(digits.get_config(), name)
    model = ModelConfig(PPFLOW2, **sizes, adapters=parse(config.model.adapters))
    chosen, rest = split(abstract_params(model), config.train.trainable)
    ends = sum(16 * k * 1152 + 1152 + 1152 * 32 * k + 32 * k for k in (1, 4)) + 2 * 1152
    assert sum(leaf.size for _, leaf in leaves(chosen)) == count + ends
    assert name == "lora" or all("kernel" in path[-1] for path, _ in leaves(rest))


def test_full_trains_all_and_other_names_are_refused():
    params = abstract_params(ModelConfig(PPFLOW2, 8, 1, 16, 1, 2, 5))
    assert split(params, PRESETS["full"].trainable)[1] == {}
    with pytest.raises(InputError, match="unknown preset 'loraa': one of full, lora"):
        tune(digits.get_config(), "loraa")
