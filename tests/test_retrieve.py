"""Retrieval by the command line: CLIP alone, TESTA, bad input."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_store
import tiny_testa


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieve")
    return tiny_store.make_store(folder, golden), tiny_testa.make(folder / "testa", golden)


def run(*flags):
    command = [sys.executable, "-m", "tspo_jax.retrieve", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_both_models(folders, golden):
    store, testa = folders
    for model in (f"--clip={golden / 'tspo_agent'}", f"--model={testa}"):
        done = run(f"--store={store}", model, "--query=a red ball", "--num_videos=1", "--stretch=10")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["num_videos"] == 2 and len(result["videos"]) == 1
        assert len(result["videos"][0]["stretches"]) == 3 or result["videos"][0]["video"] == tiny_store.SHORT


@pytest.mark.slow
def test_a_video_without_features_is_named(folders, golden, tmp_path):
    store = shutil.copytree(folders[0], tmp_path / "store")
    (lost,) = (store / "features").rglob(f"{tiny_store.SHORT}*")
    lost.unlink()
    done = run(f"--store={store}", f"--clip={golden / 'tspo_agent'}", "--query=a red ball")
    assert done.returncode == 0 and json.loads(done.stdout)["num_videos"] == 1
    assert "not searched, without features of this CLIP" in done.stderr and f": {tiny_store.SHORT}\n" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--query=x"], "give either --clip or --model"),
        (["--clip=CLIP", "--query=x", "--rerank=3"], "are of --model"),
        (["--model=TESTA", "--query=x", "--testa_r=1,2,1,2,1"], "testa_r"),
    ],
)
def test_bad_input(folders, golden, flags, message):
    store, testa = folders
    flags = [flag.replace("CLIP", str(golden / "tspo_agent")).replace("TESTA", str(testa)) for flag in flags]
    done = run(f"--store={store}", *flags)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
