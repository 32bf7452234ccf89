"""kill -9 of a training, alone and as one of two processes: the other ends by itself, and a rerun goes on exactly."""

import shutil
import time

import jax
import numpy as np
import pytest
from tiny_store import needle_config, write_config
from xla_flags import xla_flags

from benchmarks import kill_resume
from tspo_jax import config as cfg
from tspo_jax import train
from tspo_jax.devices.processes import LOST
from tspo_jax.selection.scoring import read_agent

NUM_STEPS = 12


@pytest.fixture
def config(golden, tmp_path):
    config = needle_config(golden, tmp_path)
    config.num_steps, config.checkpoint_every = NUM_STEPS, 2
    return config


@pytest.mark.slow
def test_killed_at_random_moments(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    config.mesh.axes = (("data", 1), ("model", 1))
    command = [f"--config={write_config(tmp_path / 'needles.py', config)}"]
    pace = kill_resume.undisturbed(tmp_path / "whole", command)
    kills = kill_resume.disturbed(tmp_path / "killed", command, 2, pace, NUM_STEPS)
    assert len(kills) == 2
    result = kill_resume.compare(tmp_path / "whole", tmp_path / "killed")
    assert result["parameters"] and result["picks"]


@pytest.mark.slow
def test_one_of_two_processes_is_killed(config, tmp_path, monkeypatch):
    """The rerun of both is exact; one process with all devices goes on too, to float tolerance."""
    monkeypatch.setenv("XLA_FLAGS", xla_flags(4))
    config.held_out.every, config.held_out.num_questions = NUM_STEPS // 2, 4
    config.evaluation.budgets, config.evaluation.batch_size = (2,), 2
    command = [f"--config={write_config(tmp_path / 'needles.py', config)}"]
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    kill_resume.undisturbed(whole, command, 2)
    run = kill_resume.Run(killed, command, 2)
    while run.is_running() and kill_resume.num_rows(killed) < NUM_STEPS // 2:
        time.sleep(0.005)
    run.processes[1].kill()
    assert run.wait(120) == [LOST, -9]
    said = run.log.read_text()
    assert "error: process 0 of 2: another process has ended or cannot be reached" in said
    assert "run the same command again in all of them" in said and "Traceback" not in said

    shutil.copytree(killed, alone)
    kill_resume.Run(killed, command, 2).check()
    result = kill_resume.compare(whole, killed)
    assert result["parameters"] and result["picks"] and result["steps_redone"] < 2 * NUM_STEPS
    train.train(cfg.read(config), alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), read_agent(alone), read_agent(whole))
