"""Videos as files and in a store: the same candidates, decoded when they are needed and once."""

import numpy as np
import pytest
import tiny_store

from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.data.decode import VideoError
from tspo_jax.selection import video_source


@pytest.fixture(scope="module")
def clip(golden):
    return load_clip(golden / "tspo_agent")


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("video_source")
    tiny_store.make_store(folder, golden)
    return folder


def test_a_file_and_its_copy_in_a_store(folder, clip, monkeypatch):
    encoded = []
    encode = video_source.encode_video
    monkeypatch.setattr(video_source, "encode_video", lambda *args: encoded.append(args) or encode(*args))
    names, open_file = video_source.open_videos(str(folder / tiny_store.SHORT), "")
    file = open_file(names[0], clip)
    names_stored, open_stored = video_source.open_videos("", str(folder / "store"))
    stored = open_stored(tiny_store.SHORT, clip)
    assert names == [tiny_store.SHORT] and names_stored == [tiny_store.SHORT, tiny_store.LONG]
    assert not encoded
    for source in (file, stored):
        assert source.name == tiny_store.SHORT
        np.testing.assert_array_equal(source.frame_idx, np.arange(0, 125, 25))
        np.testing.assert_allclose(source.timestamps, np.arange(5))
        assert source.candidates() is source.candidates()
    assert len(encoded) == 1
    np.testing.assert_allclose(file.candidates().features, stored.candidates().features, atol=1e-5)
    for ours, theirs in zip(file.pictures([1, 3]), stored.pictures([1, 3]), strict=True):
        np.testing.assert_allclose(ours.astype(int), theirs, atol=4)


def test_a_folder(folder):
    (folder / "films" / "sub").mkdir(parents=True)
    for name in ("b.mp4", "sub/a.MP4"):
        (folder / "films" / name).write_bytes((folder / tiny_store.SHORT).read_bytes())
    (folder / "films" / "notes.txt").write_text("no video")
    names, open_video = video_source.open_videos(str(folder / "films"), "")
    assert names == ["b.mp4", "sub/a.MP4"]
    assert len(open_video("sub/a.MP4", None).pictures([0, 4])) == 2


def test_what_is_no_video(folder, tmp_path):
    with pytest.raises(ValueError, match="--video is missing"):
        video_source.open_videos("", "")
    with pytest.raises(ValueError, match=r"holds no video \(.mp4"):
        video_source.open_videos(str(tmp_path), "")
    with pytest.raises(VideoError, match="no such file"):
        video_source.open_videos(str(tmp_path / "none.mp4"), "")
    with pytest.raises(ValueError, match="none.mp4 is not in .*store; its videos are named .*short.mp4"):
        video_source.open_videos("none.mp4", str(folder / "store"))
