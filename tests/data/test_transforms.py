import jax
import numpy as np

from ppflow_jax.data.transforms import to_uint8


def test_rounding_is_one_on_the_host_and_on_the_device():
    """Also at the edges between two values, where a fused multiply-add would differ."""
    edges = ((np.arange(257) - 128) / 127.5).astype(np.float32)
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 10**6).astype(np.float32)
    x = np.concatenate([x, edges, np.nextafter(edges, np.float32(2))])
    host = to_uint8(x)
    np.testing.assert_array_equal(host, np.clip(127.5 * x + 128, 0, 255).astype(np.uint8))
    np.testing.assert_array_equal(jax.jit(to_uint8)(x), host)
    np.testing.assert_array_equal(to_uint8(jax.numpy.asarray(x)), host)
    some = np.float32([-2, -1, -1 + 1 / 127.5, 0, 0.5 / 127.5, 1, 3])
    assert to_uint8(some).tolist() == [0, 0, 1, 128, 128, 255, 255]
