"""The launch scripts, with stand-ins for the programs of the cluster."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT

LAUNCH = ROOT / "launch"
POD = ["--name=pod", "--zone=here", "--type=v5litepod-16", "--version=v2", "--repo=https://x.y/z"]
# A slice that exists when the file `state` does, whose workers are this machine.
GCLOUD = r"""
echo "$@" >> "$FAKE/calls"
case "$*" in
  *"queued-resources create"*) echo ACTIVE > "$FAKE/state" ;;
  *"queued-resources delete"*) rm "$FAKE/state" ;;
  *describe*) cat "$FAKE/state" ;;
  *ssh*)
    for word in "$@"; do case $word in --command=*) line=${word#--command=} ;; esac; done
    cd "$FAKE" && exec bash -c "$line" ;;
esac
"""


def call(script, *args, **env):
    done = subprocess.run(
        ["bash", LAUNCH / script, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PPFLOW_")} | env,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def fake(tmp_path):
    """Makes programs; gives the environment that finds them."""

    def make(**programs):
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (tmp_path / "bin" / name).chmod(0o755)
        return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAKE": str(tmp_path)}

    return make


def words(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def test_dry_run_of_a_pod():
    code, out, _ = call("tpu_pod.sh", "keep", *POD, "--spot=yes", "--dry_run", "--", "a", "b c")
    create, setup, start = words(out)
    assert code == 0
    assert " ".join(create) == (
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=here "
        "--accelerator-type=v5litepod-16 --runtime-version=v2 --spot"
    )
    for line in (setup, start):
        assert line[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
        assert "--worker=all" in line
    assert "git clone --quiet https://x.y/z" in setup[-1] and "'.[tpu]'" in setup[-1]
    code, out, _ = call("tpu_pod.sh", "stop", *POD[:2], "--project=p", "--dry_run")
    assert code == 0 and "--project=p" in out and "kill -TERM" in words(out)[0][-1]


@pytest.mark.parametrize(
    ("script", "args", "line"),
    [
        ("tpu_pod.sh", [], "give an action"),
        ("tpu_pod.sh", ["start", *POD], "unknown action 'start'"),
        ("tpu_pod.sh", ["create", "--name=a"], "--zone=... (or PPFLOW_ZONE in the environment)"),
        ("tpu_pod.sh", ["run", "--name=a", "--zone=b"], "give the command after --"),
        ("slurm.sh", ["--nodes=2", "--gpu=8"], "unknown flag --gpu; there are: nodes gpus"),
        ("slurm.sh", ["--nodes=2", "--gpus=8"], "give the command after --"),
        ("slurm.sh", ["--nodes=two", "--gpus=8", "--", "a"], "--nodes and --gpus are numbers"),
        ("slurm.sh", ["python"], "unexpected argument 'python'"),
        ("k8s.sh", ["--name=A"], "--image=..."),
        ("prepare_data.sh", ["--source=a", "--vae=b", "--out=c"], "write vae:DIR or taesd:DIR"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(script, args, line):
    dry = [] if "--" in args or not args else ["--dry_run"]
    code, out, err = call(script, *args[:1], *dry, *args[1:])
    assert code == 2 and not out
    assert err.startswith(f"{script}: ") and line in err and err.count("\n") == 1


def test_a_program_that_is_not_there_or_fails_stops_the_script(fake):
    args = ["--source=a", "--vae=vae:b", "--out=c"]
    code, _, err = call("prepare_data.sh", *args, "--python=no-such-python")
    assert code == 2 and "no-such-python is not installed here" in err
    env = fake(python='echo "$@" >> "$FAKE/calls"; exit 7')
    code, _, err = call("prepare_data.sh", *args, **env)
    assert code == 7 and "prepare_data.sh: stopped, exit code 7" in err
    assert len(Path(env["FAKE"], "calls").read_text().splitlines()) == 1


def test_data_preparation(tmp_path):
    args = ["--source=images:a b", f"--vae=taesd:{tmp_path}/w", "--out=o", "--dry_run"]
    lines = words(call("prepare_data.sh", *args, "--weights=f", "--", "--flips=both")[1])
    assert [line[:3] for line in lines] == [
        ["python", "-m", "ppflow_jax.convert"],
        ["python", "-m", "ppflow_jax.prepare"],
        ["python", "-m", "ppflow_jax.prepare"],
    ]
    assert "--source=images:a b" in lines[1] and "--flips=both" in lines[1]
    assert lines[2][3:] == ["--out=o", "--verify"]
    (tmp_path / "w").mkdir()
    assert len(words(call("prepare_data.sh", *args, "--weights=f")[1])) == 2


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_run_on_a_pod_is_stopped_and_says_so(fake):
    env = fake(gcloud=GCLOUD)
    folder = Path(env["FAKE"], "ppflow_jax")
    folder.mkdir()
    script = """trap 'echo "it'"'"'s me"; exit 75' TERM; touch up; sleep 60 & wait"""
    args = [*POD[:2], "--", "bash", "-c", script]
    assert call("tpu_pod.sh", "run", *args, **env)[0] == 0
    code, _, err = call("tpu_pod.sh", "run", *args, **env)
    assert code == 1 and "already running" in err
    wait_for(folder / "up")
    assert call("tpu_pod.sh", "stop", *POD[:2], **env)[0] == 0
    wait_for(folder / "exit_code")
    assert (folder / "exit_code").read_text() == "75\n"
    assert "it's me" in (folder / "run.log").read_text()


def test_a_pod_is_kept_through_stops_and_preemption(fake):
    # the first run is stopped, during the second the slice is taken, the third ends
    run = """cd "$FAKE"; echo x >> runs
    case $(wc -l < runs) in 1) exit 75 ;; 2) echo SUSPENDED > state; exit 143 ;; esac"""
    env = fake(gcloud=GCLOUD, python3="", train=run)
    folder = Path(env["FAKE"], "ppflow_jax")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "pip").symlink_to("/bin/true")
    code, out, err = call("tpu_pod.sh", "keep", *POD, "--poll=0.1", "--", "train", **env)
    assert code == 0 and "tpu_pod.sh: done" in out, err
    calls = Path(env["FAKE"], "calls").read_text()
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 1
    assert len(Path(env["FAKE"], "runs").read_text().splitlines()) == 3
    fake(train="exit 1")
    code, _, err = call("tpu_pod.sh", "keep", *POD, "--poll=0.1", "--", "train", **env)
    assert code == 0  # the slice is there and its last run has ended well
    call("tpu_pod.sh", "run", *POD[:2], "--", "train", **env)
    code, _, err = call("tpu_pod.sh", "keep", *POD, "--poll=0.1", "--", "train", **env)
    assert code == 2 and "the run failed" in err


def test_slurm_submission():
    args = ["--nodes=4", "--gpus=8", "--time=1:00:00", "--dry_run", "--", "python", "-m", "x y"]
    code, out, _ = call("slurm.sh", *args)
    (line,) = words(out)
    assert code == 0 and line[:3] == ["sbatch", "--nodes=4", "--gpus-per-node=8"]
    assert "--export=ALL,PPFLOW_GPUS=8,PPFLOW_RESTARTS=100" in line and "--time=1:00:00" in line
    assert line[-4].endswith("launch/slurm.sbatch") and line[-3:] == ["python", "-m", "x y"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (134, 0, True), (75, 9, False)],
)
def test_a_slurm_job_is_requeued_if_it_can_go_on(fake, code, restarts, requeued):
    env = fake(
        srun=f'echo "$JAX_LOCAL_DEVICE_IDS $@" >> "$FAKE/calls"; exit {code}',
        scontrol='echo "$@" >> "$FAKE/calls"',
    ) | {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restarts), "PPFLOW_RESTARTS": "9"}
    got = call("slurm.sbatch", "python", "-m", "x", PPFLOW_GPUS="4", **env)[0]
    calls = Path(env["FAKE"], "calls").read_text().splitlines()
    assert calls[0] == "0,1,2,3 --kill-on-bad-exit=1 python -m x"
    assert calls[1:] == (["requeue 12"] if requeued else [])
    assert got == (0 if requeued else code)


def test_the_script_of_a_slurm_job_outlives_sigterm(fake):
    env = fake(srun='touch "$FAKE/up"; sleep 1; exit 75', scontrol='echo "$@" >> "$FAKE/calls"')
    env = os.environ | env | {"SLURM_JOB_ID": "12", "PPFLOW_GPUS": "1"}
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "x"], env=env)
    wait_for(Path(env["FAKE"], "up"))
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert Path(env["FAKE"], "calls").read_text() == "requeue 12\n"


def test_kubernetes_manifest():
    args = ["--name=b2", "--image=r.io/p:1", "--nodes=4", "--gpus=8", "--claim=disk", "--dry_run"]
    code, out, _ = call("k8s.sh", *args, "--", "python", "-m", "x", '--a="b\\c"')
    service, job = yaml.safe_load_all(out)
    assert code == 0 and "${" not in out
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": "b2"}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    rules = {r["action"]: r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [1, 2], "Ignore": [75]}
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "x", '--a="b\\c"']
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == "b2-0.b2:8476" and pod["subdomain"] == "b2"
    assert env["JAX_NUM_PROCESSES"] == "4" and pod["restartPolicy"] == "Never"
