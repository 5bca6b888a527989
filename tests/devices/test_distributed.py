import pytest
from absl import flags

from ppflow_jax import cli
from ppflow_jax.devices import processes
from ppflow_jax.errors import InputError

GOOD = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.fixture
def started(monkeypatch):
    """Arguments of every start of jax's service; the environment without a cluster."""
    calls = []
    for name in (*GOOD, "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax.distributed.initialize", lambda **options: calls.append(options))
    return calls


def test_one_process_starts_nothing(started):
    processes.initialize()
    assert started == []


def test_variables_say_who_is_who(started, monkeypatch):
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    processes.initialize()
    (call,) = started
    assert call["coordinator_address"] == "host0:1234"
    assert (call["num_processes"], call["process_id"]) == (2, 1)


@pytest.mark.parametrize(("tasks", "starts"), [("4", 1), ("1", 0)])
def test_slurm_tasks_are_found_by_jax(started, monkeypatch, tasks, starts):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    processes.initialize()
    assert len(started) == starts
    assert all("coordinator_address" not in call for call in started)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID not set: give all three"),
        ({"JAX_COORDINATOR_ADDRESS": "host0"}, "must be HOST:PORT"),
        ({"JAX_PROCESS_ID": "2"}, "from 0 to one less"),
        ({"JAX_NUM_PROCESSES": "two"}, "from 0 to one less"),
    ],
)
def test_malformed_variables_are_refused_in_one_line(started, monkeypatch, change, words):
    for name, value in (GOOD | change).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words) as error:
        processes.initialize()
    assert started == [] and "\n" not in str(error.value)


@pytest.mark.parametrize("error", [InputError("bad"), KeyError("surprise")])
def test_a_failed_process_does_not_wait_for_its_peers(monkeypatch, capsys, error):
    class Gone(BaseException):
        pass

    def leave(code):
        raise Gone(code)

    def fail():
        raise error

    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(Gone, match="1"):
        cli.run(fail)
    said = capsys.readouterr().err
    if isinstance(error, InputError):
        assert said == "main (process 0 of 2): bad\n"
    else:
        assert "Traceback" in said and "surprise" in said
    flags.FLAGS.mark_as_parsed()
