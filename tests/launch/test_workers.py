"""Machines reached by ssh: launch/worker.sh, launch/tpu_pod.sh and launch/ssh.sh."""

import http.server
import os
import signal
import subprocess
import threading
import time

import pytest

from tests.launch.standins import GCLOUD, LAUNCH, SSH, call, install
from tests.launch.test_scripts import POD, pasted

SAVES = """trap 'echo "it'"'"'s me"; exit 75' TERM; touch up; sleep 60 & wait"""
HOSTS = ["--hosts=a,me@b", "--dir=.", "--poll=0.1"]


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), path


def clone(folder):
    """What setup would have made on a worker, but for its Python."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "pip").symlink_to("/bin/true")
    (folder / "launch").symlink_to(LAUNCH)
    return folder


def test_dry_run_of_a_pod(tmp_path):
    args = ["keep", *POD, "--spot=yes", "--dry_run", "--", "a", "b c"]
    create, check, setup, start = pasted(tmp_path, call("tpu_pod.sh", *args)[1])
    assert " ".join(create) == (
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=here "
        "--accelerator-type=v5litepod-16 --runtime-version=v2 --spot"
    )
    for line in (check, setup, start):
        assert line[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
        assert "--worker=all" in line
    assert "version_info < (3, 11)" in check[-1] and "clone" not in check[-1]
    assert "git clone --quiet https://x.y/z" in setup[-1] and '".[tpu]"' in setup[-1]
    args = ["stop", *POD[:2], "--project=p", "--dry_run"]
    (stop,) = pasted(tmp_path, call("tpu_pod.sh", *args)[1])
    assert "--project=p" in stop and stop[-1].endswith("launch/worker.sh stop run")


def test_a_run_on_a_pod_is_stopped_and_says_so(tmp_path):
    env = install(tmp_path, gcloud=GCLOUD)
    folder = clone(tmp_path / "home" / "0" / "ppflow_jax")
    args = [*POD[:2], "--", "bash", "-c", SAVES]
    assert call("tpu_pod.sh", "run", *args, **env)[0] == 0
    wait_for(folder / "up")
    code, _, err = call("tpu_pod.sh", "run", *args, **env)
    assert code == 2 and "run is already running" in err
    assert call("tpu_pod.sh", "stop", *POD[:2], **env)[0] == 0
    wait_for(folder / "run.code")
    assert (folder / "run.code").read_text() == "75\n"
    assert "it's me" in (folder / "run.log").read_text()
    code, _, err = call("tpu_pod.sh", "stop", *POD[:2], **env)
    assert code == 2 and "run is not running" in err


def test_a_pod_is_kept_through_stops_and_preemption(tmp_path):
    # the first run is stopped, during the second the slice is taken, the third ends
    run = """cd "$FAKE"; echo x >> runs
    case $(wc -l < runs) in 1) exit 75 ;; 2) echo SUSPENDED > state; exit 143 ;; esac"""
    env = install(tmp_path, gcloud=GCLOUD, python3="", train=run)
    clone(tmp_path / "home" / "0" / "ppflow_jax")
    args = ["keep", *POD, "--poll=0.1", "--", "train"]
    code, out, err = call("tpu_pod.sh", *args, **env)
    assert code == 0 and "tpu_pod.sh: done" in out, err
    calls = (tmp_path / "calls").read_text()
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 1
    assert len((tmp_path / "runs").read_text().splitlines()) == 3
    install(tmp_path, train="exit 1")
    code, _, err = call("tpu_pod.sh", *args, **env)  # the slice is there, and starts the run again
    assert code == 2 and "the run failed (1)" in err
    install(tmp_path, train="exit 134")
    code, _, err = call("tpu_pod.sh", *args[:-2], "--restarts=2", "--", "train", **env)
    assert code == 2 and "ended with 134 after 2 restarts" in err


@pytest.fixture
def metadata():
    """(address, folder-like setter) of a metadata server whose answer can be changed."""
    answer = {"preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if asked else 403)
            self.end_headers()
            self.wfile.write(answer["preempted"].encode() if asked else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", answer
    server.shutdown()


def worker(folder, *args, **env):
    """(exit code, stdout, stderr) of launch/worker.sh in `folder`."""
    done = subprocess.run(
        ["bash", LAUNCH / "worker.sh", *args], cwd=folder, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_a_notice_of_preemption_becomes_sigterm(tmp_path, metadata):
    address, answer = metadata
    env = install(tmp_path) | {"PPFLOW_METADATA": address}
    assert worker(tmp_path, "start", "run", "bash", "-c", SAVES, **env) == (0, "", "")
    wait_for(tmp_path / "up")
    time.sleep(1.5)
    assert worker(tmp_path, "code", "run", **env)[1] == "running\n"
    answer["preempted"] = "TRUE"
    wait_for(tmp_path / "run.code")
    assert worker(tmp_path, "code", "run", **env)[1] == "75\n"
    assert "being preempted" in (tmp_path / "run.log").read_text()


def test_what_a_worker_says_of_a_run(tmp_path):
    env = install(tmp_path)
    assert worker(tmp_path, "code", "run", **env)[1] == "none\n"
    assert worker(tmp_path, "start", "run", "bash", "-c", SAVES, **env)[0] == 0
    wait_for(tmp_path / "up")
    pid = int((tmp_path / "run.pid").read_text())
    os.killpg(os.getpgid(pid), signal.SIGKILL)  # the machine is gone, and its shell with it
    deadline = time.monotonic() + 10
    while worker(tmp_path, "code", "run", **env)[1] == "running\n" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker(tmp_path, "code", "run", **env)[1] == "137\n"
    (tmp_path / "run.pid").write_text(f"{os.getpid()}\n")  # the number is another program's by now
    code, _, err = worker(tmp_path, "stop", "run", **env)
    assert code == 2 and "run is not running" in err


# What `python3` on a host does; each of its versions is another file.
OLD = 'case $1 in -c) exit 1 ;; esac; echo "python3 $@" >> "$FAKE/calls"'
NEW = 'echo "${0##*/} $@" >> "$FAKE/calls"'
NO = {f"python3.{k}": OLD for k in range(11, 15)}


def test_python_is_found_on_every_host_before_anything_is_copied(tmp_path):
    env = install(tmp_path, ssh=SSH, git='echo "git $@" >> "$FAKE/calls"', python3=OLD, **NO)
    args = ["setup", "--hosts=a,b", "--repo=https://x.y/z", "--dir=p"]
    code, out, err = call("ssh.sh", *args, **env)
    assert code == 1 and not out
    assert "no Python 3.11 or newer that has venv: tried python3 python3.14" in err
    assert err.count("no Python") == 1 and "--python=install" in err
    assert "git" not in (tmp_path / "calls").read_text() and not (tmp_path / "home/a/p").exists()
    install(tmp_path, **{"python3.12": NEW})
    clone(tmp_path / "home" / "a" / "p"), clone(tmp_path / "home" / "b" / "p")
    code, out, err = call("ssh.sh", *args, **env)
    assert code == 0 and out.count("/bin/python3.12") == 2, err
    assert (tmp_path / "calls").read_text().count("python3.12 -m venv p/.venv") == 2
    code, _, err = call("ssh.sh", *args, "--python=/no/python", **env)
    assert code == 1 and "tried /no/python" in err


def test_python_is_installed_by_uv_where_it_is_asked_for(tmp_path):
    uv = 'echo "uv $@" >> "$FAKE/calls"; case $2 in find) echo "$FAKE/bin/of_uv" ;; esac'
    env = install(tmp_path, ssh=SSH, uv=uv, of_uv=NEW, python3=OLD, **NO)
    clone(tmp_path / "home" / "a" / "p")
    args = ["setup", "--hosts=a", "--repo=https://x.y/z", "--dir=p", "--python=install"]
    code, out, err = call("ssh.sh", *args, **env)
    assert code == 0 and "/bin/of_uv" in out, err
    calls = (tmp_path / "calls").read_text()
    assert "uv python install 3.12" in calls and "of_uv -m venv p/.venv" in calls


def test_processes_on_hosts_are_told_where_their_peers_are(tmp_path):
    env = install(tmp_path, ssh=SSH)
    show = (
        'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $JAX_LOCAL_DEVICE_IDS"'
    )
    args = ["--gpus=4", "--", "bash", "-c", f"{show} > told"]
    code, out, err = call("ssh.sh", *HOSTS, *args, **env)  # without an action: keep
    assert code == 0 and "ssh.sh: done" in out, err
    told = [(tmp_path / "home" / host / "told").read_text() for host in ("a", "me@b")]
    assert told == ["a:8476 2 0 0,1,2,3\n", "a:8476 2 1 0,1,2,3\n"]
    assert call("ssh.sh", "--hosts=a", *HOSTS[1:], "--", *args[2:], **env)[0] == 0
    assert (tmp_path / "home" / "a" / "told").read_text() == "   \n"
    assert call("ssh.sh", "status", *HOSTS, **env)[1] == "a 0\nme@b 0\n"


def test_runs_on_hosts_are_kept_until_they_end_well(tmp_path):
    # the first run is stopped, the second loses a peer, the third ends; then one that fails
    run = """echo x >> runs
    case $(wc -l < runs).$JAX_PROCESS_ID in 1.*) exit 75 ;; 2.0) exit 134 ;; 2.1) kill -9 $$ ;; esac
    exit $(($(wc -l < runs) == 4 && JAX_PROCESS_ID))"""
    env = install(tmp_path, ssh=SSH, train=run)
    code, out, err = call("ssh.sh", "keep", *HOSTS, "--", "train", **env)
    assert code == 0, err
    assert (
        out
        == "ssh.sh: ended with 75 75 , again\nssh.sh: ended with 134 137 , again\nssh.sh: done\n"
    )
    code, _, err = call("ssh.sh", "keep", *HOSTS, "--", "train", **env)
    assert code == 2 and "the run failed (0 1)" in err


def test_hosts_are_started_all_or_none_and_stopped(tmp_path):
    env = install(tmp_path, ssh=SSH)
    args = ["run", *HOSTS, "--", "bash", "-c", SAVES]
    (tmp_path / "down.me@b").touch()
    code, _, err = call("ssh.sh", *args, **env)
    assert code == 2 and "me@b: not started, and so on none" in err
    wait_for(tmp_path / "home" / "a" / "run.0.code")
    assert call("ssh.sh", "status", *HOSTS, **env)[1].splitlines()[1] == "me@b unreachable"
    (tmp_path / "down.me@b").unlink()
    (tmp_path / "home" / "a" / "up").unlink(missing_ok=True)
    assert call("ssh.sh", *args, **env)[::2] == (0, "")
    for host in ("a", "me@b"):
        wait_for(tmp_path / "home" / host / "up")
    code, _, err = call("ssh.sh", *args, **env)
    assert code == 2 and "already running" in err
    assert call("ssh.sh", "stop", *HOSTS, **env)[0] == 0
    for host, k in (("a", 0), ("me@b", 1)):
        wait_for(tmp_path / "home" / host / f"run.{k}.code")
        assert (tmp_path / "home" / host / f"run.{k}.code").read_text() == "75\n"
