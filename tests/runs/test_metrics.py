"""metrics.jsonl, TensorBoard's event files, the terminal and the counter of compilations."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tspo_jax.runs.metrics import CompilationCounter, DeviceClock, MetricsLog, Stopwatch, Terminal, read_rows


def test_rows_reach_both_files(tmp_path):
    with MetricsLog(tmp_path, step=0) as log:
        for step in (1, 2):
            log.write({"step": step, "reward/general": 1 / 3 + step, "grad_norm": float("nan")})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows == [{"step": s, "reward/general": round(1 / 3 + s, 6), "grad_norm": None} for s in (1, 2)]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/general")
    assert [(s.step, pytest.approx(s.value)) for s in scalars] == [(1, 4 / 3), (2, 7 / 3)]


def test_resuming_drops_rows_of_lost_updates_and_a_cut_line(tmp_path):
    with MetricsLog(tmp_path, step=0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "x": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "x"')
    time.sleep(1.1)  # TensorBoard orders files by the second in which they were begun, as two processes have it
    with MetricsLog(tmp_path, step=2) as log:
        log.write({"step": 3, "x": 30})
    assert [(row["step"], row["x"]) for row in read_rows(path)] == [(1, 1), (2, 2), (3, 30)]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("x")
    assert [(s.step, s.value) for s in scalars] == [(1, 1), (2, 2), (3, 30)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not valid json"):
        read_rows(path)
    path.write_text("5\n")
    with pytest.raises(ValueError, match="a line is not a json object"):
        read_rows(path)
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2')
    assert read_rows(path) == [{"step": 1}]


def test_compilations_are_counted_once_per_shape():
    f = jax.jit(lambda x: x * 2 + 1)
    small, large = jax.device_put(jnp.ones(3)), jax.device_put(jnp.ones(4))
    with CompilationCounter() as compilations:
        f(small), f(small)
        assert compilations.count == 1
        f(large)
        assert compilations.count == 2
    jax.jit(lambda x: x * 3)(small)
    assert compilations.count == 2, "it only counts while it is active"


def test_stopwatch_adds_up():
    watch = Stopwatch()
    for _ in range(2):
        with watch("data"):
            pass
    assert list(watch.seconds) == ["data"] and watch.seconds["data"] > 0


class Result:
    """What `jax.block_until_ready` waits for, ready after some seconds of the device's time."""

    def __init__(self, seconds):
        self.ready = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        self.ended = time.perf_counter()


def test_the_device_is_idle_where_nothing_was_started():
    with DeviceClock() as clock:
        since = time.perf_counter()
        first, second = Result(0.2), Result(0.3)
        for result in (first, second):  # the second begins when the first one ends
            clock.started(result, since)
        time.sleep(0.6)
        share, total = clock.idle_share(), time.perf_counter() - since
        assert share == pytest.approx(1 - (second.ended - since) / total, abs=0.1) and total > 0.6
        time.sleep(0.1)
        assert clock.idle_share() == pytest.approx(1, abs=0.01)


def test_a_program_that_blocks_its_caller_keeps_the_device_busy():
    """It has ended when the call returns, as programs with a loop of unknown length do on GPUs."""
    with DeviceClock() as clock:
        since = time.perf_counter()
        slow = jax.pure_callback(lambda: (time.sleep(0.4), np.float32(1))[1], jax.ShapeDtypeStruct((), jnp.float32))
        clock.started(jax.block_until_ready(slow), since)
        assert clock.idle_share() < 0.2


def test_terminal_writes_to_stderr_only(capsys):
    with Terminal(10, 4, {"step": "step", "reward": "reward", "location": "location"}) as terminal:
        terminal.note("the loss is zero")
        terminal.row({"step": 5, "reward": 0.123456})
        terminal.advance(5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "the loss is zero" in err
    assert ["step", "reward", "location"] in [line.split() for line in err.splitlines()]
    assert ["5", "0.123", "-"] in [line.split() for line in err.splitlines()]
