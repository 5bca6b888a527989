"""Starting and ending a run of several processes."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import sys

import jax

from ppflow_jax.errors import InputError, RunError

# Read from the environment; all three or none. JAX_LOCAL_DEVICE_IDS, which jax reads itself,
# limits a process to some of its machine's devices.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# A process that vanished is missed after this long; its peers are then ended by jax.
HEARTBEAT_S = 60

# Exit code of a process that lost a peer: that of SIGABRT, by which jax ends it where no connection
# breaks. The same command continues from the last checkpoint.
LOST = 134
_OF_PEERS = (  # what only the connections between processes say
    r"Gloo \S+ failed|NCCL .*failed|another task died|barrier .*(timed out|failed)"
    r"|CoordinationServiceError"
)
_BROKEN = r"connect(ion)? .*(reset|closed|refused|timed out)|remote process exited|socket closed"


def initialize() -> None:
    """Join the other processes of this run; nothing for a run of one process.

    Every command that computes calls this before anything else touches a device. In this order:
    `JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=N JAX_PROCESS_ID=K`; a SLURM step of
    several tasks, or a TPU VM or GKE pod, both found by `jax.distributed`; otherwise one process.
    Processes of CPU devices talk through gloo.

    Raises:
      InputError: variables that are half given or malformed, or peers that cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    explicit = _explicit()
    if not explicit and not _slurm() and not _tpu():
        return
    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=HEARTBEAT_S)
    except (RuntimeError, ValueError) as e:
        if not explicit and "coordinator_address should be defined" in str(e):
            return  # a TPU machine that belongs to no pod
        reason = str(e).strip().splitlines()[0][:200]
        raise InputError(
            f"cannot join the other processes ({reason}): every process must be started, with "
            f"the same {VARIABLES[0]} and {VARIABLES[1]} and its own {VARIABLES[2]}"
        ) from e


def without_device() -> str | None:
    """Why JAX has no device at all and what to do; None if it has some.

    A wish for a platform whose plugin is not installed fails where a device is first needed, with
    an error of jax's own.
    """
    wish = os.environ.get("JAX_PLATFORMS", "")
    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError) as e:
        why = str(e).strip().partition(" (set JAX_PLATFORMS")[0].replace("\n", " ")[:200]
        why = f" ({why})" if why else ""
        return (
            f"JAX finds no device of JAX_PLATFORMS={wish}{why}: install the extra that drives it, "
            "pip install 'ppflow_jax[gpu]' or 'ppflow_jax[tpu]', or unset JAX_PLATFORMS"
        )


def several() -> bool:
    """Whether this process has peers; touches no device before `initialize`."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def lost_peer(error: BaseException | None) -> str:
    """The reason, if `error` is of a runtime whose connection to a peer broke; else empty.

    What a peer that died looks like to the others: the collectives of CPU devices (gloo) and of
    GPUs (NCCL) fail, as does a call to jax's coordination service, also while a checkpoint is
    written: then it is the cause of an error that speaks of the checkpoint. An error of one's own
    is none.
    """
    known = isinstance(error, (InputError, RunError, OSError))
    words = re.compile(_OF_PEERS if known else f"{_OF_PEERS}|{_BROKEN}", re.IGNORECASE)
    cause = error
    while cause is not None:
        raised = isinstance(cause, (jax.errors.JaxRuntimeError, ValueError, RuntimeError))
        if raised and not isinstance(cause, (InputError, RunError)) and words.search(str(cause)):
            return str(cause).strip().splitlines()[0][:200] if several() else ""
        cause = cause.__cause__
    return ""


def leave(code: int) -> None:
    """End this process at once, without waiting for peers, if there are any.

    A failed process must not wait for the others at jax's exit barrier: they may be waiting for
    it in a collective. When it is gone they are ended by the broken connection or, after
    `HEARTBEAT_S`, by jax's coordination service, which aborts them (SIGABRT, exit code 134).
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _explicit() -> dict[str, object]:
    """Arguments of `jax.distributed.initialize` from `VARIABLES`; empty if none is set."""
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    if not any(values.values()):
        return {}
    example = "JAX_COORDINATOR_ADDRESS=host0:12345 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0"
    if missing := [name for name, value in values.items() if not value]:
        raise InputError(f"{' and '.join(missing)} not set: give all three, e.g. {example}")
    address, count, index = values.values()
    port = address.rpartition(":")[2]
    numbers = port.isdecimal() and count.isdecimal() and index.isdecimal()
    if not numbers or ":" not in address or not 0 <= int(index) < int(count):
        given = " ".join(f"{k}={v}" for k, v in values.items())
        raise InputError(
            f"{given}: the address must be HOST:PORT and the process id a number from 0 to one "
            f"less than the number of processes, e.g. {example}"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _slurm() -> bool:
    """Inside `srun` of several tasks (an sbatch script itself has no task number)."""
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1


def _tpu() -> bool:
    """A machine with TPU chips and the library for them."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
