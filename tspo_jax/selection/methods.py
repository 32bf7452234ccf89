"""The frames to keep at inference: scores of T candidates -> K ascending indices, all T where T < K.

Of equal scores the first one counts.
"""

import numpy as np


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """The k largest scores: [T] -> int [K]."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def bin_max(scores: np.ndarray, k: int) -> np.ndarray:
    """The best frame of each of k bins: [T] -> int [K].

    A bin holds the frames that are nearest to one of k evenly spaced frames (rounded half to even), the
    earlier one where the distance is equal; so the gap between picks is bounded.
    """
    num_frames = len(scores)
    k = min(k, num_frames)
    centres = np.rint(np.arange(k) * ((num_frames - 1) / max(k - 1, 1)))  # the step is rounded first, as originally
    bins = np.searchsorted((centres[:-1] + centres[1:]) / 2, np.arange(num_frames), side="left")
    starts = np.searchsorted(bins, np.arange(k))
    return starts + [np.argmax(part) for part in np.split(scores, starts[1:])]


def aks(scores: np.ndarray, k: int, threshold: float = 0.2, max_depth: int = 3) -> np.ndarray:
    """Adaptive keyframe sampling (arXiv 2502.21271): [T] -> int, at most K.

    Scores are scaled to [0, 1]. A segment is halved, at most `max_depth` times, until the mean of its k best
    scores is more than `threshold` above its mean; a segment of depth d gives its int(k / 2^d) best frames.
    Where 2^d does not divide k, fewer than k frames come out, as in the original. For k below 2^max_depth the
    depth is limited so that each segment gives a frame (the original may return none).
    """
    if len(scores) < k:
        return np.arange(len(scores))
    spread = np.ptp(scores)
    scaled = (scores - scores.min()) / (spread if spread > 0 else 1)
    max_depth = min(max_depth, k.bit_length() - 1)

    def pick(start: int, stop: int, depth: int) -> list[int]:
        segment = scaled[start:stop]
        peak = np.mean(segment[topk(segment, k)]) - np.mean(segment)
        if peak > threshold or depth == max_depth:
            return [*(start + topk(segment, k >> depth))]
        middle = start + (stop - start) // 2
        return pick(start, middle, depth + 1) + pick(middle, stop, depth + 1)

    return np.array(pick(0, len(scores), 0))


def uniform(scores: np.ndarray, k: int) -> np.ndarray:
    """k evenly spaced frames, the first and the last among them, whatever the scores: [T] -> int [K]."""
    return np.linspace(0, len(scores) - 1, min(k, len(scores)), dtype=int)


def fill_evenly(picks: np.ndarray, num_frames: int, k: int) -> np.ndarray:
    """`picks` (at most k of `num_frames`) and so many evenly spaced others that there are k, or all: ascending int."""
    others = np.setdiff1d(uniform(np.zeros(num_frames), k), picks)
    missing = min(k, num_frames) - len(picks)
    return np.sort([*picks, *others[uniform(others, missing)]]).astype(int) if missing else np.sort(picks)


METHODS = {"topk": topk, "bin-max": bin_max, "aks": aks, "uniform": uniform, "clip-topk": topk}
SPAN = "span"  # frames of the span that an agent of kind span predicts: scoring.py
SEARCH = "tstar"  # looks for named objects instead of scoring candidates: searching.py
NAMES = (*METHODS, SPAN, SEARCH)


def select(method: str, scores: np.ndarray, clip_scores: np.ndarray, k: int) -> np.ndarray:
    """Candidates that a method keeps: ascending int indices.

    Args:
      method: a name of METHODS; `clip-topk` looks at clip_scores, the others at scores.
      scores: [T], of the agent.
      clip_scores: [T], cosine of frame and question.
      k: how many frames.

    Raises: ValueError for an unknown method, k < 1, no candidate frame, or scores that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, not one of {', '.join(METHODS)}")
    if k < 1:
        raise ValueError(f"num_frames is {k}: at least one frame has to be picked")
    used = np.asarray(clip_scores if method == "clip-topk" else scores, np.float32)
    if not used.size:
        raise ValueError("the video has no candidate frame to select from")
    if not np.isfinite(used).all():
        raise ValueError(f"the scores of {np.count_nonzero(~np.isfinite(used))} candidate frames are not finite")
    return METHODS[method](used, k)
