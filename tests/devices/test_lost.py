"""Which errors mean that another process is gone."""

import signal
import time

import jax
import pytest

from ppflow_jax import cli
from ppflow_jax.devices import processes
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files.store import FOLDER
from tests.commands import SMALL
from tests.processes import Group

RESET = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error "
    "[127.0.0.1]:9610: Connection reset by peer"
)
NCCL = "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or network error"

# Of a barrier that Orbax has in every checkpoint, when a killed process has been started again
BARRIER = (
    "INTERNAL: Barrier failed because: task is set to ERROR: ABORTED: 1 unexpectedly tried to "
    "connect with a different incarnation. It has likely restarted."
)
ABORTED = (
    "ABORTED: 1 unexpectedly tried to connect while it is already in error. "
    "[type.googleapis.com/tensorflow.CoordinationServiceError=' ']"
)


@pytest.fixture
def among_several(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)


@pytest.mark.parametrize(
    "error",
    [ValueError(RESET), jax.errors.JaxRuntimeError(NCCL), jax.errors.JaxRuntimeError(ABORTED)],
)
def test_a_broken_connection_is_a_lost_peer(among_several, error):
    assert processes.lost_peer(error) == str(error)[:200]


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."
        ),
        ValueError("operands could not be broadcast together"),
        InputError("cannot join the other processes"),
        KeyError("Connection reset by peer"),
    ],
)
def test_an_error_of_ones_own_is_not(among_several, error):
    assert processes.lost_peer(error) == ""


def caused(error, cause):
    try:
        raise error from cause
    except type(error) as e:
        return e


def cannot_write(cause):
    return caused(RunError(f"cannot write the checkpoint ({cause}): make room"), cause)


OF_ORBAX = caused(
    TimeoutError("Timed out while waiting for async_write_complete barrier."),
    jax.errors.JaxRuntimeError(BARRIER),
)


def test_a_checkpoint_that_a_lost_peer_prevents(among_several):
    direct = cannot_write(jax.errors.JaxRuntimeError(BARRIER))
    for error in (direct, OF_ORBAX, cannot_write(OF_ORBAX)):
        assert processes.lost_peer(error) == BARRIER[:200]
    assert processes.lost_peer(cannot_write(ValueError(RESET))) == RESET[:200]
    assert processes.lost_peer(cannot_write(jax.errors.JaxRuntimeError(NCCL))) == NCCL
    for cause in (ValueError("UNAVAILABLE: connection reset"), OSError(28, "no space"), None):
        assert processes.lost_peer(cannot_write(cause)) == ""
    store = RunError("no answer from gs://bucket (connection refused)")
    assert processes.lost_peer(store) == ""


def test_alone_there_is_none_to_lose():
    assert processes.lost_peer(ValueError(RESET)) == ""


@pytest.mark.parametrize(
    "error", [ValueError(RESET), cannot_write(jax.errors.JaxRuntimeError(BARRIER)), OF_ORBAX]
)
def test_who_lost_a_peer_ends_with_a_code_that_is_started_again(
    among_several, monkeypatch, capsys, error
):
    monkeypatch.setattr("sys.argv", ["main.py"])
    monkeypatch.setattr(cli, "_parse", lambda *_: [])
    monkeypatch.setattr(processes, "leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 134
    err = capsys.readouterr().err
    assert "lost another process" in err and err.count("\n") == 1 and "run the same command" in err


@pytest.mark.long
def test_a_killed_process_that_is_started_again_does_not_fail_the_run(tmp_path):
    group = Group(2, devices=1)
    args = [*SMALL, f"--workdir={tmp_path}", "--config.train.steps=1000"]
    args += ["--config.train.save_every=1"]  # so that it is killed while others wait to write
    runs = [group.start(k, "digits.py:sit", *args) for k in range(2)]
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / FOLDER / "3").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        runs[1].kill()
        runs.append(group.start(1, "digits.py:sit", *args))
        said = runs[0].communicate(timeout=240)[1]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert runs[0].returncode in (processes.LOST, -signal.SIGABRT), said
