"""benchmarks/streaming_videos.py on two tiny videos: what is asked, what is counted as found, and what it cost."""

import json
import sys

import pytest
from conftest import ROOT
from tiny_store import LONG, SHORT, make_store
from tiny_streams import save_encoder

from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import read_questions, row

sys.path.insert(0, str(ROOT))
from benchmarks import streaming_videos


@pytest.mark.slow
def test_every_question_of_every_video(golden, tmp_path):
    folder = golden / "llava_video_grid"
    store = FrameStore(make_store(tmp_path, golden))
    rows = [
        row(str(i), video, "What?", ["one", "two"], letter, "general") | {"family": family, "evidence": evidence}
        for i, (video, letter, family, evidence) in enumerate(
            [(SHORT, "A", "x", [[0, 1e3]]), (LONG, "B", "x", [[1e4, 2e4]]), (SHORT, "B", "y", [[0, 1e3]])]
        )
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(tmp_path / "questions.jsonl")[0]
    result = streaming_videos.measure(
        str(folder), str(save_encoder(tmp_path / "encoder", load_answerer(folder))), store, questions
    )
    assert [result[name]["questions"] for name in ("all", "x", "y")] == [3, 2, 1]
    assert [result[name]["evidence_found"] for name in ("x", "y")] == [0.5, 1.0]
    for name in ("all", "x", "y"):
        assert 0 <= result[name]["low"] <= result[name]["right"] <= result[name]["high"] <= 1
    assert result["y"]["right"] + result["all"]["right"] * 3 <= 3  # A and B cannot both be right of one question
    frames = sum(store.video(video).num_frames for video in (SHORT, LONG))
    assert result["clips_encoded"] == pytest.approx(frames / 2, abs=1)
    assert all(seconds > 0 for seconds in result["seconds"].values())
