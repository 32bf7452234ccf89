"""What is said of stretches of stored videos, a jsonl file: what captioners and retrievers learn from."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import QuestionError, json_rows


@dataclasses.dataclass(frozen=True)
class Example:
    """A caption of a video from `start` to `end`, in seconds."""

    video: str
    start: float
    end: float
    caption: str


def read_examples(path: str | Path) -> list[Example]:
    """The rows {"video", "start", "end", "caption"} of a jsonl file or JSON list, times in seconds.

    Raises ValueError naming the line of a row that is no caption, and for a file without any."""
    examples = []
    path = Path(path)
    for number, row in json_rows(path, path.read_bytes()):
        try:
            if isinstance(row, QuestionError):
                raise row
            example = Example(str(row["video"]), float(row["start"]), float(row["end"]), row["caption"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no caption with video, start and end ({error!r})") from error
        if not isinstance(example.caption, str) or not example.caption.strip() or not example.start <= example.end:
            raise ValueError(f"{path}: line {number}: an empty caption, or one that ends before it starts")
        examples.append(example)
    if not examples:
        raise ValueError(f"{path}: holds no caption")
    return examples


def examples_sha256(examples: list[Example]) -> str:
    """Tells lists of captions apart, in whatever form and place they are written."""
    return hashlib.sha256(repr([dataclasses.astuple(example) for example in examples]).encode()).hexdigest()[:16]


def frames_of(example: Example, store: FrameStore) -> np.ndarray:
    """The stored frames within a caption's stretch, ascending. Raises ValueError where there is none."""
    if example.video not in store:
        raise ValueError(f"{example.video}, of which there is a caption, is not in {store.folder}")
    times = store.video(example.video).timestamps
    found = np.flatnonzero((times >= example.start - 1e-6) & (times <= example.end + 1e-6))
    if not len(found):
        raise ValueError(f"{example.video} has no stored frame from {example.start:g} to {example.end:g} s: a caption")
    return found


def drawn(seed: int, place: int, count: int) -> int:
    """Which of `count` examples stands at `place` of an endless order: all once, then all again in another order."""
    epoch, place = divmod(place, count)
    return int(np.random.default_rng((seed, epoch)).permutation(count)[place])
