"""Frames of a video file by their number in display order, with true presentation times.

The file's packets are read once (no decoding) for the number of frames, their times and key frames, and to notice what
is missing. Pictures come from PyAV. It leaves out what H.264 lets it leave out (see VideoInfo.can_skip) and then takes
half of decord's time for one picture per second. Where it fails, they come from decord, which the published numbers
used, unless decord counts other frames than the file has or is known to return wrong ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

try:
    import av
    from av.video.reformatter import VideoReformatter
except ImportError:  # machines that train on frames decoded elsewhere do without
    av = None
try:
    import decord
except ImportError:  # there are wheels for Linux on x86-64 only
    decord = None

DECODERS = ("pyav", "decord")  # in the order they are tried
# Where decord's pictures equal a full decode. After a seek it returns other frames of HEVC with open groups of
# pictures, of MPEG-2, of transport streams, and of MPEG-4 and AVI with B pictures; rotated pictures come out scrambled.
_DECORD_CODECS = ("h264", "vp8", "vp9")
_DECORD_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_LONGEST = 30 * 86400.0  # seconds of a video; more is a damaged clock
# Containers whose clock may be set anew in mid-file, forwards too; ffmpeg takes steps of so many seconds out as well.
_CLOCK_IS_SET = ("mpegts", "mpeg")
_CLOCK_STEP = 10.0
_SEEK_AHEAD = 100  # frames; PyAV seeks to a key frame rather than decode more than this many unwanted ones


class VideoError(ValueError):
    """A video that cannot be used: 'file: reason'."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason

    def __reduce__(self):
        path = str(self).removesuffix(f": {self.reason}")
        return VideoError, (path, self.reason)


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the packets of a file say.

    Attributes:
      fps: average frame rate of the container (the one that decord reports).
      width, height: pixels of a picture as displayed, rotation applied.
      codec, container: FFmpeg's names.
      rotation: quarter turns counter-clockwise that the pictures need.
      stream, num_streams: the picture stream that is read, by its number in the file, of how many that hold a video.
      ticks: int64 [num_frames], ascending presentation times from the start of the video: the first is 0.
      time_base: seconds per tick.
      clocks: (frame number, tick of the file's own clock minus ours) from that frame on. A file has several where its
        clock was set anew in its middle, as in a recording cut together; none where it tells no times, and the ticks
        are frame numbers.
      one_to_one: each time of the file's own clock is that of one picture.
      key_frames: int64 [n], ascending numbers of the frames that reading may start at; none without `one_to_one`.
      can_skip: pictures that no other picture refers to (most B pictures) can be told without decoding them.
    """

    path: str
    codec: str
    container: str
    fps: float
    width: int
    height: int
    rotation: int
    stream: int
    num_streams: int
    ticks: np.ndarray
    time_base: float
    clocks: tuple[tuple[int, int], ...]
    one_to_one: bool
    key_frames: np.ndarray
    can_skip: bool

    @property
    def num_frames(self) -> int:
        return len(self.ticks)

    def times(self, frame_idx: slice | int | np.ndarray = slice(None)) -> np.ndarray:
        """Presentation times in seconds, float64, of these frames. Computed, as a long video has a million of them."""
        return self.ticks[frame_idx] * self.time_base

    def own_time(self, frame: int) -> int:
        """Tick of the file's own clock at which a frame is shown."""
        return int(self.ticks[frame]) + next(offset for first, offset in reversed(self.clocks) if first <= frame)

    def frame_at(self, own_time: int | None, start: int = 0) -> int | None:
        """The first frame from `start` on that the file shows at this tick of its own clock; None where there is none.

        Where the clock was set anew, the one that holds at `start` is looked at first.
        """
        if own_time is None:
            return None
        ends = [first for first, _ in self.clocks[1:]] + [self.num_frames]
        for (first, offset), end in zip(self.clocks, ends, strict=True):
            if end > start:
                low = max(first, start)
                frame = low + int(self.ticks[low:end].searchsorted(own_time - offset))
                if frame < end and self.ticks[frame] == own_time - offset:
                    return frame
        return None

    def scaled_size(self, short_side: int) -> tuple[int, int]:
        """Width and height of pictures whose shorter side is reduced to `short_side` where it is larger (0 = keep)."""
        short = min(self.width, self.height)
        if not 0 < short_side < short:
            return self.width, self.height
        return tuple(max(1, round(side * short_side / short)) for side in (self.width, self.height))


class Video:
    """One video file, open for reading.

    With decoder "auto", reading starts with PyAV and goes on with decord where PyAV fails. `threads` per decoder, 0 =
    as many as the decoder likes. Raises VideoError for a file that is missing, no video, without pictures, truncated
    or damaged, ValueError for an unknown decoder.
    """

    def __init__(self, path: str | Path, decoder: str = "auto", threads: int = 0):
        if decoder not in ("auto", *DECODERS):
            raise ValueError(f"decoder is {decoder!r}, must be auto, pyav or decord")
        self.info = probe(path)
        self._threads = threads
        self._decoders = [d for d in DECODERS if decoder in ("auto", d)]

    @property
    def fps(self) -> float:
        return self.info.fps

    @property
    def num_frames(self) -> int:
        return self.info.num_frames

    @property
    def timestamps(self) -> np.ndarray:
        return self.info.times()

    @property
    def decoder(self) -> str:
        """Name and version of the decoder in use, and which stream of several it reads; final once frames were read."""
        return decoder_version(self._decoders[0]) + (f", {self.note}" if self.note else "")

    @property
    def note(self) -> str:
        """What a person should know of the file, "" where there is nothing."""
        info = self.info
        size = f"{info.codec}, {info.width} x {info.height}, {info.num_frames} pictures"
        return f"stream {info.stream} of {info.num_streams} picture streams ({size})" if info.num_streams > 1 else ""

    def candidates(self, fps: float = 1.0) -> np.ndarray:
        """Frame numbers int64 [T] at about `fps` frames per second: see candidate_frames."""
        return candidate_frames(self.info.ticks, self.info.time_base, self.fps, fps)

    def frames(self, frame_idx: Sequence[int] | np.ndarray, short_side: int = 0) -> Iterator[np.ndarray]:
        """RGB pictures uint8 [H, W, 3] of ascending frame numbers, one at a time.

        Reduced in size as VideoInfo.scaled_size says. Raises VideoError where no decoder can decode a picture, with
        the reasons of all, ValueError for numbers that are not ascending or not in the video.
        """
        wanted = np.asarray(frame_idx, np.int64)
        if len(wanted) and (np.any(np.diff(wanted) < 0) or wanted[0] < 0 or wanted[-1] >= self.num_frames):
            raise ValueError(f"frame numbers must ascend within 0-{self.num_frames - 1} of {self.info.path}")
        done, reasons = 0, []
        while True:
            read = _READERS[self._decoders[0]]
            try:
                for frame in read(self.info, wanted[done:], self.info.scaled_size(short_side), self._threads):
                    yield frame
                    done += 1
                return
            except VideoError as error:
                reasons.append(error.reason)
                if len(self._decoders) == 1:
                    raise VideoError(self.info.path, "; ".join(reasons)) from error
                self._decoders.pop(0)


def candidate_frames(ticks: np.ndarray, time_base: float, video_fps: float, fps: float = 1.0) -> np.ndarray:
    """Frame numbers int64 [T] at about `fps` per second, of frames at int64 `ticks` of `time_base` seconds.

    The original's rule, every round(video_fps / fps)-th frame (at least every frame), which all published frame
    indices follow. Where the frame rate varies so much that over 5 % of its intervals, or of the time in them, are off
    by a factor of 1.5, the frames on screen at 0, 1/fps, 2/fps .. seconds instead.
    """
    by_number = np.arange(0, len(ticks), max(1, round(video_fps / fps)), dtype=np.int64)
    intervals = np.diff(ticks[np.append(by_number, -1)]) * (time_base * fps)  # the last: up to the last frame
    off = (intervals > 1.5) | (intervals < 1 / 1.5)
    off[-1] = intervals[-1] > 1.5
    if np.count_nonzero(off) <= 0.05 * len(off) and intervals[off].sum() <= 0.05 * intervals.sum():
        return by_number
    length = float(ticks[-1] - ticks[0]) * time_base
    wanted = ticks[0] + (np.arange(0, length + 1e-6, 1 / fps) + 1e-6) // time_base
    return np.unique(np.searchsorted(ticks, wanted.astype(np.int64), side="right") - 1)


def decoder_version(name: str) -> str:
    return f"decord {decord.__version__}" if name == "decord" else f"pyav {av.__version__}"


def probe(path: str | Path) -> VideoInfo:
    """Reads all packets of the picture streams and decodes the first picture; raises VideoError (see Video)."""
    if av is None:
        raise ImportError("videos are decoded by PyAV, which is not installed (pip install av)", name="av")
    path = str(path)
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot hold
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(path, "no such file" if isinstance(error, FileNotFoundError) else reason) from error
    if not os.path.isfile(path):
        raise VideoError(path, "is no file")
    if size == 0:
        raise VideoError(path, "is empty (0 bytes)")
    try:
        with open_container(path) as container:
            info = _read_times(path, container)
        # Opened anew: a seek back to the start needs an index, which transport streams and raw streams do not have.
        with open_container(path) as container:
            return _with_picture(info, container)
    except (av.error.FFmpegError, OSError, IndexError) as error:  # IndexError: a stream that appears in mid-file
        raise VideoError(path, f"is not a video, truncated or damaged ({short_reason(error)})") from error


class _Packets:
    """What the packets of a stream say: eight bytes per picture and no copy of them, as ten hours have a million."""

    def __init__(self, longest_step: float):
        """`longest_step`: ticks between two pictures; a longer one means that the clock was set anew."""
        self._longest_step = longest_step
        self.times, self.keys, self.clocks = array("q"), array("q"), array("q")
        self.count = self.pictures = 0
        self.all_timed, self._decoded_at = True, None

    def add(self, packet: av.Packet) -> None:
        self.count += 1
        if packet.is_discard:
            return
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.dts is not None:
            if self._decoded_at is not None and not 0 <= packet.dts - self._decoded_at <= self._longest_step:
                self.clocks.append(self.pictures)
            self._decoded_at = packet.dts
        self.keys.extend((self.pictures,) if packet.is_keyframe else ())
        self.times.extend(() if time is None else (time,))
        self.pictures += 1
        self.all_timed &= packet.pts is not None


def _read_times(path: str, container: av.container.InputContainer) -> VideoInfo:
    """All but what a picture must be decoded for: size, rotation, and whether the first pictures can be decoded."""
    streams = picture_streams(container)
    if not streams:
        raise VideoError(path, "has no picture stream")
    step = _CLOCK_STEP if container.format.name in _CLOCK_IS_SET else math.inf
    packets, end = {stream.index: _Packets(step / float(stream.time_base)) for stream in streams}, 0.0
    # Where the header does not count the pictures (Matroska), the end of all streams shows whether the file is whole.
    for packet in container.demux(streams) if all(stream.frames for stream in streams) else container.demux():
        if packet.size == 0:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and packet.time_base:
            end = max(end, (time + (packet.duration or 0)) * float(packet.time_base))
        if packet.stream_index in packets:
            packets[packet.stream_index].add(packet)

    stream = max(streams, key=lambda stream: rank(stream, packets[stream.index].pictures))
    found = packets[stream.index]
    pictures, ticks = found.pictures, np.frombuffer(found.times, np.int64)
    if not pictures:
        raise VideoError(path, "has no pictures (zero length)")
    # AVI counts pictures that are shown again, which have no packet: there the time says whether the end is there.
    reached = container.format.name == "avi" and end >= 0.99 * (container.duration or 0) / av.time_base
    if found.count < 0.99 * stream.frames - 1 and not reached:
        raise VideoError(path, f"is truncated: its header lists {stream.frames} pictures, {found.count} are there")
    claimed = (container.duration or 0) / av.time_base
    end -= min(0, container.start_time or 0) / av.time_base  # Matroska's claim counts from 0, wherever the start is
    if not stream.frames and claimed - end > max(1.0, 0.02 * claimed) and not found.clocks:
        raise VideoError(path, f"is truncated: its header claims {claimed:.1f} s, it ends at {end:.1f} s")
    fps, time_base = float(stream.average_rate or 0), float(stream.time_base)
    has_times = len(ticks) == pictures
    if has_times and container.format.name == "avi" and stream.codec_context.has_b_frames:
        # AVI has no presentation times. FFmpeg makes some up, for H.264 in the order of decoding.
        has_times = not np.all(ticks[1:] > ticks[:-1])
    if has_times:
        keys = ticks[found.keys]
        clocks = _own_clocks(ticks, found.clocks, fps and round(1 / (fps * time_base)))
        length = float(ticks[-1]) * time_base
        if length > _LONGEST:
            raise VideoError(path, f"its presentation times span {length / 86400:,.0f} days, which cannot be; remux it")
        fps = fps or ((pictures - 1) / length if length > 0 else 1.0)
        one_to_one = len(clocks) == 1 and not np.any(ticks[1:] == ticks[:-1])
        key_frames = np.unique(ticks.searchsorted(keys - clocks[0][1])) if one_to_one else np.zeros(0, np.int64)
    else:
        fps = fps or 25.0
        ticks, clocks, time_base = np.arange(pictures), (), 1 / fps
        one_to_one, key_frames = False, np.zeros(0, np.int64)
    codec, kind = stream.codec_context.name, container.format.name
    # In other codecs a skipped packet may be missed by those kept, and in recordings from the air, which are often
    # damaged, it changes what the decoder makes of its neighbours.
    can_skip = codec == "h264" and one_to_one and found.all_timed and kind not in _CLOCK_IS_SET
    num_streams = sum(packets[other.index].pictures > 0 for other in streams)
    return VideoInfo(
        *(path, codec, kind, fps),
        *(0, 0, 0),  # until a picture is decoded
        *(stream.index, num_streams, ticks, time_base, clocks, one_to_one, key_frames, can_skip),
    )


def _own_clocks(ticks: np.ndarray, set_anew: Sequence[int], interval: int) -> tuple[tuple[int, int], ...]:
    """Turns a file's own times, in the order of its packets, into ascending ones from 0, in place.

    Args:
      set_anew: numbers of the packets at which the clock was set anew.
      interval: ticks from the last picture of one clock to the first of the next, at least 1.
    Returns: VideoInfo.clocks.
    """
    clocks, now = [], 0
    for first, end in itertools.pairwise([0, *set_anew, len(ticks)]):
        part = ticks[first:end]
        part.sort()
        clocks.append((first, int(part[0]) - now))
        part -= clocks[-1][1]
        now = int(part[-1]) + max(1, interval)
    return tuple(clocks)


def _with_picture(info: VideoInfo, container: av.container.InputContainer) -> VideoInfo:
    """What the first picture that can be decoded says. Pictures before it, whose references a recording that begins in
    mid-stream lacks, are no part of the video."""
    stream = container.streams[info.stream]
    picture = next(_decode(container, stream), None)
    if picture is None:
        raise VideoError(info.path, "no picture of it can be decoded")
    turns = round(picture.rotation / 90) % 4
    width, height = (picture.height, picture.width) if turns % 2 else (picture.width, picture.height)
    info = dataclasses.replace(
        info,
        width=width,
        height=height,
        rotation=turns,
        # Between the fields of an interlaced picture, a skipped packet may be missed by those kept.
        can_skip=info.can_skip and not picture.interlaced_frame,
    )
    first = (info.frame_at(picture.pts) if info.clocks else 0) or 0
    if not first or (info.key_frames.size and first > info.key_frames[0]):  # behind a key frame, the loss is damage
        return info
    start = int(info.ticks[first])
    current = max(i for i, (number, _) in enumerate(info.clocks) if number <= first)
    return dataclasses.replace(
        info,
        ticks=info.ticks[first:] - start,
        clocks=tuple((max(0, number - first), offset + start) for number, offset in info.clocks[current:]),
        key_frames=info.key_frames[info.key_frames >= first] - first,
    )


def _read_decord(info: VideoInfo, wanted: np.ndarray, size: tuple[int, int], threads: int) -> Iterator[np.ndarray]:
    if decord is None:
        raise VideoError(info.path, "decord is not installed")
    if info.num_streams > 1:
        raise VideoError(info.path, f"decord is not used where there are {info.num_streams} picture streams")
    if info.rotation or info.codec not in _DECORD_CODECS or info.container not in _DECORD_CONTAINERS:
        raise VideoError(
            info.path, f"decord is not used for {info.codec} in {info.container}, rotation {info.rotation}"
        )
    decord.logging.set_level(decord.logging.QUIET)
    try:
        width, height = size if size != (info.width, info.height) else (-1, -1)
        reader = decord.VideoReader(os.path.abspath(info.path), num_threads=threads, width=width, height=height)
        if len(reader) != info.num_frames:
            raise VideoError(info.path, f"decord counts {len(reader)} frames, the file has {info.num_frames}")
        for i in wanted:
            frame = reader[int(i)].asnumpy()
            if frame.shape != (size[1], size[0], 3):  # so for some narrow pictures
                raise VideoError(info.path, f"decord gives pictures of shape {frame.shape} for {size[0]} x {size[1]}")
            yield frame
    except (decord.DECORDError, RuntimeError, AssertionError, IndexError) as error:
        raise VideoError(info.path, f"decord cannot read it ({short_reason(error)})") from error


def _read_pyav(info: VideoInfo, wanted: np.ndarray, size: tuple[int, int], threads: int) -> Iterator[np.ndarray]:
    needed = {info.own_time(frame) for frame in wanted} if info.can_skip else None
    as_rgb = _rgb_converter(info.rotation, size, threads)
    with contextlib.ExitStack() as opened:

        def start() -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
            opened.close()
            container = opened.enter_context(open_container(info.path))
            stream = container.streams[info.stream]
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "AUTO"
            return container, stream

        try:
            container, stream = start()
            pictures, picture, number, seeks = _decode(container, stream, needed), None, -1, True
            for target in map(int, wanted):
                key = info.key_frames[np.searchsorted(info.key_frames, target, side="right") - 1 :][:1]
                if seeks and key.size and number + _SEEK_AHEAD < key[0] <= target:
                    with contextlib.suppress(av.error.FFmpegError):
                        container.seek(info.own_time(int(key[0])), stream=stream)
                    pictures, picture = _decode(container, stream, needed), None
                    if (first := next(pictures, None)) is not None:
                        picture, number = first, info.frame_at(first.pts)
                    # Without an index (transport streams, raw streams) a seek may lead behind the frame or nowhere.
                    if picture is None or number is None or number > target:
                        seeks = False
                        container, stream = start()
                        pictures, number = _decode(container, stream, needed), -1
                while number < target and (picture := next(pictures, None)) is not None:
                    number = _frame_number(info, picture, number + 1)
                if number != target:
                    raise VideoError(info.path, f"frame {target} at {info.times(target):.2f} s cannot be decoded")
                yield as_rgb(picture)
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(info.path, f"PyAV cannot read it ({short_reason(error)})") from error


def _decode(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, needed: set[int] | None = None
) -> Iterator[av.VideoFrame]:
    """The pictures from here on; with `needed` times, only these and those that other pictures refer to."""
    for packet in container.demux(stream):
        if packet.size == 0 and packet.dts is not None:
            continue  # a packet without data stands for no picture; a decoder would take it for the end of the file
        if needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        yield from packet.decode()


_READERS = {"decord": _read_decord, "pyav": _read_pyav}


def _frame_number(info: VideoInfo, picture: av.VideoFrame, counted: int) -> int:
    """The number of a decoded picture: by its presentation time, which tells where pictures were lost or are there
    twice; counted where the file has no such time."""
    by_time = info.frame_at(picture.pts, 0 if info.one_to_one else counted) if info.clocks else None
    return counted if by_time is None else by_time


def _rgb_converter(rotation: int, size: tuple[int, int], threads: int) -> Callable[[av.VideoFrame], np.ndarray]:
    """picture -> uint8 [H, W, 3]."""
    width, height = size[::-1] if rotation % 2 else size
    to_size, to_rgb = VideoReformatter(), VideoReformatter()  # each keeps FFmpeg's tables for the next picture
    options = {"interpolation": "BICUBIC", "threads": threads}

    def convert(picture: av.VideoFrame) -> np.ndarray:
        # In two steps it takes 0.7 ms instead of 2.4 (720p to 384p), and the JPEG is nearer to the full-size picture.
        if picture.format.name == "yuv420p":
            picture = to_size.reformat(picture, width, height, **options)
        rgb = to_rgb.reformat(picture, width, height, "rgb24", **options).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, rotation)) if rotation else rgb

    return convert


def open_container(path: str) -> av.container.InputContainer:
    """A path is a path: never a URL, whatever stands before a colon in it; and a list of addresses that poses as a
    video (HLS) makes no connection. Titles in another encoding are no reason to refuse a video."""
    return av.open(f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"})


def picture_streams(container: av.container.InputContainer) -> list[av.video.stream.VideoStream]:
    """The streams that hold a video: no cover images and no thumbnails."""
    marks = av.stream.Disposition
    pictures_alone = marks.attached_pic | marks.timed_thumbnails
    return [stream for stream in container.streams.video if not stream.disposition & pictures_alone]


def rank(stream: av.video.stream.VideoStream, pictures: int) -> tuple:
    """Players choose the stream with the highest: what moves, then what is marked as the default, then the largest and
    longest."""
    context, default = stream.codec_context, bool(stream.disposition & av.stream.Disposition.default)
    return pictures > 1, default, (context.width or 0) * (context.height or 0), pictures


def short_reason(error: Exception) -> str:
    """The telling part of a decoder's message: one line, the same at every run (decord's has the time in it)."""
    text = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line).removeprefix("Check failed: ")
