"""The example of loop.py's docstring as a program: killed, stopped, broken, evaluated, and resumed exactly."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from tspo_jax.config import General
from tspo_jax.runs import loop as module
from tspo_jax.runs.loop import Batches, Loop
from tspo_jax.runs.metrics import read_rows
from tspo_jax.runs.preemption import EXIT_STATUS
from tspo_jax.runs.run_folder import RunFolderError, find_checkpoint, read_part
from tspo_jax.runs.training_log import Evaluated, NotFiniteError

NUM_STEPS = 12
CONFIG = General(seed=3, num_steps=NUM_STEPS, checkpoint_every=4, keep_checkpoints=2)
IMPORTS = """
import itertools
from functools import partial
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tspo_jax.command_line import entry_point
from tspo_jax.config import General, check_overrides
from tspo_jax.runs.loop import Batches, Loop, define_flags, run_from_flags
"""
EXAMPLE = textwrap.dedent(
    module.__doc__[module.__doc__.index("    def batch_of") : module.__doc__.index("Resuming is")]
)
# In a process that was told to, batch 9 is the last: when a checkpoint is whole, the process kills itself or is told
# to stop.
ENDING = """
import os, signal, time
def batch_of(seed, step, original=batch_of):
    if step == 9 and "KILL" in os.environ:
        while not (Path(os.environ["RUN"]) / "checkpoints" / "8").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, os.environ["KILL"]))
    return original(seed, step)
