"""Decoding: the original's candidates, the right picture for every number, true times, clear errors."""

import pickle
import socket
import struct
import subprocess
import sys

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


@pytest.mark.slow
def test_training_needs_no_video_decoder(video):
    """As on an accelerator's machine that has only frames decoded elsewhere; who decodes there is told what lacks."""
    script = """
import sys
sys.modules["av"] = sys.modules["decord"] = None
import tspo_jax.train, tspo_jax.train_answerer
from tspo_jax.data.decode import Video
Video(sys.argv[1])
"""
    run = subprocess.run([sys.executable, "-c", script, video], capture_output=True, text=True)
    assert run.stderr.strip().endswith("PyAV, which is not installed (pip install av)"), run.stderr


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


# ---- real files: streams without an index, clocks, several picture streams, names --------------------------------


def _long_gop(path, num_frames=60, **options):
    """One key frame, with B pictures."""
    return write_video(path, num_frames, codec_options={"x264-params": "keyint=9999:scenecut=0:bframes=3"}, **options)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_one_key_frame_in_a_transport_stream(tmp_path, codec):
    path = tmp_path / "segment.ts"
    video = Video(_long_gop(path) if codec == "libx264" else write_video(path, 60, codec=codec))
    assert video.num_frames == 60
    assert shown_numbers(video.frames(video.candidates())) == [0, 25, 50]


@pytest.mark.parametrize("name", ["v.ts", "v.mpg", "v.h264", "v.mkv"])
def test_a_seek_that_leads_elsewhere_costs_no_picture(tmp_path, monkeypatch, name):
    monkeypatch.setattr(decode, "_SEEK_AHEAD", 5)
    options = {"codec": "mpeg2video"} if name.endswith("mpg") else {}
    video = Video(write_video(tmp_path / name, 60, **options))
    assert shown_numbers(video.frames([3, 30, 47, 58])) == [3, 30, 47, 58]
    assert shown_numbers(video.frames([59])) == [59]


@pytest.mark.parametrize("start", [0, 40_000_000, 95_441_000])  # ms; 33 bits of a 90 kHz clock wrap at 95,443.7 s
def test_times_count_from_the_start_of_the_video(tmp_path, start):
    times = [start + 40 * i for i in range(60)]
    video = Video(write_video(tmp_path / "v.ts", 60, times_ms=times))
    np.testing.assert_allclose(video.timestamps, 0.04 * np.arange(60), atol=1e-3)
    assert shown_numbers(video.frames(video.candidates())) == [0, 25, 50]


@pytest.mark.parametrize(("before", "after"), [(90_000, 1_000), (30_000, 1_000), (1_000, 40_000_000), (5_000, 4_000)])
def test_a_recording_cut_together_keeps_all_its_pictures(tmp_path, before, after):
    """Two transport streams one behind the other: the clock (ms) is set anew in the middle, as after a break."""
    first = write_video(tmp_path / "a.ts", 30, times_ms=[before + 40 * i for i in range(30)])
    second = write_video(tmp_path / "b.ts", 50, times_ms=[after + 40 * i for i in range(50)])
    (tmp_path / "joined.ts").write_bytes(first.read_bytes() + second.read_bytes())
    video = Video(tmp_path / "joined.ts")
    assert video.num_frames == 80 and len(video.info.clocks) == 2
    np.testing.assert_allclose(video.timestamps, 0.04 * np.arange(80), atol=2e-3)
    assert shown_numbers(video.frames([0, 29, 30, 31, 79])) == [0, 29, 0, 1, 49]


def test_a_recording_that_begins_in_mid_stream_starts_with_its_first_picture(tmp_path):
    whole = write_video(tmp_path / "v.ts", 60).read_bytes()
    video = Video(tmp_path / "v.ts")
    keys = video.info.key_frames
    cut = len(whole) * 3 // 10 // 188 * 188
    (tmp_path / "tail.ts").write_bytes(whole[: 3 * 188] + whole[cut:])  # the tables, then the middle of a group
    tail = Video(tmp_path / "tail.ts")
    first = 60 - tail.num_frames
    assert first in keys and tail.timestamps[0] == 0
    assert shown_numbers(tail.frames(range(tail.num_frames))) == list(range(first, 60))


