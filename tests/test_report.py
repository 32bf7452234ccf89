"""The command: what it says where it cannot write a report. What it writes: tests/pages/test_report.py."""

import subprocess
import sys


def test_a_run_without_evaluation(tmp_path):
    command = [sys.executable, "-m", "tspo_jax.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "run python -m tspo_jax.evaluate" in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_command_lines():
    for arguments in ([], ["--help"], ["a", "b"]):
        done = subprocess.run([sys.executable, "-m", "tspo_jax.report", *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == "" and "python -m tspo_jax.report RUN_DIR" in done.stderr
