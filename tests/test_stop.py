import os
import signal
import threading

import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.files import locked
from ppflow_jax.stop import StopRequest

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
