"""The command that makes pairs: what it prints, and what it takes over from a run before."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny_store import LONG, SHORT, make_store, write_config

from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo.building import STAGES
from tspo_jax.tpo.pairs import read_pairs


@pytest.fixture(scope="module")
def arguments(golden, tmp_path_factory):
    """Of two questions that were answered before; one is about a video that is not stored."""
    folder = tmp_path_factory.mktemp("pairs")
    question = {"original_question": "<image>\nWhich?\nA. one\nB. two", "solution": "<answer>b</answer>"}
    question |= {"type": "general", "evidence": [[1.0, 2.0]]}
    rows = [question | {"video": video} for video in (LONG, SHORT, "none.mp4")]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage, answer, right in (("evidence", "B", True), ("irrelevant", "A", False), ("incomplete", "B", True)):
        answered = {"answers": [f"It is {answer}."], "named": [answer], "right": [right]}
        lines = [{"id": f"q:{i + 1}", "video": video} | answered for i, video in enumerate((LONG, SHORT))]
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / STAGES[stage]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tpo_config.default()
    config.answerer.folder = str(golden / "llava_video_grid")
    config.data.store = str(make_store(folder, golden))
    config.build.update(questions=str(folder / "q.jsonl"), output=str(folder / "out"), frames=2, sparse_frames=1)
    config.build.update(attempts=1, heldout=0.0)
    return folder, [f"--config={write_config(folder / 'config.py', config)}"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tspo_jax.build_pairs", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_pairs_of_answers_that_are_there(arguments):
    """Nothing is asked again."""
    folder, flags = arguments
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["counts"]["right_with_evidence"] == 2 and result["yield"] == {"irrelevant": 1.0, "incomplete": 0.0}
    assert "left out: q:3: video none.mp4 is not in" in done.stderr
    pairs, _ = read_pairs(folder / "out" / "train.jsonl")
    assert {(pair.video, pair.chosen, pair.rejected) for pair in pairs} == {
        (LONG, "It is B.", "It is A."),
        (SHORT, "It is B.", "It is A."),
    }
