"""SwinBERT as a captioner of stretches of videos: for the command caption, for data sets and for backtracking."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tspo_jax.answering.calls import CaptionCall, Reply
from tspo_jax.answering.frame_answers import Request
from tspo_jax.checkpoints.swinbert_folders import Captioner
from tspo_jax.data.frame_store import FrameStore, check_side


class ClipCaption(NamedTuple):
    """What a stretch of a video shows, from `start` to `end` in seconds; `confidence` as Captioner.caption's."""

    start: float
    end: float
    caption: str
    confidence: float


def cut(timestamps: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Frames of successive stretches of `seconds`; 0 = the whole video. Raises ValueError for a negative length."""
    if seconds < 0:
        raise ValueError(f"a stretch of {seconds} s; it must be positive, or 0 for the whole video")
    if not seconds:
        return [np.arange(len(timestamps))]
    number = ((timestamps - timestamps[0]) // seconds).astype(int)
    return [np.array(list(group)) for _, group in itertools.groupby(range(len(timestamps)), key=number.__getitem__)]


def caption_video(
    captioner: Captioner,
    timestamps: np.ndarray,
    pictures: Callable[[np.ndarray], Sequence[np.ndarray]],
    seconds: float = 0.0,
    beams: int = 1,
) -> list[ClipCaption]:
    """Captions of a video's stretches, in order.

    Args:
      timestamps: of its candidate frames, ascending seconds.
      pictures: candidate indices, ascending -> frames uint8 [H, W, 3].
      seconds: of a stretch; 0 = the whole video.
    """
    found = []
    for part in cut(np.asarray(timestamps), seconds):
        shown = part[captioner.frame_places(len(part))]
        distinct, place = np.unique(shown, return_inverse=True)
        frames = pictures(distinct)
        text, confidence = captioner.caption(np.stack([frames[i] for i in place]), beams)
        found.append(ClipCaption(float(timestamps[part[0]]), float(timestamps[part[-1]]), text, confidence))
    return found


class StoredClips:
    """Captions of stored videos on request: calls.Captioner, and answers for tspo.dataset.

    It follows no instruction: it says what a clip shows in a sentence, whatever it is asked. Raises StoreError for a
    store of smaller frames than the captioner sees.
    """

    def __init__(self, captioner: Captioner, store: FrameStore, beams: int = 1):
        check_side(store.folder, store.settings, captioner.config.image_size)
        self._captioner, self._store, self._beams = captioner, store, beams
        self.identity = f"{captioner.identity}-{beams}"

    def describe(self, calls: Sequence[CaptionCall]) -> list[Reply]:
        """The stored frames nearest to the times of each call."""
        return [Reply(self._caption(call.video, self._nearest(call.video, call.times))) for call in calls]

    def answers(self, requests: Iterable[Request], max_new_tokens: int) -> Iterator[list[tuple[Request, list[str]]]]:
        """A caption of each frame set of a request. `max_new_tokens` is the model's own."""
        for request in requests:
            yield [(request, [self._caption(request.video, picks) for picks in request.picks])]

    def _nearest(self, video: str, times: Sequence[float]) -> np.ndarray:
        stored = self._store.video(video).timestamps
        return np.abs(stored[None] - np.asarray(times)[:, None]).argmin(1)

    def _caption(self, video: str, picks: np.ndarray) -> str:
        shown = np.asarray(picks)[self._captioner.frame_places(len(picks))]
        distinct, place = np.unique(shown, return_inverse=True)
        frames = self._store.frames(video, distinct)
        return self._captioner.caption(frames[place], self._beams)[0]


def is_captioner(folder: str | Path) -> bool:
    """Whether a folder is SwinBERT's: its settings lie in log/args.json."""
    return (Path(folder) / "log" / "args.json").is_file()
