"""Eight fake CPU devices, strict shapes."""

import os

import jax
import pytest
from absl import flags

os.environ.setdefault("MPLBACKEND", "agg")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def key():
    return jax.random.key(0)
