"""The Inception network against pytorch-fid: every layer and every feature.

The weights are random (`tests/inception.py`): the published ones are not part of the project.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from ppflow_jax.convert.inception_keys import inception_params
from ppflow_jax.errors import InputError
from ppflow_jax.metrics.inception import FEATURES, Inception, InceptionConfig
from tests.inception import REFERENCE, random_state

# (root mean square, maximum) of the difference, relative to the root mean square of the reference;
# of float32 networks, as suggested in the reference set
BOUNDS = {"64": (2e-6, 2e-5), "192": (3e-6, 3e-5)}
BOUND = (3e-5, 2e-4)
NAMES = {"2048": "pool3", "logits_unbiased": "logits_nobias", "64": "features_64"}
NAMES |= {"192": "features_192", "768": "features_768"}


def errors(ours, reference) -> tuple[float, float]:
    difference = np.abs(np.float64(ours) - reference)
    size = np.sqrt(np.mean(np.square(np.float64(reference))))
    return np.sqrt(np.mean(difference**2)) / size, difference.max() / size


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "image4.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def outputs(reference):
    """Maps and features of one picture at 299x299, scaled as pytorch-fid and as TensorFlow do."""
    config, params = inception_params(random_state())
    assert config == InceptionConfig(scale=True, logits=True)
    network = Inception(config)
    image = reference["image"].astype(np.float32)
    images = jnp.stack([2 * image / 255 - 1, (image - 128) / 128])

    @jax.jit
    def run(params, images):
        return network.maps(params, images), network.features(params, images, FEATURES)

    return jax.tree.map(np.asarray, run(params, images))


@pytest.mark.parametrize("name", FEATURES)
def test_features_agree_with_pytorch(reference, outputs, name):
    features = outputs[1][name]
    assert features.dtype == np.float32
    for ours, scaling in zip(features, ("pytorch", "tf1"), strict=True):
        theirs = reference[f"{scaling}/{NAMES.get(name, name)}"]
        assert ours.shape == theirs.shape
        rms, largest = errors(ours, theirs)
        bound = BOUNDS.get(name, BOUND)
        assert rms < bound[0] and largest < bound[1], (scaling, rms, largest)


def test_every_layer_agrees_with_pytorch(reference, outputs):
    found = {key.split("/")[1] for key in reference if key.startswith("taps/")}
    assert found == set(outputs[0])
    for layer, maps in outputs[0].items():
        space, channels = reference[f"taps/{layer}/step"]
        sample = maps[0, ::space, ::space, ::channels]
        for ours, part in ((sample, "sample"), (maps[0].mean((0, 1)), "channel_mean")):
            rms, largest = errors(ours, reference[f"taps/{layer}/{part}"])
            assert rms < BOUND[0] and largest < BOUND[1], (layer, part, rms, largest)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (InceptionConfig(), 21_802_784),
        (InceptionConfig(scale=True), 21_802_784 + 17_216),
        (InceptionConfig(scale=True, logits=True), 23_885_392),
    ],
)
def test_counts(config, count):
    """Of the published TorchScript archive; of the file of pytorch-fid."""
    params = Inception(config).abstract_params()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_layers_that_are_not_asked_for_are_not_computed():
    """Three convolutions have 1.2e9 floating-point operations, the whole network 1.1e10."""
    network = Inception()
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    function = jax.jit(functools.partial(network.features, names=("64",)))
    compiled = function.lower(network.abstract_params(), images).compile()
    assert 1.2e9 < compiled.cost_analysis()["flops"] < 1.4e9


def test_what_is_refused():
    network = Inception()
    params = network.abstract_params()

    def features(*names, size=299):
        images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        return jax.eval_shape(functools.partial(network.features, names=names), params, images)

    shapes = {name: value.shape for name, value in features("2048", "spatial").items()}
    assert shapes == {"2048": (2, 2048), "spatial": (2, 2023)}
    for names, size, words in (
        (("pool3",), 299, "no features pool3; choose from 64"),
        (("logits_unbiased",), 299, "no last layer"),
        (("2048",), 256, "resize them first"),
    ):
        with pytest.raises(InputError, match=words):
            features(*names, size=size)
