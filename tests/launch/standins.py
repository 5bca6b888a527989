"""Stand-ins for the programs of a cluster: they start the processes of a run on this machine.

Each is a program in a folder `bin`, found by PATH. They keep what they know in the folder that the
environment variable FAKE names: `calls` (their arguments, a line a call), `pids` (of what was
started, by `name`, to be preempted by a test), and what is said with each of them below.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.commands import ROOT

LAUNCH = ROOT / "launch"
# A slice that exists when the file `state` does. Its WORKERS (1) are folders,
# home/K. GKE and Cloud TPU tell jax by TPU variables who its peers are; CPU devices need JAX's own.
GCLOUD = r"""
echo "$@" >> "$FAKE/calls"
case "$*" in
  *"queued-resources create"*) echo ACTIVE > "$FAKE/state" ;;
  *"queued-resources delete"*) rm "$FAKE/state" ;;
  *describe*) cat "$FAKE/state" ;;
  *ssh*)
    for word in "$@"; do
      case $word in
        --command=*) line=${word#--command=} ;;
        --worker=*) which=${word#--worker=} ;;
      esac
    done
    [ "$which" != all ] || which=$(seq 0 $((${WORKERS:-1} - 1)))
    for k in $which; do
      mkdir -p "$FAKE/home/$k" && cd "$FAKE/home/$k" || exit
      if ((${WORKERS:-1} > 1)); then
        export JAX_COORDINATOR_ADDRESS=localhost:$PORT JAX_NUM_PROCESSES=$WORKERS JAX_PROCESS_ID=$k
      fi
      HOME=$PWD bash -c "$line" || exit
    done ;;
esac
"""
# Hosts are folders of this machine, home/NAME.
SSH = r"""
echo "$@" >> "$FAKE/calls"
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
[[ ! -e $FAKE/down.$1 ]] || { echo "ssh: connect to host $1: Connection timed out" >&2; exit 255; }
mkdir -p "$FAKE/home/$1" && cd "$FAKE/home/$1" && HOME=$PWD exec bash -c "$2"
"""
# Runs the job at once; one that is requeued runs again.
SBATCH = r"""
echo "$@" >> "$FAKE/calls"
export SLURM_JOB_ID=${SLURM_JOB_ID:-12} SLURM_RESTART_COUNT=0
while [[ $1 == --* ]]; do
  case $1 in
    --nodes=*) export NODES=${1#*=} ;;
    --export=ALL,*) IFS=, read -ra set <<< "${1#--export=ALL,}"; export "${set[@]}" ;;
  esac
  shift
done
while true; do
  rm -f "$FAKE/requeued"
  bash "$@"
  code=$?
  [[ -e $FAKE/requeued ]] || exit "$code"
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
SCONTROL = r"""echo "$@" >> "$FAKE/calls"; touch "$FAKE/requeued" """
# One task a node, all on this machine; the exit code is the highest.
SRUN = r"""
echo "$JAX_LOCAL_DEVICE_IDS $1" >> "$FAKE/calls"
shift
export SLURM_NTASKS=${NODES:-1} SLURM_STEP_NODELIST=localhost SLURM_LOCALID=0
mkdir -p "$FAKE/pids"
for ((k = 0; k < SLURM_NTASKS; k++)); do
  SLURM_PROCID=$k setsid "$@" &
  pids[k]=$!
  echo $! > "$FAKE/pids/$k"
done
worst=0
for pid in "${pids[@]}"; do
  wait "$pid"
  code=$?
  ((code <= worst)) || worst=$code
done
exit $worst
"""
KUBECTL = f'exec {sys.executable} -P {ROOT}/tests/launch/kubectl.py "$@"\n'
ALL = {
    "gcloud": GCLOUD,
    "ssh": SSH,
    "sbatch": SBATCH,
    "scontrol": SCONTROL,
    "srun": SRUN,
    "kubectl": KUBECTL,
}


def install(folder: Path, **programs: str) -> dict[str, str]:
    """Write bash programs to `folder`/bin; the environment that finds them there."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PPFLOW_", "JAX_", "SLURM_"))}
    metadata = "http://127.0.0.1:9/preempted"  # nobody listens: not a machine of Google
    found = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "FAKE": str(folder)}
    return env | found | {"PPFLOW_METADATA": metadata}


def call(script: str, *args: object, **env: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a launch script."""
    done = subprocess.run(
        ["bash", LAUNCH / script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env or {k: v for k, v in os.environ.items() if not k.startswith("PPFLOW_")},
    )
    return done.returncode, done.stdout, done.stderr


def pids(folder: Path, count: int) -> list[int]:
    """Of what the stand-ins have started, in the order of its names; waits for `count` of them."""
    for _ in range(1500):
        found = [path.read_text().strip() for path in sorted(folder.glob("pids/*"))]
        if len(found) >= count and all(found):
            return [int(pid) for pid in found]
        time.sleep(0.02)
    raise TimeoutError(f"{found} of {count} processes")


def preempt(folder: Path, which: int = 0, number: int = signal.SIGTERM) -> None:
    """Signal one of the processes, and the shell around it."""
    os.killpg(pids(folder, which + 1)[which], number)
