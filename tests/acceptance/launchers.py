"""Runs of two processes under every launcher, preempted, against a run that was left alone.

    python -m tests.acceptance.launchers --out=DIR [--only=NAME,...]

The launch scripts start a small training of two real processes through stand-ins for `sbatch`,
`kubectl`, `ssh` and `gcloud` (tests/launch/standins.py, kubectl.py), which start them on this
machine. Once training, one process gets SIGTERM, as from a machine that is taken; or both its
process and the shell around it are killed without a word; or, for `tpu_pod`, the metadata server
gives notice. The launcher must start the run again by itself. Prints a table. Exit code 0 only if
every run ends, resumed, with all arrays of the state (parameters, EMA, moments) of the run left
alone, to the last bit.
"""

from __future__ import annotations

import argparse
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ppflow_jax.console import table
from ppflow_jax.train.metrics_log import read_metrics
from tests.acceptance import kill_resume
from tests.acceptance.kill_resume import data, final_state
from tests.launch import standins

# All; a run is disturbed after so many, which is after a checkpoint. The others must outlast the
# second in which a notice is noticed.
STEPS, AFTER = 200, 12
COMMAND = [
    *kill_resume.COMMAND,
    "--config.model.pyramid=4x4@1",
    "--config.model.width=16",
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=10",
]
GPU = ["--nodes=2", "--gpus=1"]
PATIENCE = 1200  # seconds for a whole run
NOTICE = {"preempted": b"FALSE"}


def kubernetes(pod: str, number: int) -> Callable[[Path], None]:
    """Ends one pod, as if its node were taken."""

    def preempt(folder: Path) -> None:
        if number == signal.SIGTERM:
            (folder / "disrupted").mkdir()
            (folder / "disrupted" / pod).touch()
        os.killpg(int((folder / "pids" / pod).read_text()), number)

    return preempt


def of_slurm(folder: Path) -> None:
    for k in range(2):  # all tasks get it
        standins.preempt(folder, k)


def on_host(number: int) -> Callable[[Path], None]:
    def preempt(folder: Path) -> None:
        pid = int((folder / "home" / "127.0.0.1" / "run.1.pid").read_text())
        if number == signal.SIGKILL:
            os.killpg(os.getpgid(pid), number)
        else:
            os.kill(pid, number)

    return preempt


def by_notice(folder: Path) -> None:
    NOTICE["preempted"] = b"TRUE"
    time.sleep(5)
    NOTICE["preempted"] = b"FALSE"


JOB = ["--name=b2", "--image=i", *GPU, "--claim=c"]
SLICES = ["run", "--name=xl", "--image=i", "--type=v5e:2x4"]
HOSTS = ["keep", "--hosts=localhost,127.0.0.1", "--dir=.", "--poll=1"]
POD = ["keep", "--name=p", "--zone=z", "--type=v5litepod-8", "--version=v", "--repo=r", "--poll=1"]
# name: script, its flags, what happens to the run
CASES = {
    "slurm": ("slurm.sh", GPU, of_slurm),
    "kubernetes": ("k8s.sh", JOB, kubernetes("b2-1", signal.SIGTERM)),
    "kubernetes, lost": ("k8s.sh", JOB, kubernetes("b2-1", signal.SIGKILL)),
    "gke_tpu": ("gke_tpu.sh", SLICES, kubernetes("xl-slice-0-1", signal.SIGTERM)),
    "gke_tpu, lost": ("gke_tpu.sh", SLICES, kubernetes("xl-slice-0-0", signal.SIGKILL)),
    "ssh": ("ssh.sh", HOSTS, on_host(signal.SIGTERM)),
    "ssh, lost": ("ssh.sh", HOSTS, on_host(signal.SIGKILL)),
    "tpu_pod, notice": ("tpu_pod.sh", POD, by_notice),
}


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a Google machine."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(NOTICE["preempted"])

    def log_message(self, *_: object) -> None:
        pass


