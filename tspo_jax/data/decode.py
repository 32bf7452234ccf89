"""Frames of a video file by their number in display order, with true presentation times.

The file's packets are read once (no decoding) for the number of frames, their times and key frames, and to notice what
is missing. Pictures come from PyAV. It leaves out what H.264 lets it leave out (see VideoInfo.can_skip) and then takes
half of decord's time for one picture per second. Where it fails, they come from decord, which the published numbers
used, unless decord counts other frames than the file has or is known to return wrong ones.
"""

import dataclasses
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

try:
    import decord
except ImportError:  # there are wheels for Linux on x86-64 only
    decord = None

DECODERS = ("pyav", "decord")  # in the order they are tried
# Where decord's pictures equal a full decode. After a seek it returns other frames of HEVC with open groups of
# pictures, of MPEG-2, of transport streams, and of MPEG-4 and AVI with B pictures; rotated pictures come out scrambled.
_DECORD_CODECS = ("h264", "vp8", "vp9")
_DECORD_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
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
      ticks: int64 [num_frames], ascending presentation times, the first frame at its own.
      time_base: seconds per tick.
      has_times: the file tells times; else the ticks are frame numbers.
      key_frames: int64 [n], ascending frame numbers.
      can_skip: pictures that no other picture refers to (most B pictures) can be told without decoding them.
    """

    path: str
    codec: str
    container: str
    fps: float
    width: int
    height: int
    rotation: int
    ticks: np.ndarray
    time_base: float
    has_times: bool
    key_frames: np.ndarray
    can_skip: bool

    @property
    def num_frames(self) -> int:
        return len(self.ticks)

    def times(self, frame_idx: slice | int | np.ndarray = slice(None)) -> np.ndarray:
        """Presentation times in seconds, float64, of these frames. Computed, as a long video has a million of them."""
        return self.ticks[frame_idx] * self.time_base

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
        """Name and version of the decoder in use; final once the frames were read."""
        return decoder_version(self._decoders[0])

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
    """Reads all packets of the picture stream and decodes the first picture; raises VideoError (see Video)."""
    path = str(path)
    if not Path(path).is_file():
        raise VideoError(path, "no such file")
    if Path(path).stat().st_size == 0:
        raise VideoError(path, "is empty (0 bytes)")
    try:
        with _open(path) as container:
            return _probe(path, container)
    except (av.error.FFmpegError, OSError, IndexError) as error:  # IndexError: a stream that appears in mid-file
        raise VideoError(path, f"is not a video, truncated or damaged ({_reason(error)})") from error


def _probe(path: str, container: av.container.InputContainer) -> VideoInfo:
    stream = _picture_stream(container)
    if stream is None:
        raise VideoError(path, "has no picture stream")
    # Eight bytes per picture and no copy of them: a video of ten hours has a million.
    times, keys, pictures, packets, end, all_timed = array("q"), array("q"), 0, 0, 0.0, True
    # Where the header does not count the pictures (Matroska), the end of all streams shows whether the file is whole.
    for packet in container.demux(stream) if stream.frames else container.demux():
        if packet.size == 0:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and packet.time_base:
            end = max(end, (time + (packet.duration or 0)) * float(packet.time_base))
        if packet.stream_index == stream.index:
            packets += 1
            if not packet.is_discard:
                keys.extend((pictures,) if packet.is_keyframe else ())
                times.extend(() if time is None else (time,))
                pictures += 1
                all_timed &= packet.pts is not None
    if not pictures:
        raise VideoError(path, "has no pictures (zero length)")
    if packets < 0.99 * stream.frames - 1:
        raise VideoError(path, f"is truncated: its header lists {stream.frames} pictures, {packets} are there")
    claimed = (container.duration or 0) / av.time_base
    end -= min(0, container.start_time or 0) / av.time_base  # Matroska's claim counts from 0, wherever the start is
    if not stream.frames and claimed - end > max(1.0, 0.02 * claimed):
        raise VideoError(path, f"is truncated: its header claims {claimed:.1f} s, it ends at {end:.1f} s")
    fps, time_base, ticks = float(stream.average_rate or 0), float(stream.time_base), np.frombuffer(times, np.int64)
    has_times = len(ticks) == pictures
    if has_times and container.format.name == "avi" and stream.codec_context.has_b_frames:
        # AVI has no presentation times. FFmpeg makes some up, for H.264 in the order of decoding.
        has_times = not np.all(ticks[1:] > ticks[:-1])
    if has_times:
        key_times = ticks[keys]
        ticks.sort()
        key_frames = np.unique(ticks.searchsorted(key_times))
        length = float(ticks[-1] - ticks[0]) * time_base
        fps = fps or ((pictures - 1) / length if length > 0 else 1.0)
    else:
        fps = fps or 25.0
        ticks, key_frames, time_base = np.arange(pictures), np.frombuffer(keys, np.int64), 1 / fps
    container.seek(int(ticks[0]), stream=stream) if has_times else container.seek(0)
    picture = next(container.decode(stream), None)
    if picture is None:
        raise VideoError(path, "no picture of it can be decoded")
    turns = round(picture.rotation / 90) % 4
    width, height = (picture.height, picture.width) if turns % 2 else (picture.width, picture.height)
    codec, kind = stream.codec_context.name, container.format.name
    # In other codecs, and between the fields of an interlaced picture, a skipped packet may be missed by those kept.
    can_skip = codec == "h264" and has_times and all_timed and not picture.interlaced_frame
    return VideoInfo(path, codec, kind, fps, width, height, turns, ticks, time_base, has_times, key_frames, can_skip)


def _read_decord(info: VideoInfo, wanted: np.ndarray, size: tuple[int, int], threads: int) -> Iterator[np.ndarray]:
    if decord is None:
        raise VideoError(info.path, "decord is not installed")
    if info.rotation or info.codec not in _DECORD_CODECS or info.container not in _DECORD_CONTAINERS:
        raise VideoError(
            info.path, f"decord is not used for {info.codec} in {info.container}, rotation {info.rotation}"
        )
    decord.logging.set_level(decord.logging.QUIET)
    try:
        width, height = size if size != (info.width, info.height) else (-1, -1)
        reader = decord.VideoReader(info.path, num_threads=threads, width=width, height=height)
        if len(reader) != info.num_frames:
            raise VideoError(info.path, f"decord counts {len(reader)} frames, the file has {info.num_frames}")
        for i in wanted:
            frame = reader[int(i)].asnumpy()
            if frame.shape != (size[1], size[0], 3):  # so for some narrow pictures
                raise VideoError(info.path, f"decord gives pictures of shape {frame.shape} for {size[0]} x {size[1]}")
            yield frame
    except (decord.DECORDError, RuntimeError, AssertionError, IndexError) as error:
        raise VideoError(info.path, f"decord cannot read it ({_reason(error)})") from error


def _read_pyav(info: VideoInfo, wanted: np.ndarray, size: tuple[int, int], threads: int) -> Iterator[np.ndarray]:
    try:
        with _open(info.path) as container:
            stream = _picture_stream(container)
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "AUTO"
            needed = set(info.ticks[wanted].tolist()) if info.can_skip else None
            as_rgb = _rgb_converter(info.rotation, size, threads)
            pictures, picture, number = _decode(container, stream, needed), None, -1
            for target in wanted:
                key = info.key_frames[np.searchsorted(info.key_frames, target, side="right") - 1 :][:1]
                if info.has_times and key.size and number + _SEEK_AHEAD < key[0] <= target:
                    container.seek(int(info.ticks[key[0]]), stream=stream)
                    pictures, number = _decode(container, stream, needed), int(key[0]) - 1
                while number < target and (picture := next(pictures, None)) is not None:
                    number = _frame_number(info, picture, number + 1)
                if number != target:
                    at = f"{info.times(target):.2f} s"
                    raise VideoError(info.path, f"frame {target} at {at} cannot be decoded")
                yield as_rgb(picture)
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(info.path, f"PyAV cannot read it ({_reason(error)})") from error


def _decode(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, needed: set[int] | None
) -> Iterator[av.VideoFrame]:
    """The pictures from here on; with `needed` times, only these and those that other pictures refer to."""
    for packet in container.demux(stream):
        if needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        yield from packet.decode()


_READERS = {"decord": _read_decord, "pyav": _read_pyav}


def _frame_number(info: VideoInfo, picture: av.VideoFrame, counted: int) -> int:
    """The number of a decoded picture: counted, and set forward by its presentation time where pictures were lost."""
    if not info.has_times or picture.pts is None or (counted < info.num_frames and info.ticks[counted] == picture.pts):
        return counted
    by_time = int(info.ticks.searchsorted(picture.pts))
    exact = by_time < info.num_frames and info.ticks[by_time] == picture.pts
    return max(counted, by_time) if exact else counted


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


def _open(path: str) -> av.container.InputContainer:
    return av.open(path, metadata_errors="replace")  # titles in another encoding are no reason to refuse a video


def _picture_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    """The first picture stream that is no cover image."""
    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & cover), None)


def _reason(error: Exception) -> str:
    """The telling part of a decoder's message: one line, the same at every run (decord's has the time in it)."""
    text = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line).removeprefix("Check failed: ")
