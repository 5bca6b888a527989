import os
import signal
import threading
import time

import pytest

from ppflow_jax.devices.stop import StopRequest
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import locked
from ppflow_jax.files.store import find_checkpoint, verify
from ppflow_jax.train.metrics_log import read_metrics
from tests.commands import SMALL
from tests.processes import Group

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def send(number):
    signal.pthread_kill(threading.main_thread().ident, number)


def test_signals_are_remembered_and_a_second_interrupt_ends_at_once():
    before = [signal.getsignal(n) for n in NUMBERS]
    with StopRequest() as stop:
        assert not stop.reached(1)
        send(signal.SIGTERM)
        assert stop.reached(1) and stop.reached(2)
    with StopRequest() as stop:
        send(signal.SIGINT)
        assert stop.reached(1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_a_lock_keeps_others_out_and_is_let_go(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
                with locked(tmp_path):
                    pass


@pytest.mark.long
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    group = Group(2, devices=1)
    args = [*SMALL, f"--workdir={tmp_path}", "--config.train.steps=100000"]
    args += ["--config.train.save_every=100000"]
    runs = [group.start(k, "digits.py:sit", *args) for k in range(2)]
    try:
        deadline = time.monotonic() + 240
        while not read_metrics(tmp_path / "metrics.jsonl") and time.monotonic() < deadline:
            time.sleep(0.05)
        runs[1].send_signal(signal.SIGTERM)
        said = [run.communicate(timeout=240)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [75, 75], said
    step = find_checkpoint(tmp_path)
    verify(step)
    assert int(step.name) == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert f"main: stopped at step {step.name} of 100000" in said[0]
    assert "main: " not in said[1]
