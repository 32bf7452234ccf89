"""Captions by the command line, and bad input."""

import json
import shutil
import subprocess
import sys

import pytest

from tspo_jax.data import frame_store


def run(*flags):
    command = [sys.executable, "-m", "tspo_jax.caption", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_stretches_of_a_file(golden):
    done = run(f"--model={golden / 'swinbert_tiny'}", f"--video={golden / 'tspo_agent.mp4'}", "--stretch=20")
    assert done.returncode == 0, done.stderr
    captions = json.loads(done.stdout)["captions"]
    assert [round(caption["start"]) for caption in captions] == [0, 20]
    assert all(0 < caption["confidence"] <= 1 for caption in captions)


@pytest.mark.slow
def test_a_store_of_smaller_frames_than_the_model_sees(golden, tmp_path):
    frame_store.open_settings(tmp_path, frame_store.StoreSettings(short_side=63))
    (tmp_path / "frames").mkdir()
    done = run(f"--model={golden / 'swinbert_tiny'}", f"--store={tmp_path}")
    assert done.returncode == 1 and "shorter side of 63 pixels, the model sees 64" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (None, ["--max_tokens=100"], "max_caption is 100; it must be 2 to 48"),
        (("log/args.json", "{}"), [], "lacks max_num_frames"),
        (("best-checkpoint/model.bin", "x"), [], "no zip archive"),
    ],
)
def test_bad_input(golden, tmp_path, change, flags, message):
    folder = tmp_path / "model"
    shutil.copytree(golden / "swinbert_tiny", folder)
    if change:
        (folder / change[0]).write_text(change[1])
    done = run(f"--model={folder}", f"--video={golden / 'tspo_agent.mp4'}", *flags)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
