import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.models.patch import patchify, positions, unpatchify
from ppflow_jax.pyramid import PPFLOW3, SIT, Pyramid


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (2, 4), (4, 2), (8, 8)])
def test_unpatchify_inverts_patchify(patch):
    x = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 64 // np.prod(patch), np.prod(patch) * 3)
    np.testing.assert_array_equal(unpatchify(tokens, (8 // patch[0], 8 // patch[1]), patch), x)
    # the first token is the top-left patch, row by row, channels last
    np.testing.assert_array_equal(tokens[0, 0], x[0, : patch[0], : patch[1]].ravel())


def test_coarse_tokens_stand_where_their_first_fine_token_stands():
    fine = positions(PPFLOW3, 2, 16, 32).reshape(8, 8, 32)
    np.testing.assert_array_equal(positions(PPFLOW3, 0, 16, 32).reshape(4, 4, 32), fine[::2, ::2])
    np.testing.assert_array_equal(positions(PPFLOW3, 1, 16, 32).reshape(8, 4, 32), fine[:, ::2])
    np.testing.assert_array_equal(positions(SIT, 0, 16, 32), fine.reshape(64, 32))


def test_first_half_of_the_features_encodes_the_column():
    p = positions(Pyramid.parse("1x1@1"), 0, 4, 16).reshape(4, 4, 16)
    assert np.ptp(p[..., :8], axis=0).max() == 0 and np.ptp(p[..., 8:], axis=1).max() == 0
