"""Candidates of a video and their scores: batches, padding, windows, several questions per video."""

import json
import shutil

import jax
import numpy as np
import pytest

from tspo_jax.data.decode import Video
from tspo_jax.runs.run_folder import Checkpoints
from tspo_jax.selection import scoring
from tspo_jax.selection.scoring import load_scorer
from tspo_jax.tspo.programs import TrainState


@pytest.fixture(scope="module")
def scorer(golden):
    return load_scorer(golden / "tspo_agent")


def test_window_is_the_agents(golden, scorer):
    video = Video(golden / "tspo_agent.mp4")
    features = scoring.encode_video(video, scorer.clip).features
    wide, narrow = (s.ask(features, "Why?") for s in (scorer, load_scorer(golden / "tspo_agent", window=2)))
    np.testing.assert_array_equal(wide[0], narrow[0])
    assert np.abs(wide[1] - narrow[1]).max() > 0.01


def test_videos_are_encoded_in_batches_with_their_true_length(golden, scorer, monkeypatch):
    whole = scoring.encode_video(Video(golden / "tspo_agent.mp4"), scorer.clip)
    monkeypatch.setattr(scoring, "FRAME_BATCH", 16)
    seen = []
    parts = scoring.encode_video(
        Video(golden / "tspo_agent.mp4"), scorer.clip, watch=lambda frames, total: (seen.append(total), frames)[1]
    )
    assert seen == [40]
    np.testing.assert_allclose(parts.features, whole.features, atol=1e-5)
    # The positional encoding knows the true T: padding to another multiple changes nothing.
    scores = scorer.ask(whole.features, "Why?")[1]
    monkeypatch.setattr(scoring, "LENGTH_MULTIPLE", 64)
    np.testing.assert_allclose(scorer.ask(whole.features, "Why?")[1], scores, atol=1e-4)


def test_a_second_question_needs_no_video(golden, scorer, tmp_path):
    shutil.copyfile(golden / "tspo_agent.mp4", tmp_path / "video.mp4")
    candidates = scoring.encode_video(Video(tmp_path / "video.mp4"), scorer.clip)
    (tmp_path / "video.mp4").unlink()
    text = scorer.clip.text_features(["Who?", "Why?"])
    for i, question in enumerate(("Who?", "Why?")):
        scores = scorer.ask(candidates.features, question)[1]
        np.testing.assert_allclose(scorer(candidates.features, text[i])[1], scores, atol=1e-4)


def test_a_run_folder_is_an_agent(golden, scorer, tmp_path):
    """Its newest checkpoint, or its best, with the CLIP, window and heads that its config names."""
    _, params = scorer.agent
    other = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(0), x.shape), params)
    run, steps = tmp_path / "run", {"count": np.zeros((), np.int32)}
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(1, TrainState(params, steps), {"batch": 1}, 0.9)
        checkpoints.save(2, TrainState(other, steps), {"batch": 2}, 0.1)
    agent = {"clip": str(golden / "tspo_agent"), "window": 12, "num_heads": 8}
    (run / "config.json").write_text(json.dumps({"agent": agent}))
    features = np.random.default_rng(0).normal(size=(20, scorer.clip.width)).astype(np.float32)
    wanted = scorer.ask(features, "Why?")[1]
    for folder in (run / "best", run / "checkpoints" / "1"):
        np.testing.assert_array_equal(load_scorer(folder).ask(features, "Why?")[1], wanted)
    assert np.abs(load_scorer(run).ask(features, "Why?")[1] - wanted).max() > 0.01
    with pytest.raises(ValueError, match="run: its agent was trained with a window of 12, not 7"):
        load_scorer(run, window=7)
    (run / "config.json").write_text(json.dumps({"agent": agent | {"clip": "gone"}}))
    with pytest.raises(ValueError, match="trained with the CLIP gone, which is not there"):
        load_scorer(run)
    (run / "config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(ValueError, match="is a run that trained no temporal agent"):
        load_scorer(run)
