"""Both stages with a real answerer on stored videos, on one device and on four; what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store, write_questions

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.checkpoints.weights import flatten
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.runs.run_folder import RunFolderError, write_content
from tspo_jax.streaming import folders
from tspo_jax.streaming.clips import clips_of
from tspo_jax.streaming.config import StreamingTraining, default
from tspo_jax.train_streaming import train


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_streaming")
    config = default()
    config.answerer.folder = str(golden / "llava_video_grid")
    config.answerer.dtype = "float32"
    config.data.store = str(make_store(folder, golden))
    config.data.questions = str(write_questions(folder / "questions.jsonl"))
    config.data.clips = 4
    sizes = dict(frames=2, cells=1, width=16, num_layers=2, num_heads=2, num_kv_heads=2, hidden=24, selected=2)
    for name, value in sizes.items():
        config.encoder[name] = value
    config.optimizer.learning_rate = 3e-3
    config.batch_size, config.num_steps = 4, 2
    config.mesh.axes = (("data", 1), ("model", 1))
    return cfg.read(config, StreamingTraining), folder


@pytest.fixture(scope="module")
def trained(base):
    """Stage clip, then stage video from it."""
    config, folder = base
    assert train(config, folder / "clip", jax.devices()[:1])
    video = dataclasses.replace(config, stage="video", init=str(folder / "clip"), labelled_steps=1, num_steps=3)
    assert train(video, folder / "video", jax.devices()[:1])
    return video, folder


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_stages(trained):
    config, folder = trained
    clip, video = rows(folder / "clip"), rows(folder / "video")
    assert len(clip) == 2 and len(video) == 3
    for row in clip:
        assert row["loss"] == pytest.approx(row["losses/answer"], rel=1e-5) and row["grad_norm"] > 0
    weights = [1.0, config.kept, config.kept]
    for row, weight in zip(video, weights, strict=True):
        assert row["loss"] == pytest.approx(row["losses/answer"] + weight * row["losses/selection"], rel=1e-4)
        assert 0 <= row["evidence_found"] <= 1
    answerer = load_answerer(config.answerer.folder)
    one, two = (folders.load(folder / name, answerer) for name in ("clip", "video"))
    assert one.config == two.config and one.identity != two.identity


@pytest.mark.slow
def test_sharded_equals_unsharded(trained):
    """The same steps over four devices: questions over two, the weights of encoder and answerer over two."""
    config, folder = trained
    sharded = dataclasses.replace(config, mesh=cfg.Mesh((("data", 2), ("model", 2))))
    assert train(sharded, folder / "sharded", jax.devices()[:4])
    for alone, split in zip(rows(folder / "video"), rows(folder / "sharded"), strict=True):
        assert split["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    answerer = load_answerer(config.answerer.folder)
    one, two = (flatten(folders.load(folder / name, answerer).params) for name in ("video", "sharded"))
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, atol=2e-4)


@pytest.mark.slow
def test_sizes_of_another_encoder(trained):
    config, folder = trained
    other = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, width=32))
    with pytest.raises(ValueError, match="encoder.width is 32"):
        train(other, folder / "other", jax.devices()[:1])


def test_other_questions_are_refused_by_name(base, tmp_path):
    write_content(tmp_path, {"data.questions": "other", "data.store": "other", "answerer.folder": "other"})
    with pytest.raises(RunFolderError, match="content of config.data.questions, config.data.store, config.answerer.fo"):
        train(base[0], tmp_path, jax.devices()[:1])


def test_clips(base):
    store = FrameStore(base[0].data.store)
    short = clips_of(store.video(SHORT), 2)
    assert [clip.frames.tolist() for clip in short] == [[0, 1], [2, 3], [4, 4]]
    assert short[0].start == 0 and short[0].end == pytest.approx(2, abs=0.1)
    spread = clips_of(store.video(LONG), 2, most=4)
    assert [clip.frames[0] for clip in spread] == [0, 10, 20, 30]


def test_a_video_that_is_not_stored(base, tmp_path):
    config, _ = base
    questions = tmp_path / "questions.jsonl"
    with open(config.data.questions) as file:
        row = json.loads(file.readline()) | {"video": "absent.mp4"}
    questions.write_text(json.dumps(row) + "\n")
    data = dataclasses.replace(config.data, questions=str(questions))
    with pytest.raises(ValueError, match="absent.mp4 is not in"):
        train(dataclasses.replace(config, data=data), tmp_path / "run", jax.devices()[:1])
