"""Which errors mean that another process is gone; tests/benchmarks/test_kill_resume.py has processes that are."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from tspo_jax.devices import processes


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [external/gloo/tcp/pair.cc:538] Connection reset by peer", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        ("INVALID_ARGUMENT: MemoryStats is only supported for addressable PjRt devices.", False),
        ("step 3: grad_norm not finite; its batch is in runs/x", False),
        ("batch_size is 3: it must be a multiple of mesh axis data (2)", False),
    ],
)
def test_lost_peers(text, is_lost):
    assert processes.is_lost_peer(ValueError(text)) == is_lost


def test_one_process_ends_as_it_would(capsys):
    with pytest.raises(ValueError, match="ABORTED"), processes.end_together():
        raise ValueError("ABORTED: no peer here")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            "ABORTED: peer is gone\nmany\nlines",
            processes.LOST,
            "process 0 of 2: another process has ended .*; run the same command",
        ),
        ("the disk is full", 1, "error: the disk is full"),
    ],
)
def test_of_several_processes_each_ends_at_once(monkeypatch, capsys, error, status, said):
    ended = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    with processes.end_together():
        raise ValueError(error)
    assert ended == [status]
    text = capsys.readouterr().err
    assert re.search(said, text) and text.count("\n") == 1


def test_what_all_raise_is_passed_on(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    with pytest.raises(FloatingPointError, match="nan"), processes.end_together(agreed=FloatingPointError):
        raise FloatingPointError("nan")


def test_a_peer_that_never_comes():
    """Nobody listens at the port either."""
    code = (
        "from tspo_jax import config; from tspo_jax.devices import processes; "
        "processes.join(config.Distributed(True, '127.0.0.1:9', 2, 1, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == processes.LOST
    assert done.stderr.startswith("error: not all processes of the run have met at 127.0.0.1:9 after 1 s")
