"""Tests of equal bits, in a process whose programs are compiled as those of users.

The others are compiled in half the time (conftest.py), by emitters whose last bits depend on where
an image is in its batch.
"""

import os
import subprocess
import sys

FILES = ("tests/generate/test_generate.py", "tests/flow/test_sampler.py")


def test_bits(request):
    command = [sys.executable, "-m", "pytest", "-m", "bits", *FILES]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        command, cwd=request.config.rootpath, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
