import dataclasses

import numpy as np
import pytest
import tiny_store

from tspo_jax.answering.calls import CaptionCall
from tspo_jax.answering.clip_captions import StoredClips, caption_video, cut, is_captioner
from tspo_jax.answering.frame_answers import Request
from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.data import frame_store
from tspo_jax.data.frame_store import FrameStore


@pytest.fixture(scope="module")
def captioner(golden):
    return load_captioner(golden / "swinbert_tiny")


@pytest.fixture(scope="module")
def store(golden, tmp_path_factory):
    return FrameStore(tiny_store.make_store(tmp_path_factory.mktemp("videos"), golden))


def test_cut():
    assert [part.tolist() for part in cut(np.array([1.0, 2, 3, 4.5, 9]), 2.0)] == [[0, 1], [2, 3], [4]]
    assert [part.tolist() for part in cut(np.arange(3.0), 0)] == [[0, 1, 2]]
    with pytest.raises(ValueError, match="must be positive"):
        cut(np.arange(3.0), -1.0)


def test_caption_of_golden_frames(captioner, golden):
    """Frames as they were cropped give the caption of the golden decoding."""
    data = np.load(golden / "swinbert_tiny.npz")
    for frames, ids in zip(data["frames"], data["decode/soft/greedy"], strict=True):
        text, confidence = captioner.caption(frames)
        assert text == captioner.tokenizer.decode(ids[1:]) and 0 < confidence <= 1
    assert captioner.frame_places(100)[[0, -1]].tolist() == [0, 99]
    with pytest.raises(ValueError, match="without frames"):
        captioner.caption(data["frames"][0][:0])


def test_everywhere_the_same_caption(captioner, store):
    """The command, the data set's captioner and backtracking's see the same frames and say the same."""
    video = store.video(tiny_store.SHORT)
    (whole,) = caption_video(captioner, video.timestamps, lambda picks: list(store.frames(video.name, picks)))
    assert (whole.start, whole.end) == (video.timestamps[0], video.timestamps[-1])
    clips = StoredClips(captioner, store)
    (reply,) = clips.describe([CaptionCall(video.name, tuple(video.timestamps + 0.01), 0, "Say what happens.")])
    request = Request("a", video.name, np.arange(video.num_frames)[None], "Say what happens.")
    ((answered,),) = clips.answers([request], 16)
    assert reply.text == answered[1][0] == whole.caption
    other = dataclasses.replace(captioner, identity="other")
    assert StoredClips(other, store).identity != clips.identity


def test_a_store_of_smaller_frames_than_the_model_sees(captioner, tmp_path):
    frame_store.open_settings(tmp_path, frame_store.StoreSettings(short_side=63))
    with pytest.raises(frame_store.StoreError, match="shorter side of 63 pixels, the model sees 64; make a store with"):
        StoredClips(captioner, FrameStore(tmp_path))


def test_folders(golden):
    assert is_captioner(golden / "swinbert_tiny") and not is_captioner(golden / "llava_video_grid")
