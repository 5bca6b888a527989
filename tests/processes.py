"""Runs of several processes on this machine."""

import os
import socket
import subprocess
import sys

from tests.commands import ROOT


class Group:
    """Processes of one run, each with so many fake devices."""

    def __init__(self, count: int, devices: int):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
        }

    def start(self, index: int, config: str, *args: str) -> subprocess.Popen[str]:
        """`python -m ppflow_jax.main --config=configs/CONFIG ARGS` as one of the processes."""
        return subprocess.Popen(
            [sys.executable, "-m", "ppflow_jax.main", f"--config=configs/{config}", *args],
            cwd=ROOT,
            env=self.env | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
