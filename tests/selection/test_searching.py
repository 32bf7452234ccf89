"""Searching real pictures with a tiny detector of random weights."""

import dataclasses

import numpy as np
import pytest
import tiny_store

from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.selection import searching
from tspo_jax.selection.search_options import SCHEDULES, SearchOptions
from tspo_jax.selection.video_source import file_source, stored_source


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searching")
    tiny_store.make_store(folder, golden)
    return folder


@pytest.fixture(scope="module")
def searcher(golden):
    return searching.Searcher(load_detector(golden / "owlvit_tiny"), targets=("red ball",), cues=("dog",))


@pytest.fixture(scope="module")
def source(folder):
    return stored_source(FrameStore(folder / "store"), tiny_store.LONG)


def watched(source):
    """The same video, and the list of candidates that were read of it."""
    read = []

    def pictures(picks):
        read.extend(picks)
        return source.pictures(picks)

    return dataclasses.replace(source, pictures=pictures), read


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_search_of_a_stored_video(searcher, source, schedule):
    watcher, read = watched(source)
    options = SearchOptions(schedule, grid=(2, 3), share=0.5)
    found = dataclasses.replace(searcher, options=options)(watcher, "Where?", 8)
    assert len(found.picks) == 8 and (np.diff(found.picks) > 0).all() and found.picks[-1] < 40
    assert found.scores.shape == (40,)
    report = found.searched
    assert report["frames"] == len(set(read)) <= 24 and report["rounds"] >= 1
    assert report["detections"] >= report["rounds"]
    assert (report["targets"], report["cues"]) == (["red ball"], ["dog"])
    assert schedule == "released" or len(read) == len(set(read))  # the original may look at frames again


def test_result_of_an_entry_point(searcher, source):
    result = searching.search_frames(searcher, source, "Where?", 4)
    assert result["method"] == "tstar" and result["clip_scores"] is None
    assert len(result["scores"]) == len(result["candidate_idx"]) == 40
    assert set(result["frame_idx"]) <= set(result["candidate_idx"]) and len(result["frame_idx"]) == 4
    np.testing.assert_allclose(result["timestamps"], np.array(result["frame_idx"]) / 25)
    assert (result["fps"], result["num_video_frames"]) == (25, 1000)
    with pytest.raises(ValueError, match="question is empty"):
        searching.search_frames(searcher, source, " ", 4)


def test_a_file_is_read_only_where_it_is_looked_at(searcher, golden, source):
    """Without CLIP: nothing is encoded; the frames are those of the store but for its JPEG."""
    file, read = watched(file_source(golden / tiny_store.LONG, "v", None))
    found = searcher(file, "Where?", 4)
    assert len(read) == found.searched["frames"] == 16
    assert found.searched["notes"] == ["the budget of 4 frames is less than one grid of 16; one was looked at"]


def test_objects_of_the_question_come_first(searcher, source):
    report = searcher(source, "Where?", 4, targets=("lamp", " lamp", ""), cues=("lamp", "cup")).searched
    assert (report["targets"], report["cues"]) == (["lamp"], ["cup"])


def test_objects_that_a_model_names(searcher, source):
    asked = []

    def ground(frames, question):
        asked.append((len(frames), question))
        return ("lamp",), ("cup", "lamp")

    watcher, read = watched(source)
    report = dataclasses.replace(searcher, targets=(), cues=(), ground=ground)(watcher, "Where?", 4).searched
    assert asked == [(8, "Where?")] and (report["targets"], report["cues"]) == (["lamp"], ["cup"])
    assert report["frames"] == len(set(read)) > 16


def test_a_model_that_names_nothing(searcher, source):
    def ground(frames, question):
        raise ValueError("the answerer named no objects")

    found = dataclasses.replace(searcher, targets=(), ground=ground)(source, "Where?", 4)
    assert found.picks.tolist() == [0, 13, 26, 39]
    assert found.searched["fallback"] == "the answerer named no objects" and found.searched["notes"] == []
    assert (found.searched["frames"], found.searched["detections"], found.searched["rounds"]) == (8, 0, 0)


def test_nothing_names_objects(searcher, source):
    with pytest.raises(ValueError, match="nothing names the objects"):
        dataclasses.replace(searcher, targets=())(source, "Where?", 4)


def test_long_names_are_cut_and_told(searcher, source):
    long = "the very long name of a thing that nobody would ever call it by in a conversation"
    report = searcher(source, "Where?", 4, targets=(long,)).searched
    assert f"{long!r} is longer than the detector reads; its end was cut off" in report["notes"]


def test_store_at_another_rate(searcher, source):
    """A second of search is a second of the video, however close its candidates are."""
    fast = dataclasses.replace(
        source,
        frame_idx=np.arange(0, 1000, 5),
        timestamps=np.arange(0, 1000, 5) / 25,
        pictures=lambda picks: source.pictures([pick // 5 for pick in picks]),
    )
    slow, usual = searcher(fast, "Where?", 8), searcher(source, "Where?", 8)
    np.testing.assert_array_equal(slow.picks, 5 * usual.picks)
    assert slow.scores.shape == (200,) and slow.searched == usual.searched


def test_one_per_second():
    assert searching.one_per_second(np.arange(6) * 1.001).tolist() == [0, 1, 2, 3, 4, 5]
    assert searching.one_per_second(np.arange(6) / 2).tolist() == [0, 2, 4]
    assert searching.one_per_second(np.arange(4) * 3.0).tolist() == [0, 1, 2, 3]
    assert searching.one_per_second(np.zeros(1)).tolist() == [0]