def of_processes(out: Path) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def environment(folder: Path, metadata: str) -> dict[str, str]:
    env = standins.install(folder, **standins.ALL, python3="")
    port = str(free_port())
    for k in range(2):  # what setup would make on the workers of a slice
        clone = folder / "home" / str(k) / "ppflow_jax"
        (clone / ".venv" / "bin").mkdir(parents=True)
        (clone / ".venv" / "bin" / "pip").symlink_to("/bin/true")
        for name in ("launch", "configs"):
            (clone / name).symlink_to(standins.LAUNCH.parent / name)
    (folder / "home" / "localhost").mkdir()
    (folder / "home" / "127.0.0.1").mkdir()
    return (
        env
        | of_processes(folder.parent)
        | {
            "PYTHONPATH": str(standins.LAUNCH.parent),
            "PPFLOW_METADATA": metadata,
            "PPFLOW_PORT": port,  # of ssh.sh
            "PORT": port,  # of the stand-in of gcloud
            "WORKERS": "2",
            "SLURM_JOB_ID": str(os.getpid() % 4000),  # makes the port of jax
        }
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def left_alone(workdir: Path) -> dict[str, np.ndarray]:
    """The state that two processes end with, started by nobody but this one."""
    env = os.environ | of_processes(workdir.parent.absolute())
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = [*COMMAND, f"--config.data.path={data(workdir.parent)}", f"--workdir={workdir}"]
    log = workdir.with_suffix(".log").open("w")
    both = [
        subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(k)}, stdout=log, stderr=log)
        for k in range(2)
    ]
    if any([process.wait() for process in both]):
        raise SystemExit(f"the run left alone failed: see {log.name}")
    return final_state(workdir)


def launched(folder: Path, case: str, metadata: str) -> str:
    """Run one case; what is wrong, or empty."""
    script, flags, preempt = CASES[case]
    workdir = (folder / "run").absolute()
    folder.mkdir(parents=True)
    root = standins.LAUNCH.parent
    arguments = [a.replace("configs/", f"{root}/configs/") for a in COMMAND]
    arguments += [f"--config.data.path={data(folder.parent.absolute())}", f"--workdir={workdir}"]
    log = (folder / "log").open("w")
    running = subprocess.Popen(
        ["bash", standins.LAUNCH / script, *flags, "--", *arguments],
        env=environment(folder.absolute(), metadata),
        stdout=log,
        stderr=log,
        cwd=root,
    )
    deadline = time.monotonic() + PATIENCE
    saved = workdir / "checkpoints" / "10"
    while len(read_metrics(workdir / "metrics.jsonl")) < AFTER or not saved.exists():
        if running.poll() is not None or time.monotonic() > deadline:
            running.kill()
            return f"did not train: see {log.name}"
        time.sleep(0.05)
    preempt(folder.absolute())
    at = len(read_metrics(workdir / "metrics.jsonl"))
    try:
        code = running.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        running.kill()
        return f"hangs: see {log.name}"
    print(f"  {case}: exit code {code}, disturbed after about {at} steps", flush=True)
    return "" if code == 0 else f"exit code {code}: see {log.name}"


def restarted(folder: Path) -> bool:
    """Whether a later start went on from a checkpoint, as its first line says."""
    logs = [folder / "log", *folder.glob("home/*/run.*.log"), *folder.glob("home/*/*/run.log")]
    return any("continuing from step" in path.read_text() for path in logs if path.exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(name.replace(", ", "-") for name in CASES))
    args = parser.parse_args()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    alone = args.out / "alone"
    args.out.mkdir(parents=True, exist_ok=True)
    whole = final_state(alone) if alone.exists() else left_alone(alone)
    rows, ok = [("launcher", "what happened", "state")], True
    for case in CASES:
        if case.replace(", ", "-") not in args.only.split(","):
            continue
        folder = args.out / case.replace(", ", "-")
        wrong = launched(folder, case, f"http://127.0.0.1:{server.server_port}/")
        if not wrong and not restarted(folder):
            wrong = "was not resumed"
        if not wrong:
            ours = final_state(folder / "run")
            different = [k for k in whole if not np.array_equal(whole[k], ours.get(k))]
            if ours.keys() != whole.keys() or different:
                wrong = f"{len(different)} arrays differ"
        ok &= not wrong
        rows.append((case, wrong or "resumed", f"equal, {len(whole)} arrays" if not wrong else ""))
        print("  " + ": ".join(rows[-1]), flush=True)  # a run that is cut off has said so much
    print(table(rows, left=(0, 1, 2)))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
