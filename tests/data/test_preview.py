"""A look at a video without reading it whole."""

import numpy as np
import pytest
from video_files import shown_numbers, write_video

from tspo_jax.data.decode import VideoError
from tspo_jax.data.preview import preview


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "mov"])
def test_length_and_a_picture_from_a_fifth_of_the_video(tmp_path, suffix):
    """Of the key frame before it: one in 12."""
    found = preview(write_video(tmp_path / f"a.{suffix}", num_frames=200), width=32)
    assert found.seconds == pytest.approx(8, abs=0.2) and found.picture.shape == (24, 32, 3)
    (number,) = shown_numbers([found.picture])
    assert 24 <= number <= 48


def test_pictures_are_upright(tmp_path, golden):
    path = write_video(tmp_path / "a.mp4", num_frames=20, size=(96, 32))
    data = bytearray(path.read_bytes())
    # The matrix of the picture track (16.16 and 2.30 numbers, big endian): identity -> a quarter turn.
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    place = data.rindex(identity)  # mvhd has the first one
    data[place : place + 36] = turned
    path.write_bytes(data)
    assert preview(path, width=16).picture.shape == (48, 16, 3)


def test_short_videos_and_files_that_are_none(tmp_path):
    assert preview(write_video(tmp_path / "one.mp4", num_frames=1), 16).picture.shape == (12, 16, 3)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "absent.mp4"):
        with pytest.raises(VideoError, match=f"{name}: is not a video, truncated or damaged"):
            preview(tmp_path / name, 16)
