"""SIGTERM to one process alone; several are in tests/tspo/test_two_processes.py."""

import os
import signal

import pytest

from tspo_jax.runs.preemption import EXIT_STATUS, Preemption, finish


def test_the_signal_is_heard_and_its_former_meaning_comes_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("before"))
    try:
        with Preemption() as preemption:
            assert not preemption.must_stop(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.must_stop(2) and preemption.must_stop(3) and heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_earlier_run_of_the_process_does_not_count():
    preemption = Preemption()
    with preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.must_stop(1)
    with preemption:
        assert not preemption.must_stop(1)


def test_a_stopped_run_ends_the_program():
    finish(True)
    with pytest.raises(SystemExit) as stopped:
        finish(False)
    assert stopped.value.code == EXIT_STATUS