def test_repeated_times_lose_no_picture(tmp_path):
    times = [40 * (i - (i % 4 == 1)) for i in range(40)]  # every fourth picture at the time of the one before
    data = write_video(
        tmp_path / "v.mkv", 40, times_ms=[40 * i for i in range(40)], codec="mpeg4", codec_options={"qmax": "2"}
    )
    packets = []
    with av.open(str(data)) as source, av.open(str(tmp_path / "repeats.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.pts = packet.dts = times[len(packets)]
                packet.stream = stream
                packets.append(packet.pts)
                out.mux(packet)
    video = Video(tmp_path / "repeats.mkv")
    assert video.num_frames == 40 and not video.info.key_frames.size
    assert shown_numbers(video.frames(range(40))) == list(range(40))


def _with_thumbnail(path, first, default, thumbnails=1, size=(32, 32)):
    """A recording of 50 pictures, and a stream of a few red ones before or behind it."""
    with av.open(str(path), "w") as container:

        def thumbnail():
            stream = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p"
            return stream

        red = thumbnail() if first else None
        movie = container.add_stream("libx264", rate=25, options={"crf": "5"})
        movie.width, movie.height, movie.pix_fmt = 64, 48, "yuv420p"
        red = red or thumbnail()
        marks = av.stream.Disposition
        red.disposition, movie.disposition = (
            (marks.default, marks(0)) if default == "red" else (marks(0), marks.default)
        )
        if default == "both":
            red.disposition = marks.default
        for i in range(thumbnails):
            picture = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), (200, 0, 0), np.uint8))
            picture.pts = i
            container.mux(red.encode(picture))
        for i in range(50):
            container.mux(movie.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i, np.uint8))))
        container.mux([*movie.encode(), *red.encode()])
    return path


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
@pytest.mark.parametrize(("first", "default"), [(True, "movie"), (True, "red"), (True, "both"), (False, "red")])
def test_the_stream_that_a_player_shows_is_taken(tmp_path, name, first, default):
    video = Video(_with_thumbnail(tmp_path / name, first, default))
    assert video.num_frames == 50 and shown_numbers(video.frames([0, 49])) == [0, 49]
    assert f"stream {int(first)} of 2 picture streams (h264, 64 x 48, 50 pictures)" in video.decoder


def test_the_default_stream_then_the_largest(tmp_path):
    small = Video(_with_thumbnail(tmp_path / "a.mkv", True, "movie", thumbnails=30, size=(320, 240)))
    assert small.info.codec == "h264"  # marked as the default, though the other is larger
    large = Video(_with_thumbnail(tmp_path / "b.mkv", True, "both", thumbnails=30, size=(320, 240)))
    assert large.info.codec == "mjpeg" and large.num_frames == 30


def test_packets_without_data_are_not_the_end(tmp_path):
    """AVI files mark a picture that is shown again by an empty packet."""
    with av.open(str(write_video(tmp_path / "v.avi", 40, codec="mpeg4", codec_options={"qmax": "2"}))) as source:
        packets = [packet for packet in source.demux(source.streams.video[0]) if packet.size]
        with av.open(str(tmp_path / "gaps.avi"), "w") as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for i, packet in enumerate(packets):
                packet.pts = packet.dts = i + (i > 10) * 5  # the writer fills the gap with five empty packets
                packet.stream = stream
                out.mux(packet)
    video = Video(tmp_path / "gaps.avi")
    assert video.num_frames == 40
    assert shown_numbers(video.frames(range(40))) == list(range(40))


@pytest.mark.parametrize("name", ["12:30.mp4", "file:x.mp4", "http:x.mp4", "a?b#c %20d.mp4", "concat:a|b.mp4"])
def test_a_path_is_a_path(video, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(video.read_bytes())
    monkeypatch.chdir(tmp_path)
    for decoder in DECODERS:
        assert shown_numbers(Video(name, decoder).frames([0, 7])) == [0, 7]


def test_nothing_makes_a_connection(tmp_path, monkeypatch):
    """A list of addresses with a video's suffix is no video, and nobody is asked for what it lists."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n"
        monkeypatch.chdir(tmp_path)
        for name, text in (("list.mp4", playlist), ("concat.mp4", f"ffconcat version 1.0\nfile '{address}'\n")):
            (tmp_path / name).write_text(text)
            with pytest.raises(VideoError, match=name):
                Video(name)
        with pytest.raises(VideoError, match="no such file"):
            Video(address)
        with pytest.raises(TimeoutError):
            server.accept()


def test_names_and_files_that_the_system_refuses(tmp_path):
    for name in ("x" * 300 + ".mp4", "nul\0.mp4"):
        with pytest.raises(VideoError):
            Video(tmp_path / name)
    with pytest.raises(VideoError, match="is no file"):
        Video(tmp_path)
