"""Tiny video files whose pictures tell their own number: grey of level 4 x (number mod 60)."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    num_frames: int = 100,
    *,
    codec: str = "libx264",
    rate: int = 25,
    size: tuple[int, int] = (64, 48),
    times_ms: list[int] | None = None,
    codec_options: dict[str, str] | None = None,
    file_options: dict[str, str] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=file_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "5"} | (codec_options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = 12
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 4 * (i % 60), np.uint8))
            if times_ms:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_noise(path: Path, num_frames: int, x264_params: str) -> Path:
    """Pictures of moving noise, so that each is predicted from others and shows what they lost."""
    rng = np.random.default_rng(0)
    large = rng.integers(0, 255, (48 + num_frames, 64 + num_frames, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": x264_params, "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(num_frames):
            shown = np.ascontiguousarray(large[i : i + 48, i // 2 : i // 2 + 64])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())
    return path


def shown_numbers(frames) -> list[int]:
    """Picture numbers (mod 60) read from the grey levels."""
    return [round(float(frame.mean()) / 4) for frame in frames]
