"""An evaluation by two processes with four CPU devices each, one of which is killed, against one process with eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny_store
from conftest import ROOT
from xla_flags import xla_flags

from tspo_jax import config as cfg
from tspo_jax.devices.processes import LOST
from tspo_jax.evaluation.run import evaluate


@pytest.fixture
def start(golden, tmp_path):
    """(config) -> two processes that evaluate it in the folder `two`."""
    started = []

    def start(config):
        config_file = tmp_path / "config.py"
        get_config = f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
        config_file.write_text(f"from ml_collections import ConfigDict\n\n\n{get_config}")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "tspo_jax.evaluate", f"--config={config_file}"]
        command += [f"--run_dir={tmp_path / 'two'}", f"--agent={golden / 'tspo_agent'}"]
        command += ["--config.distributed.enabled=True", f"--config.distributed.coordinator=127.0.0.1:{port}"]
        command += ["--config.distributed.num_processes=2"]
        environment = os.environ | {"XLA_FLAGS": xla_flags(4), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        started[:] = [
            subprocess.Popen(
                [*command, f"--config.distributed.process_id={i}"],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for i in range(2)
        ]  # fmt: skip
        return started

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
def test_one_table_though_a_process_is_lost(golden, start, tmp_path):
    """The other ends with status 76 and keeps the answers; the rerun goes on; rows and summary are those of one."""
    questions = tiny_store.write_questions(tmp_path / "questions.jsonl", num=14)
    config = tiny_store.make_config(golden, tiny_store.make_store(tmp_path, golden), questions)
    config.evaluation.update(budgets=(4, 6, 9, 12), controls=("permuted", "blank"), batch_size=4)
    whole = evaluate(cfg.read(config), tmp_path / "one", golden / "tspo_agent")
    path = tmp_path / "two" / "evaluation" / "rows.jsonl"

    config.evaluation.batch_size = 2  # of each process

    def rows(path):
        return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []

    processes = start(config)
    while not rows(path) and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    processes[1].kill()
    _, said = processes[0].communicate(timeout=200)
    assert (processes[0].returncode, processes[1].wait()) == (LOST, -signal.SIGKILL), said
    assert "error: process 0 of 2: another process has ended or cannot be reached" in said and "Traceback" not in said
    kept = rows(path)
    assert 0 < len(kept) < 14 * 4 * 5

    outputs = [(*process.communicate(timeout=400), process.returncode) for process in start(config)]
    assert [status for *_, status in outputs] == [0, 0], outputs
    assert json.loads(outputs[0][0]) == whole and outputs[1][0] == ""
    assert json.loads((tmp_path / "two" / "evaluation" / "summary.json").read_text()) == whole
    assert rows(path)[: len(kept)] == kept
    assert sorted(rows(path)) == sorted(rows(tmp_path / "one" / "evaluation" / "rows.jsonl"))
