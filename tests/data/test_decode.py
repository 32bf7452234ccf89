"""Decoding: the original's candidates, the right picture for every number, true times, clear errors."""

import pickle
import struct

import av
import numpy as np
import pytest
from PIL import Image
from video_files import shown_numbers, write_noise, write_video

from tspo_jax.data import decode
from tspo_jax.data.decode import DECODERS, Video, VideoError, candidate_frames


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("decode") / "v.mp4", 120, file_options={"movflags": "faststart"})


@pytest.mark.parametrize("decoder", DECODERS)
def test_golden_candidates(golden, decoder):
    numbers = np.load(golden / "tspo_agent.npz")
    video = Video(golden / "tspo_agent.mp4", decoder)
    candidates = video.candidates()
    np.testing.assert_array_equal(candidates, numbers["candidate_idx"])
    assert video.fps == numbers["fps"] and video.num_frames == numbers["num_frames"]
    np.testing.assert_allclose(video.timestamps[candidates], np.arange(40), atol=1e-6)
    means = [frame.mean() for frame in video.frames(candidates)]
    np.testing.assert_allclose(means, numbers["frame_means"], atol=1e-6)
    assert video.decoder.startswith(decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_ascending_numbers(video, decoder):
    picks = [0, 1, 1, 30, 119]
    assert shown_numbers(Video(video, decoder).frames(picks)) == [0, 1, 1, 30, 59]
    for wrong in ([3, 2], [-1], [120]):
        with pytest.raises(ValueError, match="ascend within 0-119"):
            list(Video(video, decoder).frames(wrong))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("v.mkv", "libx264", {"x264-params": "bframes=3:b-pyramid=2"}),
        ("v.ts", "libx264", {}),
        ("v.avi", "mpeg4", {"bf": "2", "qmax": "2"}),
        ("mpeg4.mkv", "mpeg4", {"bf": "2", "qmax": "2"}),
        ("h264.avi", "libx264", {}),
        ("v.webm", "libvpx-vp9", {}),
        ("mpeg2.mkv", "mpeg2video", {}),
        ("hevc.mp4", "libx265", {"x265-params": "log-level=none:open-gop=1"}),
        ("av1.mp4", "libsvtav1", {"preset": "12"}),
    ],
)
def test_every_codec_gives_the_right_pictures(tmp_path, name, codec, options):
    video = Video(write_video(tmp_path / name, 60, codec=codec, codec_options=options))
    assert video.num_frames == 60 and video.fps == 25
    np.testing.assert_allclose(np.diff(video.timestamps), 0.04, atol=1.1e-3)
    assert shown_numbers(video.frames(video.candidates())) == [0, 25, 50]


def test_pyav_seeks_to_far_frames(video, monkeypatch):
    """Only the key frame's group is decoded, and the picture is still the right one."""
    monkeypatch.setattr(decode, "_SEEK_AHEAD", 20)
    decoded = []
    number = decode._frame_number
    monkeypatch.setattr(decode, "_frame_number", lambda *a: decoded.append(number(*a)) or decoded[-1])
    assert shown_numbers(Video(video, "pyav").frames([2, 100, 110])) == [2, 40, 50]
    assert len(decoded) < 3 + 2 * 12 + 1


