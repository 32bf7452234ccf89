"""Needle samples: groups of frames of the target video, shuffled among groups of other videos (TSPO, section on
dual-style data; numbers of the released code).

A sample is composed by reference: it names (video, frame) pairs whose features and pictures are in the frame store, so
it costs the same whatever number and length of videos it is spliced from.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """Sizes of a needle sample. The defaults are the released code's: 650-800 frames.

    The paper's 10-60 minutes at 1 fps are distractor_groups=11, max_distractor_groups=68.

    Attributes:
      group_frames: frames of every group.
      min_true_groups, max_true_groups: groups of the target video, drawn evenly.
      distractor_groups: groups of other videos; with max_distractor_groups, drawn evenly from here to there.
    """

    group_frames: int = 50
    min_true_groups: int = 1
    max_true_groups: int = 4
    distractor_groups: int = 12
    max_distractor_groups: int | None = None

    def __post_init__(self):
        most = self.most_distractors
        if not (0 < self.min_true_groups <= self.max_true_groups and 0 <= self.distractor_groups <= most):
            raise ValueError(
                f"a needle sample needs 1 <= min <= max true groups and 0 <= min <= max distractors: {self}"
            )
        if self.group_frames < 1:
            raise ValueError(f"group_frames is {self.group_frames}, must be at least 1")

    @property
    def most_distractors(self) -> int:
        return self.distractor_groups if self.max_distractor_groups is None else self.max_distractor_groups

    @property
    def max_frames(self) -> int:
        return self.group_frames * (self.max_true_groups + self.most_distractors)


@dataclasses.dataclass(frozen=True)
class Composition:
    """The T frames of a needle sample: video number int32 [T], stored frame int32 [T], whether it is the target's."""

    video: np.ndarray
    frame: np.ndarray
    mask: np.ndarray


def compose(
    seed: int, index: int, target: int, target_frames: np.ndarray, lengths: np.ndarray, config: NeedleConfig
) -> Composition:
    """A needle sample, a function of (seed, index) and the videos.

    Every true group is an independent draw of group_frames candidates of the target without replacement, in time
    order; a target with fewer candidates gives group_frames evenly spaced ones, some twice. Every distractor group is
    group_frames evenly spaced frames of a video drawn from all but the target, with replacement. The groups are put
    into random order.

    Args:
      target: number of the target video.
      target_frames: its candidates, numbers of stored frames, ascending [T_target].
      lengths: stored frames of all videos that distractors may come from, by video number.

    Raises ValueError where there is no video but the target.
    """
    rng = np.random.default_rng((seed, index))
    num_true = rng.integers(config.min_true_groups, config.max_true_groups, endpoint=True)
    num_distractors = rng.integers(config.distractor_groups, config.most_distractors, endpoint=True)
    if num_distractors and len(lengths) < 2:
        raise ValueError("a needle sample needs at least one video besides the target for its distractors")
    size = config.group_frames
    is_true = rng.permutation(np.repeat([True, False], [num_true, num_distractors]))
    videos, frames = [], []
    for true in is_true:
        if true and len(target_frames) > size:
            frames.append(np.sort(rng.choice(target_frames, size, replace=False)))
        elif true:
            frames.append(target_frames[_evenly(len(target_frames), size)])
        else:
            other = rng.integers(len(lengths) - 1)
            other += other >= target
            frames.append(_evenly(lengths[other], size))
        videos.append(target if true else other)
    return Composition(
        np.repeat(np.array(videos, np.int32), size), np.concatenate(frames).astype(np.int32), np.repeat(is_true, size)
    )


def _evenly(length: int, size: int) -> np.ndarray:
    return np.linspace(0, length - 1, size, dtype=np.int64)
