"""The study of captions and retrieval: its data, its starts, and its table."""

import json

import jax
import numpy as np
import pytest

from benchmarks import video_text_toy as study
from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.checkpoints.swinbert_folders import start_captioner
from tspo_jax.checkpoints.testa_folders import load_testa
from tspo_jax.data.caption_files import frames_of, read_examples
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.toy.scenes import make_video_plan, video_seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "NUM_VIDEOS", {"train": 2, "eval": 1})
        study.make_data(folder)
    return folder


def test_captions_are_of_the_frames_of_their_scenes(folder):
    store = FrameStore(folder / "train")
    examples = {kind: read_examples(folder / f"train_{kind}.jsonl") for kind in ("scenes", "events", "whole")}
    assert [len(examples[kind]) for kind in ("scenes", "events", "whole")] == [8, 2, 6]
    for i, event in enumerate(examples["events"]):
        plan = make_video_plan(video_seed("train", study.RUN, i), study.WORLD)
        shown = [plan.scenes[plan.scene_index(t)] for t in store.video(event.video).timestamps[frames_of(event, store)]]
        (ball,) = {scene.ball for scene in shown} - {None}  # those of the first and last scene are not in it
        assert f" {ball} ball " in event.caption and len(shown) in (30, 31)
        for row in (row for row in examples["scenes"] if row.video == event.video):
            times = store.video(row.video).timestamps[frames_of(row, store)]
            assert len({plan.scene_index(t) for t in times}) == 1
            ball = plan.scenes[plan.scene_index(times[0])].ball
            assert f" {ball} ball " in row.caption if ball else " ball " not in row.caption
    assert FrameStore(folder / "eval", load_clip(study.CLIP).identity).names_with_features() == ["0000"]


@pytest.mark.slow
def test_starts(folder):
    """Untrained folders load and have words for every caption; another number of frames changes no parameter."""
    study.new_captioner(folder / "captioner", folder)
    study.with_frames(folder / "captioner", 8, folder / "captioner_8")
    two, eight = start_captioner(folder / "captioner"), start_captioner(folder / "captioner_8")
    assert (two.config.num_frames, eight.config.num_frames) == (2, 8)
    jax.tree.map(np.testing.assert_array_equal, two.params, eight.params)
    text = read_examples(folder / "train_whole.jsonl")[0].caption
    assert two.tokenizer.decode(two.tokenizer.encode(text)) == text
    study.new_retriever(folder / "retriever", folder)
    model = load_testa(folder / "retriever", num_frames=32, testa_r=study.TESTA_R)
    assert model.config.vision.tokens_after(32)[-1] == (16, 8)


@pytest.mark.slow
def test_a_retriever_is_trained_and_asked(folder, monkeypatch):
    for name in ("SCENE_SEARCH", "WHOLE_SEARCH"):
        monkeypatch.setattr(study, name, study.Sizes(1, 2, 1e-3))
    found = study.measure_retriever(folder, "testa", 0)
    assert found == {"recall_1": 1.0, "recall_5": 1.0, "queries": 3}  # of one video
    assert study.measure_retriever(folder, "clip", 0) == found


def test_cider():
    pytest.importorskip("pycocoevalcap")
    right = ["a tree with a red ball in the desert", "a boat with a blue ball on the sea", "a car at night"]
    assert study.cider(right, right) == pytest.approx(10)
    assert 0 < study.cider([right[0], right[1], "a boat"], right) < 8


def test_table():
    def row(run, seed, **values):
        return {"id": f"{run}/{seed}", "run": run, "seed": seed} | values

    rows = [row("8", seed, exact=0.25, cider=1.0) for seed in (0, 1)]
    rows += [row("32", seed, exact=0.75 + seed / 10, cider=5.0) for seed in (0, 1, 2)]
    rows += [row("clip", 0, recall_1=0.125, recall_5=0.5)]
    text = study.table(rows)
    assert "| 8 frames | 0.250 [0.250, 0.250] | 1.000 [1.000, 1.000] |  | 2 |" in text
    assert "| mean of CLIP's features, untrained | 0.125 | 0.500 | 1 |" in text
    assert text.splitlines()[-1].startswith("exact, 32 frames minus 8 frames: 0.550 [")  # of the seeds that both have


def test_resumes(folder, monkeypatch):
    """What is in the file is not measured again."""
    asked = []

    def measure(folder, name, seed):
        asked.append((name, seed))
        return {"exact": 1.0}

    monkeypatch.setattr(study, "measure_captioner", measure)
    monkeypatch.setattr(study, "make_data", lambda folder: None)
    study.run(folder, ["8", "32"], [0])
    study.run(folder, ["8", "32"], [0, 1])
    assert asked == [("8", 0), ("32", 0), ("8", 1), ("32", 1)]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["8/0", "32/0", "8/1", "32/1"]
