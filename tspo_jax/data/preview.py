"""A look at a video without reading it whole: how long it says it is, and one picture."""

import contextlib
import dataclasses
from pathlib import Path

import av
import numpy as np

from tspo_jax.data.decode import VideoError, open_container, picture_streams, rank, short_reason

AT = 0.2  # of the length: past titles and fades


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a video looks like.

    Attributes:
      seconds: length as the file's header claims it; None where it claims none.
      picture: uint8 [H, W, 3], `width` pixels wide, upright.
    """

    seconds: float | None
    picture: np.ndarray


def preview(path: str | Path, width: int) -> Preview:
    """The first picture that can be decoded from a key frame about a fifth into the video.

    Raises VideoError for a file that is no video or of which nothing can be decoded.
    """
    path = str(path)
    try:
        with open_container(path) as container:
            streams = picture_streams(container)
            if not streams:
                raise VideoError(path, "has no picture stream")
            stream = max(streams, key=lambda stream: rank(stream, stream.frames or 2))  # many do not count theirs
            seconds = container.duration / av.time_base if container.duration else None
            if seconds:
                with contextlib.suppress(av.error.FFmpegError):  # no index: the first picture will do
                    container.seek(int((container.start_time or 0) + AT * container.duration))
            picture = next(container.decode(stream), None)
            if picture is None:
                container.seek(0)
                picture = next(container.decode(stream), None)
            if picture is None:
                raise VideoError(path, "no picture of it can be decoded")
            turns = round(picture.rotation / 90) % 4
            across, down = (picture.height, picture.width) if turns % 2 else (picture.width, picture.height)
            size = (width, max(1, round(width * down / across)))[:: -1 if turns % 2 else 1]
            rgb = picture.reformat(*size, "rgb24").to_ndarray()
            return Preview(seconds, np.ascontiguousarray(np.rot90(rgb, turns)))
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise VideoError(path, f"is not a video, truncated or damaged ({short_reason(error)})") from error
