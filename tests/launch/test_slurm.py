"""SLURM: submission, and what a job does with the exit codes of its tasks."""

import signal
import subprocess
import time

import pytest

from tests.launch.standins import LAUNCH, SBATCH, SCONTROL, SRUN, call, install, preempt
from tests.launch.test_scripts import pasted


def test_submission(tmp_path):
    args = ["--nodes=4", "--gpus=8", "--time=1:00:00", "--dry_run", "--", "python", "-m", "x y"]
    (line,) = pasted(tmp_path, call("slurm.sh", *args)[1])
    assert line[:3] == ["sbatch", "--nodes=4", "--gpus-per-node=8"]
    assert "--export=ALL,PPFLOW_GPUS=8,PPFLOW_RESTARTS=100" in line and "--time=1:00:00" in line
    assert line[-4].endswith("launch/slurm.sbatch") and line[-3:] == ["python", "-m", "x y"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (134, 0, True), (75, 9, False)],
)
def test_a_job_is_requeued_if_it_can_go_on(tmp_path, code, restarts, requeued):
    env = install(tmp_path, srun=SRUN, scontrol=SCONTROL)
    env |= {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restarts)}
    env |= {"PPFLOW_RESTARTS": "9", "PPFLOW_GPUS": "4"}
    got = call("slurm.sbatch", "bash", "-c", f"exit {code}", **env)[0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "0,1,2,3 --kill-on-bad-exit=1"
    assert calls[1:] == (["requeue 12"] if requeued else [])
    assert got == (0 if requeued else code)


def test_a_task_that_failed_outranks_those_that_lost_it(tmp_path):
    env = install(tmp_path, sbatch=SBATCH, srun=SRUN, scontrol=SCONTROL)
    script = '[ "$SLURM_PROCID" = 1 ] && exit 1; exit 134'
    args = ["--nodes=3", "--gpus=1", "--", "bash", "-c", script]
    assert call("slurm.sh", *args, **env)[0] == 1
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_sigterm_reaches_the_command_and_the_shells_around_it_live(tmp_path):
    env = install(tmp_path, srun=SRUN, scontrol=SCONTROL)
    env |= {"SLURM_JOB_ID": "12", "PPFLOW_GPUS": "1"}
    script = """trap 'exit 75' TERM; touch "$FAKE/up"; sleep 30 & wait"""
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "bash", "-c", script], env=env)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)  # SLURM signals the script and every process of the tasks
    preempt(tmp_path)
    assert job.wait(20) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 12"
