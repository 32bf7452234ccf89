"""docs/first_hour.md: every command of the page is run, in its order, by a user's shell.

What stands for what, and nothing else is changed:

    checkpoints/...        `hf download` puts the toy world's tiny checkpoints in the place of the published ones
    my_videos/*.mp4        toy videos under the names that the page's questions have
    .venv, pip             this interpreter; `pip install` only looks whether jax has such an extra
    train, evaluate        fewer steps, evaluation in float32 (LESS)

A block ```LANGUAGE NAME is the file NAME, ```bash is run by bash, ```python by the interpreter.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from xla_flags import xla_flags

from tspo_jax.checkpoints.folders import load_agent
from tspo_jax.data.questions import read_questions
from tspo_jax.export import export
from tspo_jax.toy.scenes import World, make_video_plan
from tspo_jax.toy.videos import write_video

PAGE = (ROOT / "docs" / "first_hour.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TOY = ROOT / "tspo_jax" / "toy" / "checkpoints"
LESS = {
    "tspo_jax.train": ["--config.num_steps=3", "--config.batch_size=2", "--config.answerer.dtype=float32"],
    "tspo_jax.evaluate": ["--config.answerer.dtype=float32"],
}

PYTHON = """#!{real}
import os, sys
less = {less!r}.get(sys.argv[2] if sys.argv[1:2] == ["-m"] else "", [])
os.execv({real!r}, [{real!r}, *sys.argv[1:], *less])
"""
PIP = """#!{real}
import importlib.metadata, re, sys
command, wanted = sys.argv[1:]
name, extra = re.fullmatch(r"([a-z]+)\\[(\\w+)\\]", wanted).groups()
assert command == "install" and extra in importlib.metadata.metadata(name).get_all("Provides-Extra")
"""
HF = """#!{real}
import pathlib, re, sys
command, name, folder = sys.argv[1:]
folder = pathlib.Path(re.fullmatch(r"--local-dir=(checkpoints/[\\w.-]+)", folder)[1])
assert command == "download" and name.partition("/")[2] == folder.name
folder.parent.mkdir(exist_ok=True)
folder.symlink_to({standing!r}[folder.name])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The project's folder as a user has it after `git clone`, with videos of their own."""
    folder = tmp_path_factory.mktemp("first_hour")
    for name in ("configs", "launch", "tspo_jax", "requirements.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    videos = folder / "my_videos"
    videos.mkdir()
    names = sorted({q["video"] for q in rows_of("held_out.jsonl")} | set(re.findall(r"my_videos/(\w+\.mp4)", PAGE)))
    names = sorted({*names, *re.findall(r"^(\w+\.mp4),", PAGE, re.MULTILINE)})
    plans = iter(make_video_plan(seed, World()) for seed in range(1000))
    short = (plan for plan in plans if plan.duration < 75)
    for name in names:
        write_video(next(short), videos / name)

    tspo = folder / "standing_for" / "TSPO-0.4B"
    tspo.parent.mkdir()
    export(load_agent(TOY / "clip")[1], TOY / "clip", tspo)
    standing = {"clip-vit-large-patch14": TOY / "clip", "TSPO-0.4B": tspo, "LLaVA-Video-7B-Qwen2": TOY / "llava_video"}
    values = {"real": sys.executable, "less": LESS, "standing": {name: str(path) for name, path in standing.items()}}
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("pip", PIP), ("hf", HF)):
        (binaries / name).write_text(text.format(**values))
        (binaries / name).chmod(0o755)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    wanted = "".join((ROOT / name).read_text() for name in ("requirements.txt", "pyproject.toml"))
    (folder / ".venv" / "installed").write_text(f"{wanted}torch 0  tpu 0\n")
    return folder


def rows_of(name):
    (text,) = [text for _, file, text in BLOCKS if file == name]
    return [json.loads(line) for line in text.splitlines()]


def run(block, folder):
    language, file, text = block
    if file:
        (folder / file).write_text(text)
        return ""
    command = ["bash", "-c", f"set -euo pipefail\nsource .venv/bin/activate\n{text}"]
    if language == "python":
        command = [sys.executable, "-c", text]
    environment = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(1),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def outputs(folder):
    """What each block printed, by its text, the page's commands having been run one after the other."""
    return {block[2]: run(block, folder) for block in BLOCKS}


def test_the_page_holds_commands_for_all_that_it_tells():
    assert {language for language, _, _ in BLOCKS} == {"bash", "json", "csv", "python"}
    assert PAGE.count("```") == 2 * len(BLOCKS)
    commands = re.findall(r"^python -m tspo_jax\.(\w+)", PAGE, re.MULTILINE)
    assert set(commands) == {"select_frames", "answer", "predecode", "train", "doctor", "evaluate", "report"}


@pytest.mark.slow
def test_every_command_does_what_the_page_says(outputs, folder):
    picks = json.loads((folder / "picks.json").read_text())
    assert len(picks["frame_idx"]) == 8 and len(picks["scores"]) > 50
    assert eval(outputs[BLOCKS[-1][2]]) == list(zip(picks["frame_idx"], picks["timestamps"], strict=True))
    assert (folder / "picks.jpg").stat().st_size > 1000 and "<svg" in (folder / "picks.html").read_text()
    printed = [json.loads(out) for text, out in outputs.items() if "tspo_jax.answer" in text]
    assert len(printed) == 2 and all(len(out["frame_idx"]) == 8 and out["answer"] for out in printed)
    assert len(json.loads((folder / "picked" / "manifest.json").read_text())["frames"]) == 8


@pytest.mark.slow
def test_both_question_files_are_read_whole(outputs, folder):
    by_hand, errors = read_questions(folder / "held_out.jsonl", folder / "my_videos")
    assert not errors and [question.answer for question in by_hand] == ["B", "B"]
    table, errors = read_questions(folder / "questions.csv", folder / "my_videos")
    assert not errors and [question.answer for question in table] == list("ACBA")
    assert table[0].options == ("the cat", "a dog", "nobody")


@pytest.mark.slow
def test_the_table_has_both_agents(outputs, folder):
    summary = json.loads((folder / "mine.json").read_text())
    methods = {row["method"] for row in summary["accuracy"]}
    assert methods == {"uniform", "clip-topk", "topk of published", "topk"}
    assert summary["num_questions"] == len(rows_of("held_out.jsonl"))
    steps = (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]
    assert "topk of published" in json.dumps(summary["beside"])
    assert "trained agent, top-k of published" in (folder / "runs" / "mine" / "report.html").read_text()
