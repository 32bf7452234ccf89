"""What the host makes of answers; with a real answerer it runs in test_train.py."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store, write_questions

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import read_questions
from tspo_jax.devices import sharding
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.tspo import environment
from tspo_jax.tspo.environment import Environment


@pytest.fixture(scope="module")
def world(golden, tmp_path_factory):
    """A store and questions about its two videos."""
    folder = tmp_path_factory.mktemp("world")
    store = make_store(folder, golden)
    questions, _ = read_questions(write_questions(folder / "questions.jsonl", num=2))
    return FrameStore(store, load_clip(golden / "tspo_agent").identity), questions


def test_labels_are_the_evidence_or_else_the_target(world):
    store, questions = world
    names = (SHORT, LONG)
    questions = [
        dataclasses.replace(questions[0], evidence=((2.0, 4.5), (7.0, 8.0))),
        dataclasses.replace(questions[1], evidence=()),
    ]
    rows = {
        "index": np.array([0, 1]),
        "mask": np.arange(12) < np.array([[10], [12]]),
        "needle_mask": np.arange(12) < np.array([[0], [5]]),
        "video": np.where(np.arange(12) < 10, names.index(LONG), -1) * np.ones((2, 1), int),
        "frame": np.arange(12) * np.ones((2, 1), int),
    }
    labels = Environment.labels(SimpleNamespace(_questions=questions, _store=store, _names=names), rows)
    assert np.flatnonzero(labels[0]).tolist() == [2, 3, 4, 7] and np.flatnonzero(labels[1]).tolist() == [0, 1, 2, 3, 4]


def test_measure_by_hand():
    general = cfg.GeneralSamples(accuracy=2.0, coverage=1.0)
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, general=general))
    rows = {
        "kind": "general",
        "needle_mask": np.zeros((2, 4), bool),
        "mask": np.arange(4) < np.array([[4], [2]]),
        "features": np.array([[[1, 0], [0, 1], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 0], [0, 0]]], np.float32),
        "text": np.array([[2.0, 0.0], [1.0, 0.0]], np.float32),
    }
    picks = np.array([[[0, 1], [0, 3]], [[0, 1], [0, 1]]])
    found = environment.measure(config, rows, picks, [["B", "none"], ["A", "B"]], ["B", "B"])
    np.testing.assert_array_equal(found["accuracy"], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(found["coverage"], [[0.5, 1], [1, 1]])
    np.testing.assert_array_equal(found["total"], [[2.5, 1], [1, 3]])
    np.testing.assert_array_equal(found["unparsed"], [[0, 1], [0, 0]])
    np.testing.assert_array_equal(found["unique_frames"], [3, 2])
    np.testing.assert_allclose(found["cosine_spread"], [0.5, 0])


def test_further_rewards_count_where_they_have_a_weight():
    data = dataclasses.replace(Config().data, specific=cfg.SpecificSamples(margin=0.5))
    weights = environment.reward_weights(dataclasses.replace(Config(), data=data))
    assert weights == {"general": {"accuracy": 1.0}, "specific": {"accuracy": 1.0, "location": 1.0, "margin": 0.5}}


@pytest.mark.parametrize(("chunk", "chunks"), [(0, 1), (1, 4), (2, 4), (3, 2), (4, 2), (5, 1), (8, 1), (100, 1)])
def test_a_batch_is_answered_in_even_parts(chunk, chunks):
    config = dataclasses.replace(Config(), batch_size=8, answerer=cfg.Answerer(question_chunk=chunk))
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], jax.devices()[:2])
    assert environment.num_chunks(config, mesh) == chunks


def test_videos_are_shown_in_one_size(world):
    store, _ = world
    environment.check_frame_sizes(store, SimpleNamespace(processor=ImageProcessor.siglip(28)))

    def size_of(height, width):
        return (height, width // 4 * 4)

    processor = SimpleNamespace(frame_size=None, size_of=size_of)
    sizes = {size_of(v.height, v.width) for v in map(store.video, store.names())}
    if len(sizes) > 1:
        with pytest.raises(ValueError, match="would be shown in several sizes"):
            environment.check_frame_sizes(store, SimpleNamespace(processor=processor))
    else:
        environment.check_frame_sizes(store, SimpleNamespace(processor=processor))


def test_the_next_frames_are_fetched_while_a_program_blocks_its_caller():
    """A slow store; the answer to each chunk waits, on the main thread, until the frames of the next have come."""
    fetched = [threading.Event() for _ in range(3)]

    def store():
        for event in fetched:
            time.sleep(0.05)
            event.set()
            yield event

    for chunk, behind in zip(environment.one_ahead(store()), [*fetched[1:], fetched[0]], strict=True):
        assert chunk.is_set()
        assert behind.wait(timeout=20)
    for event in fetched:
        event.clear()
    coming = environment.Fetching(store())
    assert all(event.wait(timeout=20) for event in fetched)  # nobody has asked for any
    assert list(coming) == fetched


def test_what_fetching_raises_is_raised_where_it_is_waited_for():
    def broken():
        yield 1
        raise OSError("the store is gone")

    with pytest.raises(OSError, match="the store is gone"):
        list(environment.one_ahead(broken()))
    with pytest.raises(OSError, match="the store is gone"):
        list(environment.Fetching(broken()))
