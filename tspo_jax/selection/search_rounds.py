"""What a temporal search (T*, arXiv 2504.02259) has in common whatever its schedule: its record, weights and spreading.

The N candidates of a video stand one second apart; a `second` here is the index of one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tspo_jax.models.owlvit import Detections

BLANK = " "  # searched beside the objects: it takes up what is background
TARGET_WEIGHT, CUE_WEIGHT = 1.0, 0.5
UNSEEN_SCORE = 1e-6
SPREAD_REACH = 5  # seconds on either side of a good frame that are raised with it
MAX_FRAMES = 1000  # however long the video is

Look = Callable[[Sequence[int]], Sequence[np.ndarray]]  # seconds -> frames uint8 [H, W, 3]
Detect = Callable[[Sequence[np.ndarray]], Sequence[Detections]]  # of the objects, see `texts_of`


@dataclasses.dataclass(frozen=True)
class Verified:
    """A frame that was looked at alone.

    Attributes:
      second: which.
      calls: detector calls that it would have cost one after another.
      score: its new score.
      removed: index of the (first) target that was found in it, -1 for none.
    """

    second: int
    calls: int
    score: float
    removed: int


@dataclasses.dataclass(frozen=True)
class Round:
    """One grid.

    Attributes:
      sampled: int [m], the second of each cell.
      fallback: whether visited frames could be drawn again, too few others being good enough (schedule released).
      confidence: float [m], credited to each cell.
      score, score_after: float [N] after spreading, and after verification; `mix` and `random` verify first.
      probability: float [N], P of the schedule released; None in the others.
      unvisited: bool [N]; budget_left: frames. Both after the round.
      remaining: indices of the targets that are still searched.
      verified: in the order in which they were looked at.
    """

    sampled: np.ndarray
    fallback: bool
    confidence: np.ndarray
    score: np.ndarray
    score_after: np.ndarray
    probability: np.ndarray | None
    unvisited: np.ndarray
    budget_left: float
    remaining: tuple[int, ...]
    verified: tuple[Verified, ...]


@dataclasses.dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
      picks: int [K], the seconds that are returned, ascending.
      score: float [N], the last one.
      rounds: in their order.
      num_frames: different frames that were looked at.
      num_detections: pictures (grids and single frames) that went through the detector.
      fallback: why the picks are evenly spaced; "" where they are what the search found.
      notes: what a user should know.
    """

    picks: np.ndarray
    score: np.ndarray
    rounds: tuple[Round, ...]
    num_frames: int
    num_detections: int
    fallback: str = ""
    notes: tuple[str, ...] = ()


def texts_of(targets: Sequence[str], cues: Sequence[str]) -> tuple[str, ...]:
    """What the detector is asked for, in the order of its scores."""
    return (*targets, *cues, BLANK)


def spread(score: np.ndarray, seconds: np.ndarray, confidence: np.ndarray) -> None:
    """Raises, in place, the neighbours of the best quarter of a round's frames, by 1 / (distance + 1) of their score.

    In the order of `seconds` [m], so a frame that an earlier one raised spreads what it has then.
    """
    threshold = np.percentile(confidence, 75)
    for second, found in zip(seconds, confidence, strict=True):
        if found >= threshold:
            near = np.arange(max(0, second - SPREAD_REACH), min(len(score), second + SPREAD_REACH + 1))
            score[near] = np.maximum(score[near], score[second] / (np.abs(near - second) + 1))
