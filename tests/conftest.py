"""Eight fake CPU devices, strict shapes."""

import os

import jax
import pytest
from absl import flags

os.environ.setdefault("MPLBACKEND", "agg")
# Compiling is most of the time of these small programs: LLVM need not polish them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def key():
    return jax.random.key(0)
