"""How entry points start, end and fail, each in a process of its own."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
from absl import flags
from ml_collections import config_flags
from tspo_jax.command_line import entry_point

config_flags.DEFINE_config_file("config")
flags.DEFINE_integer("n", 0, "A number.")
flags.DEFINE_string("output", "", "A file.")


def check(argv):
    if "--forbidden" in argv:
        raise ValueError("forbidden")


def main():
    if flags.FLAGS.n < 0:
        raise ValueError(f"--n is {flags.FLAGS.n}, it must not be negative")
    if flags.FLAGS.n == 8:
        open("nowhere/file")
    if flags.FLAGS.n == 9:
        raise KeyboardInterrupt
    if flags.FLAGS.n > 9:
        raise RuntimeError("a bug" if flags.FLAGS.n == 10 else "RESOURCE_EXHAUSTED: Out of memory\\nmany lines")
    entry_point.write_result({"n": flags.FLAGS.n}, flags.FLAGS.output)
    return flags.FLAGS.n


entry_point.run(main, check)
"""


def start(*arguments):
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_result_is_all_that_goes_to_stdout(tmp_path):
    result = start("--n=3")
    assert result.returncode == 3, "what main() returns"
    assert json.loads(result.stdout) == {"n": 3}
    result = start("--n=0", f"--output={tmp_path}/new/result.json")
    assert (result.returncode, result.stdout) == (0, "")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"n": 0}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--n=-1", "error: --n is -1, it must not be negative"),
        ("--forbidden", "error: forbidden"),
        ("stray", "error: unexpected argument 'stray'; flags are --name=value"),
        ("--n=x", "error: flag --n=x: "),
        ("--m=1", "error: Unknown command line flag 'm'"),
        ("--n=8", "error: nowhere/file: No such file or directory"),
        ("--n=11", "error: a device has too little memory (RESOURCE_EXHAUSTED: Out of memory). Less is taken by"),
    ],
)
def test_a_users_mistake_is_one_line(argument, message):
    result = start(argument)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_an_error_in_a_config_file_is_one_line(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def get_config(variant=''):\n    raise ValueError(f'no {variant}')\n")
    result = start(f"--config={file}:y")
    assert result.stderr == f"error: flag --config={file}:y: {file}:2: ValueError: no y\n"


def test_ctrl_c():
    result = start("--n=9")
    assert (result.returncode, result.stderr) == (130, "stopped\n")


def test_a_bug_keeps_its_traceback():
    result = start("--n=10")
    assert result.returncode == 1
    assert "RuntimeError: a bug" in result.stderr and "Traceback" in result.stderr