@pytest.mark.parametrize(
    ("options", "skips"),
    [
        ("bframes=3:b-pyramid=normal:b-adapt=0", True),
        ("bframes=5:b-pyramid=none:b-adapt=0:open-gop=1", True),
        ("bframes=0", False),
        ("bframes=3:b-adapt=0:tff=1", False),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_skipped_pictures_change_no_other(tmp_path, monkeypatch, options, skips, threads):
    """Every picture asked for is, bit by bit, that of a full decode; pictures that no one needs are left out."""
    path, wanted = write_noise(tmp_path / "v.mp4", 60, options), [0, 7, 8, 21, 40, 59]
    counts, decoded = [], decode._frame_number
    monkeypatch.setattr(decode, "_frame_number", lambda *a: counts.append(decoded(*a)) or counts[-1])
    frames = list(decode._read_pyav(decode.probe(path), np.array(wanted), (64, 48), threads))
    with av.open(str(path)) as container:
        whole = [frame.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray() for frame in container.decode()]
    np.testing.assert_array_equal(frames, [whole[i] for i in wanted])
    assert len(counts) < 50 if skips else len(counts) == 60


def test_variable_frame_rate():
    """Sixty frames in two seconds, then one frame per two seconds: the original's rule would skip most of the end."""
    ticks = 90 * np.concatenate([np.arange(60) * 1000 // 30, 2000 + 2000 * np.arange(20)])
    times = ticks / 90_000
    candidates = candidate_frames(ticks, 1 / 90_000, video_fps=79 / times[-1])
    on_screen = [times[times <= t + 1e-6].max() for t in np.arange(0, times[-1] + 1e-6)]
    np.testing.assert_array_equal(times[candidates], np.unique(on_screen))
    steady = np.arange(3000) * 1001
    np.testing.assert_array_equal(candidate_frames(steady, 1 / 30_000, 29.97), np.arange(0, 3000, 30))
    np.testing.assert_array_equal(candidate_frames(steady, 1 / 30_000, 29.97, fps=2), np.arange(0, 3000, 15))
    slides = np.concatenate([np.arange(1800), 1800 + 600 * np.arange(30)])  # a minute of film, then 10 of slides
    candidates = candidate_frames(slides, 1 / 30, 30.0)
    np.testing.assert_array_equal(candidates, [*range(0, 1800, 30), *range(1800, 1830)])
    # WebM of browsers claims 1,000 pictures per second.
    np.testing.assert_allclose(np.diff(candidate_frames(steady[:900], 1 / 30_000, 1000.0)), 30, atol=1)
    assert list(candidate_frames(steady[:1], 1 / 30_000, 29.97)) == [0]


def test_times_of_a_variable_rate_file(tmp_path):
    times = [0, 40, 80, 1000, 1040, 3000, 3500, 3540]
    video = Video(write_video(tmp_path / "v.mkv", 8, times_ms=times))
    np.testing.assert_allclose(video.timestamps, np.array(times) / 1000, atol=2e-3)


def test_rotation_is_applied(video, tmp_path):
    data = bytearray(video.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    turned = Video(tmp_path / "turned.mp4")
    frame = next(turned.frames([0], short_side=24))
    assert (turned.info.width, turned.info.height) == (48, 64) and frame.shape == (32, 24, 3)
    assert turned.decoder.startswith("pyav")


@pytest.mark.parametrize("decoder", DECODERS)
def test_short_side(video, decoder):
    shapes = {side: next(Video(video, decoder).frames([0], side)).shape for side in (0, 24, 48, 96)}
    assert shapes == {0: (48, 64, 3), 24: (24, 32, 3), 48: (48, 64, 3), 96: (48, 64, 3)}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv444p"])
def test_reduced_pictures_keep_their_colours(tmp_path, decoder, pixels):
    """They are close to the full-size picture reduced by Pillow, whatever the layout and range of its colours."""
    red, green = np.meshgrid(np.linspace(20, 235, 320), np.linspace(235, 20, 240))
    picture = np.stack([red, green, np.full_like(red, 120)], axis=-1).astype(np.uint8)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, pixels
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(picture)), *stream.encode()])
    whole, reduced = (next(Video(tmp_path / "v.mp4", decoder).frames([0], side)) for side in (0, 96))
    expected = np.asarray(Image.fromarray(whole).resize((128, 96), Image.Resampling.BICUBIC), int)
    assert reduced.shape == (96, 128, 3) and np.abs(reduced - expected).mean() < 2


def _sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path, video: None, "no such file"),
        (lambda path, video: path.write_bytes(b""), "is empty"),
        (lambda path, video: path.write_bytes(b"plain text\n" * 50), "is not a video"),
        (lambda path, video: path.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10]), "is truncated"),
        (lambda path, video: write_video(path, 0), "no picture"),
        (lambda path, video: _sound(path), "no picture stream"),
    ],
)
def test_unusable_files_are_named_with_a_reason(tmp_path, video, make, reason):
    path = tmp_path / "bad.mp4"
    make(path, video)
    with pytest.raises(VideoError, match=f"bad.mp4: .*({reason})"):
        Video(path)


def test_truncated_matroska(tmp_path):
    whole = write_video(tmp_path / "v.mkv", 300)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"truncated: its header claims 12\.0 s, it ends at"):
        Video(whole)


def test_matroska_that_starts_late(tmp_path):
    video = Video(write_video(tmp_path / "v.mkv", 50, times_ms=[5000 + 40 * i for i in range(50)]))
    assert video.timestamps[0] == 0.0 and shown_numbers(video.frames(video.candidates())) == [0, 25]


def test_decord_takes_over_from_pyav(video, monkeypatch):
    read_pyav = decode._read_pyav

    def fails_after_two(info, wanted, size, threads):
        yield from read_pyav(info, wanted[:2], size, threads)
        raise VideoError(info.path, "damaged")

    monkeypatch.setitem(decode._READERS, "pyav", fails_after_two)
    opened = Video(video)
    assert shown_numbers(opened.frames([3, 5, 8, 70])) == [3, 5, 8, 10] and opened.decoder.startswith("decord")
    with pytest.raises(VideoError, match="damaged"):
        list(Video(video, "pyav").frames([3, 5, 8]))
    monkeypatch.setattr(decode, "decord", None)
    with pytest.raises(VideoError, match="damaged; decord is not installed"):
        list(Video(video).frames([3, 5, 8]))


def test_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(VideoError("a: b.mp4", "is empty")))
    assert str(error) == "a: b.mp4: is empty" and error.reason == "is empty"