"""
BEFORE_MAIN = EXAMPLE.index("if __name__")
PROGRAM = IMPORTS + EXAMPLE[:BEFORE_MAIN] + ENDING + EXAMPLE[BEFORE_MAIN:]


@pytest.fixture(scope="module")
def train():
    found = {"__name__": "example"}
    exec(IMPORTS + EXAMPLE, found)
    return found["train"]


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(CONFIG, folder)
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def assert_same(folder: Path, expected: Path) -> None:
    assert losses(folder) == losses(expected)
    jax.tree.map(np.testing.assert_array_equal, read_part(folder, "state"), read_part(expected, "state"))


def test_it_learns_and_its_rows_are_complete(undisturbed):
    rows = read_rows(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    names = {"loss", "seconds/data", "seconds/update", "device_idle", "compilations", "steps_per_second"}
    assert all(names <= row.keys() for row in rows)
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["12", "8"]
    assert list((undisturbed / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("ends_by", "status"), [("SIGKILL", -signal.SIGKILL), pytest.param("SIGTERM", EXIT_STATUS, marks=pytest.mark.slow)]
)
def test_killed_or_stopped_it_resumes_bit_for_bit(undisturbed, tmp_path, ends_by, status):
    values = dataclasses.asdict(CONFIG)
    (tmp_path / "regression.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, f"--config={tmp_path}/regression.py", f"--run_dir={run_dir}"]
    environment = os.environ | {"KILL": ends_by, "RUN": str(run_dir)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    saved = 8 if ends_by == "SIGKILL" else 10
    assert find_checkpoint(run_dir).name == str(saved)
    del environment["KILL"]
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0 and f"resuming after step {saved}" in resumed.stderr
    assert_same(run_dir, undisturbed)


def test_a_finished_run_does_nothing(train, undisturbed, capsys):
    before = losses(undisturbed)
    assert train(CONFIG, undisturbed)
    assert "all 12 steps are done" in capsys.readouterr().err and losses(undisturbed) == before


def test_a_folder_of_another_config_is_refused(train, undisturbed):
    with pytest.raises(RunFolderError, match="seed: 3 there, 4 here"):
        train(dataclasses.replace(CONFIG, seed=4), undisturbed)
    assert train(dataclasses.replace(CONFIG, log_every=5), undisturbed), "what computes nothing may change"


def numbers(first):
    return ({"x": np.full(3, n, np.float32), "name": f"batch {n}"} for n in itertools.count(first))


@jax.jit
def add(state, x):
    total = state["total"] + x.sum()
    return {"total": total}, {"loss": 1 / (jnp.float32(6) - x[0]), "total": total}


def start(folder, **options):
    return Loop(folder, CONFIG, Batches(numbers), put=lambda batch: batch["x"], quiet=True, **options)


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path):
    with start(tmp_path) as loop:
        state = loop.restore({"total": jnp.zeros(())})
        with pytest.raises(NotFiniteError, match="step 7: loss not finite; its batch is in .*step_7_process_0.npz"):
            loop.run(state, lambda step, state: add(state, loop.batch(step)))
    (path,) = tmp_path.glob("not_finite*.npz")
    saved = np.load(path)
    assert saved["name"] == "batch 6" and saved["x"].tolist() == [6, 6, 6]
    assert find_checkpoint(tmp_path).name == "4", "no checkpoint holds the step"


def test_the_best_checkpoint_is_that_of_the_evaluation(tmp_path):
    scores, seen = {3: 0.1, 6: 0.9, 9: 0.5, 12: 0.2}, []

    def evaluate(done, state):
        assert float(state["total"]) == 3 * done
        seen.append(done)
        return Evaluated({"held_out/score": scores[done]}, f"score {scores[done]}", scores[done])

    def one(step, state):
        loop.batch(step)
        return {"total": state["total"] + 3}, {"loss": state["total"]}

    rows = []
    with start(tmp_path, report=rows.append) as loop:
        assert loop.run(loop.restore({"total": jnp.zeros(())}), one, evaluate, evaluate_every=3)
    assert seen == [3, 6, 9, 12] and find_checkpoint(tmp_path / "best").name == "6"
    written = read_rows(tmp_path / "metrics.jsonl")
    assert [row["held_out/score"] for row in written if "held_out/score" in row] == list(scores.values())
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert read_part(tmp_path / "best", "state")["total"] == 18


def test_batches_may_be_looked_at_ahead(tmp_path):
    """A step that takes its batch and the next: each is read once, all rows are written, and a checkpoint's place is
    before the one that was looked at."""
    read = []

    def recorded(first):
        for batch in numbers(first):
            read.append(int(batch["x"][0]))
            yield batch

    def look_ahead(step, state):
        now = loop.batch(step)
        after = loop.batch(step + 1) if step + 1 < NUM_STEPS else now
        return {"total": state["total"] + now[0] * after[0]}, {"loss": state["total"]}

    def stop(measured):
        if measured["step"] == 9 and len(read) < 20:
            raise KeyboardInterrupt

    batches = Batches(recorded)
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, Loop(tmp_path, CONFIG, batches, put=lambda batch: batch["x"], quiet=True, report=stop) as loop:
        loop.run(loop.restore({"total": jnp.zeros(())}), look_ahead)
    assert read == list(range(11))
    with Loop(tmp_path, CONFIG, Batches(recorded), put=lambda batch: batch["x"], quiet=True) as loop:
        assert loop.start == 8
        assert loop.run(loop.restore({"total": jnp.zeros(())}), look_ahead)
    assert read[11:] == list(range(8, 12))
    expected = sum(n * min(n + 1, NUM_STEPS - 1) for n in range(NUM_STEPS))
    assert read_part(tmp_path, "state")["total"] == expected
    assert [step for step, _ in losses(tmp_path)] == list(range(1, NUM_STEPS + 1))


def test_a_profile_is_written(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=4, profile_steps=1)
    with Loop(tmp_path, config, Batches(numbers), put=lambda batch: batch["x"], quiet=True) as loop:
        assert loop.run(loop.restore({"total": jnp.zeros(())}), lambda step, state: add(state, loop.batch(step)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_batches_resume_at_their_number():
    batches = Batches(lambda first: itertools.count(first * 10))
    assert [next(batches), next(batches)] == [0, 1]
    place = batches.get_state()
    later = Batches(lambda first: itertools.islice(itertools.count(), first, None))
    later.set_state(place)
    assert next(later) == 2 and later.get_state() == {"next_batch": 3}
