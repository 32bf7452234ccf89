"""Training by two processes with four CPU devices each, over one mesh, against one process with eight devices."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny_store import needle_config, write_config
from xla_flags import xla_flags

from tspo_jax import config as cfg
from tspo_jax import train as training
from tspo_jax.checkpoints.folders import load_agent
from tspo_jax.runs.metrics import read_rows
from tspo_jax.selection.scoring import read_agent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_in_two_processes(config_file, run_dir):
    environment = os.environ | {"XLA_FLAGS": xla_flags(4), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-m", "tspo_jax.train", f"--config={config_file}", f"--run_dir={run_dir}"]
    command += ["--config.distributed.enabled=True", f"--config.distributed.coordinator=127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, "--config.distributed.num_processes=2", f"--config.distributed.process_id={i}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def answers(run_dir) -> set:
    """Whatever held-out questions were answered, by which process: question, method, frames, answer."""
    (path,) = (run_dir / "held_out").glob("rows_*.jsonl")
    return {(row["id"], row["method"], tuple(row["candidate_idx"]), row["answer"]) for row in read_rows(path)}


@pytest.mark.slow
def test_two_processes_reach_the_parameters_of_one(golden, tmp_path):
    config = needle_config(golden, tmp_path)
    config.held_out.update(every=config.num_steps, num_questions=3)
    config.evaluation.update(methods=("uniform", "topk"), budgets=(3,), batch_size=2)
    config_file = write_config(tmp_path / "needles.py", config)
    train_in_two_processes(config_file, tmp_path / "two")
    training.train(cfg.read(config), tmp_path / "one")

    one, two = read_agent(tmp_path / "one"), read_agent(tmp_path / "two")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), two, one)
    before = load_agent(golden / "tspo_agent")[1]
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, two)), strict=True)) > 1e-4
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    held_out = [[row for row in of_run if "held_out/topk" in row] for of_run in rows]
    assert held_out[0] == held_out[1] != []
    answered = [answers(tmp_path / name) for name in ("one", "two")]
    assert answered[0] == answered[1] and len(answered[0]) == 3 * 2
    rows = [[row for row in of_run if "reward/specific" in row] for of_run in rows]
    assert len(rows[1]) == config.num_steps
    for name in ("reward/specific", "location/specific", "grad_norm", "unique_frames"):
        np.testing.assert_allclose([r[name] for r in rows[1]], [r[name] for r in rows[0]], rtol=1e-3)
