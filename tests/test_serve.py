"""The command: it serves until it is told to stop. What it serves: tests/pages/test_server.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest


def serve(*arguments, **options):
    command = [sys.executable, "-m", "tspo_jax.serve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_it_serves_a_folder_and_leaves_nothing_behind(golden, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "temporary").mkdir()
    shutil.copy(golden / "tspo_agent.mp4", tmp_path / "videos" / "a.mp4")
    (tmp_path / "videos" / "notes.txt").touch()
    arguments = [f"--videos={tmp_path / 'videos'}", f"--agent={golden / 'tspo_agent'}", "--port=0"]
    with serve(*arguments, env=os.environ | {"TMPDIR": str(tmp_path / "temporary")}) as process:
        try:
            assert process.stderr.readline().endswith("1 file is not taken for videos: notes.txt\n")
            url = process.stderr.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url + "videos", timeout=60) as response:
                assert json.loads(response.read()) == {"videos": ["a.mp4"]}
            assert list((tmp_path / "temporary").glob("tspo_store_*"))
        finally:
            process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "", "")
    assert not list((tmp_path / "temporary").glob("tspo_store_*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agent=x"], "--videos (a folder) or --store (a frame store) is missing"),
        (["--agent=x", "--videos=absent"], "--videos: absent is no folder"),
        (["--videos=."], "missing --agent"),
        (["--agent=x", "--videos=.", "--port=70000"], "--port"),
        (["--agent=x", "--videos=.", "--adapter=y"], "--adapter needs the --answerer that it is for"),
        (["--agent=x", "--videos=.", "--in_rounds"], "--in_rounds needs an --answerer"),
    ],
)
def test_wrong_command_lines(arguments, message):
    with serve(*arguments) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and out == "" and errors.startswith("error: ") and message in errors


def test_help_imports_nothing_heavy():
    script = "import sys, tspo_jax.serve, tspo_jax.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "jinja2", "starlette", "uvicorn", "PIL", "av"} & set(loaded)
