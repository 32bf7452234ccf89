"""Answers from frames that an agent chose, from evenly spaced ones, and from given ones."""

import numpy as np
import pytest

from tspo_jax.answering.direct import DirectAnswers
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.selection.choosing import choose
from tspo_jax.selection.scoring import load_scorer
from tspo_jax.selection.video_source import file_source

QUESTION = "Who opens the door?\nA. The cat\nB. A dog"


@pytest.fixture(scope="module")
def scorer(golden):
    return load_scorer(golden / "tspo_agent")


@pytest.mark.parametrize("by_agent", [True, False])
def test_of_video_is_of_its_frames(golden, scorer, by_agent):
    scorer = scorer if by_agent else None
    source = file_source(golden / "tspo_agent.mp4", "tspo_agent.mp4", scorer and scorer.clip)
    answerer = load_answerer(golden / "llava_video_one_token")
    answers = DirectAnswers(answerer, scorer, "bin-max", num_frames=3, max_new_tokens=2)
    result, picks = answers.of_video(source, QUESTION)
    assert picks == choose(source, scorer, QUESTION, 3, "bin-max") and len(picks) == 3
    assert result.pop("frame_idx") == source.frame_idx[picks].tolist()
    assert len(result["token_ids"]) <= 2 and "A. The cat" in result["prompt"]
    assert answers.of_frames(source.pictures(picks), source.times(picks), QUESTION) == result


@pytest.mark.slow
def test_template_and_suffix(golden):
    answerer = load_answerer(golden / "llava_video_one_token")
    frames = np.zeros((2, 40, 40, 3), np.uint8)
    usual = DirectAnswers(answerer, max_new_tokens=1).of_frames(frames, None, QUESTION)["prompt"]
    other = DirectAnswers(answerer, template="chatml_direct", suffix="Say why.", max_new_tokens=1)
    prompt = other.of_frames(frames, None, QUESTION)["prompt"]
    assert "Say why." in prompt and "Say why." not in usual
