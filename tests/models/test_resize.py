"""Both resizes against the float64 of pytorch-fid's and TensorFlow's formula."""

from __future__ import annotations

import numpy as np
import pytest
from jax import numpy as jnp

from ppflow_jax.metrics.resize import CONVENTIONS, inception_input, resize_matrix
from tests.inception import REFERENCE


@pytest.mark.parametrize(("convention", "name"), [("tf1", "tf1"), ("torch", "pytorch")])
@pytest.mark.parametrize("image", [0, 7])  # 64x64; 640x64, which shrinks in height
def test_resize(convention, name, image):
    with np.load(REFERENCE / "resize.npz") as file:
        ours = np.asarray(inception_input(jnp.asarray(file[f"image{image}"][None]), convention))[0]
        index = file["index"]
        np.testing.assert_allclose(
            ours[np.ix_(index, index)], file[f"{name}/grid{image}"], atol=1e-6
        )


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_pictures_of_the_right_size_are_not_touched(convention):
    np.testing.assert_array_equal(resize_matrix(299, convention), np.eye(299))
