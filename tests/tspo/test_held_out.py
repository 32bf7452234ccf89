"""Held-out questions during training, with answers that are made up; test_train.py has real ones."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_store
from video_files import write_video

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_agent, load_clip
from tspo_jax.devices import sharding
from tspo_jax.pages.report import write_page
from tspo_jax.runs.metrics import read_rows
from tspo_jax.selection.scoring import Scorer, pick
from tspo_jax.tspo.held_out import HeldOut


@pytest.fixture
def config(golden, tmp_path):
    questions = tiny_store.write_questions(tmp_path / "questions.jsonl", num=12)
    config = tiny_store.make_config(golden, tiny_store.make_store(tmp_path, golden), questions)
    config.held_out.every, config.held_out.num_questions = 10, 5
    config.evaluation.budgets = (4, 6)
    return cfg.read(config)


@pytest.fixture
def measure(golden, tmp_path, monkeypatch):
    """(config, step, agent) -> accuracies, and the list of all (question, picks) that were answered."""
    answered = []
    tiny_store.fake_answerer(monkeypatch, answered)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "held_out/topk": 0.5}) + "\n")
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], jax.devices()[:2])
    clip, (graphdef, initial) = load_clip(golden / "tspo_agent"), load_agent(golden / "tspo_agent")

    def call(config, step, agent):
        answered.clear()
        return HeldOut(config, tmp_path, clip, graphdef, initial, mesh, write_page).measure(
            step, agent, None, None
        ), answered

    return call


def test_baselines_are_answered_once_and_picks_are_the_agents(config, measure, golden, tmp_path):
    clip, (graphdef, agent) = load_clip(golden / "tspo_agent"), load_agent(golden / "tspo_agent")
    first, answered = measure(config, 10, agent)
    assert first.keys() == {"uniform", "clip-topk", "topk"}
    assert {item for item, _ in answered} == {"0", "2", "4", "7", "9"}, "evenly spaced"
    assert all(len(picks) == 4 for _, picks in answered), "the first of the budgets"

    other = jax.tree.map(lambda x: x + 0.1, agent)
    second, answered = measure(config, 20, other)
    assert {name: second[name] for name in ("uniform", "clip-topk")} == {n: first[n] for n in ("uniform", "clip-topk")}
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    held_out = HeldOut(config, tmp_path, clip, graphdef, agent, mesh, write_page)
    scorer = Scorer(clip, (graphdef, other))
    expected = {
        (item.id, tuple(pick("topk", *scorer.ask(held_out.store.features(item.video), item.query), 4).tolist()))
        for item in held_out.items
    }
    assert set(answered) == expected
    (path,) = (tmp_path / "held_out").glob("rows_*.jsonl")
    rows = read_rows(path)
    assert [row["step"] for row in rows].count(20) == 5
    right = [row["correct"] for row in rows if row["step"] == 20]
    assert second["topk"] == pytest.approx(np.mean(right))
    assert "<section>" in (tmp_path / "report.html").read_text()


def test_other_questions_have_another_file(config, measure, golden, tmp_path):
    agent = load_agent(golden / "tspo_agent")[1]
    measure(config, 10, agent)
    others = tiny_store.write_questions(tmp_path / "others.jsonl", num=4)
    _, answered = measure(dataclasses.replace(config, held_out=cfg.HeldOut(10, str(others), 96)), 10, agent)
    assert {item for item, _ in answered} == {"0", "1", "2", "3"}
    assert len(list((tmp_path / "held_out").glob("rows_*.jsonl"))) == 2


@pytest.mark.parametrize("change", [{"protocol": "published"}, {"store": "other"}])
def test_what_is_asked_otherwise_is_another_setting(config, golden, tmp_path, change):
    """Else the best checkpoint would be best by scores that cannot be compared."""
    clip, (graphdef, agent) = load_clip(golden / "tspo_agent"), load_agent(golden / "tspo_agent")
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    if "store" in change:
        videos = {
            name: write_video(tmp_path / f"x{name}", num_frames=200) for name in (tiny_store.LONG, tiny_store.SHORT)
        }
        change = {"store": str(tiny_store.store_videos(tmp_path / "other", videos, golden / "tspo_agent"))}
    other = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **change))
    first, second, same = (
        HeldOut(one, tmp_path, clip, graphdef, agent, mesh, write_page).setting for one in (config, other, config)
    )
    assert first == same != second


def test_questions_that_cannot_be_asked(config, measure, tmp_path):
    def change(**values):
        return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **values))

    with pytest.raises(ValueError, match="config.evaluation.methods lacks topk"):
        measure(change(methods=("uniform",)), 10, {})
    with pytest.raises(ValueError, match="evaluation.batch_size, over all processes, is 3: it must be a multiple of"):
        measure(change(batch_size=3), 10, {})
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        measure(change(questions=str(tmp_path / "absent.jsonl")), 10, {})
    path = tiny_store.write_questions(tmp_path / "unknown.jsonl", num=2)
    path.write_text(path.read_text().replace(tiny_store.SHORT, "unknown.mp4"))
    with pytest.raises(ValueError, match="lacks 1 videos of .*unknown.jsonl, e.g. unknown.mp4"):
        measure(change(questions=str(path)), 10, {})
