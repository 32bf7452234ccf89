"""Videos of which frames are chosen: files, folders of them, and what is in a frame store."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from tspo_jax.checkpoints.folders import ClipEncoder
from tspo_jax.data.decode import Video, VideoError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.video_files import VIDEO_SUFFIXES, not_taken, videos_below
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.selection.scoring import Candidates, encode_video, stored_candidates


@dataclasses.dataclass(frozen=True)
class Source:
    """A video of which frames are chosen: where its candidates and pictures come from.

    Attributes:
      name: of the video.
      frame_idx, timestamps: of its candidates, int [T] and seconds [T].
      duration: seconds.
      candidates: () -> Candidates; the first call decodes and encodes unless they are in a store.
      pictures: ascending candidate indices -> frames uint8 [H, W, 3].
      fps, num_video_frames, decoder: of the video.
    """

    name: str
    frame_idx: np.ndarray
    timestamps: np.ndarray
    duration: float
    candidates: Callable[[], Candidates]
    pictures: Callable[[Sequence[int]], list[np.ndarray]]
    fps: float
    num_video_frames: int
    decoder: str

    def times(self, picks: Sequence[int]) -> FrameTimes:
        """Of candidates, ascending."""
        return FrameTimes.of(self.timestamps[list(picks)], self.duration)


def file_source(path: str | Path, name: str, clip: ClipEncoder | None) -> Source:
    """A video file; without CLIP it has no candidates to score. Raises VideoError for a file that is no video."""
    video = Video(path)
    if video.note:
        _tell(f"{path}: shown is {video.note}")
    frame_idx = video.candidates()
    return Source(
        name,
        frame_idx,
        video.timestamps[frame_idx],
        len(video.timestamps) / video.fps,
        functools.cache(lambda: encode_video(video, clip, _progress_bar)),
        lambda picks: list(video.frames(frame_idx[list(picks)])),
        video.fps,
        video.num_frames,
        video.decoder,
    )


def stored_source(store: FrameStore, name: str) -> Source:
    """A video of a frame store: nothing is decoded or encoded. Raises StoreError where it is not there."""
    video = store.video(name)
    return Source(
        name,
        video.frame_idx,
        video.timestamps,
        video.duration,
        functools.cache(lambda: stored_candidates(store, name)),
        lambda picks: list(store.frames(name, picks)),
        video.fps,
        video.num_video_frames,
        video.decoder,
    )


def open_videos(video: str, store: str) -> tuple[list[str], Callable[[str, ClipEncoder | None], Source]]:
    """The names of the videos that --video and --store mean, and (name, CLIP) -> Source.

    Raises ValueError for flags, files and folders that no video can come from.
    """
    if store:
        in_store = FrameStore(store)
        if video and video not in in_store:
            raise ValueError(f"--video: {video} is not in {store}; its videos are named {in_store.names()[:3]} ..")
        names = [video] if video else in_store.names()
        return names, lambda name, clip: stored_source(FrameStore(store, clip and clip.identity), name)
    if not video:
        raise ValueError("--video is missing: a video file or a folder of videos (or --store)")
    if Path(video).is_dir():
        return find_videos(video), lambda name, clip: file_source(Path(video) / name, name, clip)
    Video(video)  # a wrong file is refused before anything is loaded
    return [Path(video).name], lambda name, clip: file_source(video, name, clip)


def each_readable(
    names: Sequence[str], open_video: Callable[[str, ClipEncoder | None], Source], clip: ClipEncoder | None
) -> Iterator[Source]:
    """The videos one after another, encoded where there is a CLIP; one that cannot be read is told on stderr and left
    out. Raises VideoError where it is the only one, ValueError where none could be read."""
    read = 0
    for name in names:
        try:
            source = open_video(name, clip)
            if clip:
                source.candidates()
        except VideoError as error:
            if len(names) == 1:
                raise
            _tell(f"left out: {error}")
            continue
        read += 1
        yield source
    if not read:
        raise ValueError(f"--video: none of the {len(names)} videos can be read")


def is_one(video: str, store: str) -> bool:
    """Whether --video and --store ask for one video rather than for all of a folder or store, however many it has."""
    return bool(video) and (bool(store) or not Path(video).is_dir())


def find_videos(folder: str | Path) -> list[str]:
    """Names of the video files in a folder and below, sorted; what is not taken is told on stderr. Raises ValueError
    where there is no video."""
    videos, others = videos_below(Path(folder))
    if not videos:
        raise ValueError(f"{folder} holds no video ({', '.join(VIDEO_SUFFIXES)})")
    if text := not_taken(Path(folder), others):
        _tell(text)
    return list(videos)


def _tell(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _progress_bar(frames: Iterable, total: int) -> Iterable:
    console = Console(stderr=True)
    return track(frames, "decoding and encoding", total, console=console, disable=not console.is_terminal)
