"""Order the hidden units of a model: python -m ppflow_jax.convert.rank --source=RUN --target=DIR

The units of every MLP of a run come in the order of their importance for its loss over all stages,
|sum w dL/dw| (Dense2MoE, arXiv 2510.09094). The model computes what it did; a model with
--config.model.ffn=dense2moe:... that starts from DIR shares the first units and deals the others to
experts. Weights that were not trained here need --config, whose data are then used.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError

_SOURCE = flags.DEFINE_string("source", None, "Workdir (its latest step) or one step.")
_TARGET = flags.DEFINE_string("target", None, "Folder of the new checkpoint.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment whose data are used; default: that of the run.", lock_config=True
)
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches over which importance is averaged.")
_BATCH = flags.DEFINE_integer("batch", 64, "Examples at once, over all devices.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the order of examples, noise and times.")


def main() -> None:
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from ppflow_jax.checkpoints.weights import open_weights, save_weights
    from ppflow_jax.files.store import check_new
    from ppflow_jax.systems.dense2moe import ordered
    from ppflow_jax.train.importance import check_measurable, unit_importance

    if jax.process_count() > 1:
        raise InputError("rank runs in one process: start it on one host")
    if min(_BATCHES.value, _BATCH.value) < 1:
        raise InputError("--batches and --batch must be at least 1")
    target = check_new(_TARGET.value)
    weights = open_weights(_SOURCE.value, _WEIGHTS.value)
    check_measurable(weights.card.model)
    trained = (weights.card.experiment or {}).get("data")
    if _CONFIG.value is None and trained is None:
        raise InputError(f"{_SOURCE.value} does not say what it was trained on: give --config")
    data = ConfigDict(trained) if _CONFIG.value is None else _CONFIG.value.data
    asked = (_BATCHES.value, _BATCH.value, _SEED.value)
    found = unit_importance(weights.card, weights.params, data, *asked)
    params = jax.tree.map(np.asarray, weights.params)
    params = params | {"blocks": ordered(params["blocks"], found)}
    save_weights(target, weights.card.alone, params)
    ranked = -np.sort(-found, axis=1)
    first = ranked[:, : found.shape[1] // 4].sum(1) / ranked.sum(1)
    print(
        f"ordered in {target}: the first quarter of the units of a block has {first.mean():.0%} of "
        f"the importance ({first.min():.0%} to {first.max():.0%})"
    )


if __name__ == "__main__":
    cli.run(main, required=("source", "target"))
