"""What the toy world is for, with its committed checkpoints: the answerer's reward means something, and TSPO learns."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny_store import store_videos

from configs import toy
from tspo_jax import config as cfg
from tspo_jax import train
from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.evaluation import run as evaluate
from tspo_jax.runs.metrics import read_rows
from tspo_jax.selection.scoring import Scorer
from tspo_jax.toy.model_quality import measure
from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import World, make_video_plan, video_seed
from tspo_jax.toy.videos import write_video

CHECKPOINTS = ROOT / "tspo_jax/toy/checkpoints"


def test_recorded_quality_is_what_the_toy_world_asks_for():
    quality = json.loads((CHECKPOINTS / "quality.json").read_text())
    assert 0.03 <= quality["spread"] <= 0.05
    families = quality["families"]
    count = sum(family["questions"] for family in families.values())

    def share(name):
        return sum(family[name] * family["questions"] for family in families.values()) / count

    assert share("with_evidence") >= 0.9 and share("without_evidence") <= 0.35
    assert 0.5 <= families["lookup"]["clip_topk"] <= 0.8


@pytest.mark.slow
def test_the_committed_answerer_needs_the_evidence():
    """On videos that neither its training nor the recorded quality knows."""
    seeds = [video_seed("models", 3, i) for i in range(6)]
    quality = measure(load_clip(CHECKPOINTS / "clip"), load_answerer(CHECKPOINTS / "llava_video"), seeds, World())
    for family, shares in quality["families"].items():
        assert shares["with_evidence"] >= 0.75, family
        assert shares["without_evidence"] <= 0.6, family
    assert np.mean([family["with_evidence"] for family in quality["families"].values()]) >= 0.9


@pytest.fixture(scope="module")
def one_video(tmp_path_factory) -> tuple[cfg.Config, float]:
    """The run of the paper's toy (one video, what is shown at its beginning?), and when its first scene ends, in s."""
    folder: Path = tmp_path_factory.mktemp("one_video")
    plan = make_video_plan(video_seed("train", 0, 0), World())
    write_video(plan, folder / "a.mp4")
    (row,) = (row for row in questions_for(plan, "a.mp4") if "beginning" in row["problem"])
    (folder / "question.jsonl").write_text(json.dumps(row) + "\n")
    config = toy.get_config()
    config.agent.clip, config.answerer.folder = str(CHECKPOINTS / "clip"), str(CHECKPOINTS / "llava_video")
    config.data.store = str(store_videos(folder / "store", {"a.mp4": folder / "a.mp4"}, CHECKPOINTS / "clip"))
    config.data.questions = str(folder / "question.jsonl")
    config.data.general.k, config.data.buckets = 6, (256,)
    config.policy.group_size, config.batch_size, config.num_steps, config.log_every = 12, 1, 20, 1
    config.held_out.every = 0
    config.mesh.axes = (("data", 1), ("model", 1))
    return cfg.read(config), plan.scenes[0].end


@pytest.mark.slow
def test_one_video_is_learned_within_20_steps(one_video, tmp_path):
    """The paper's toy: the reward rises from chance to almost 1, and the scores' peak moves to the beginning."""
    config, end_of_first_scene = one_video
    train.train(config, tmp_path, jax.devices()[:1])
    rewards = [row["accuracy/general"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert len(rewards) == 20
    assert np.mean(rewards[:3]) <= 0.5
    assert np.mean(rewards[-5:]) >= 0.9

    clip = load_clip(config.agent.clip)
    store = FrameStore(config.data.store, clip.identity)
    features, times = store.features("a.mp4"), store.video("a.mp4").timestamps
    question = "What is shown at the beginning of the video?"
    peaks = []
    for agent in (config.agent.clip, tmp_path):
        _, scores = Scorer(clip, evaluate.read_agent(config, agent)).ask(features, question)
        peaks.append(times[np.argmax(scores)])
    assert peaks[0] > end_of_first_scene >= peaks[1]
