"""Spans of evidence: made from what single frames score, and turned into frames (after LSTP, arXiv 2402.16050).

LSTP lets the frozen answerer answer from every frame alone and takes the span over which the answers are best; a small
network learns to predict its first and last frame. A span here is (first, last), both inclusive indices of candidates.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import median_filter

from tspo_jax.selection.methods import fill_evenly

SMOOTHING = 3  # candidates of which the median score counts
VARIANTS = ("scaled_inclusive", "scaled_exclusive", "ratio_exclusive")


# ---- from scores of single frames to a span --------------------------------------------------------------


def largest_rectangle(heights: np.ndarray) -> tuple[int, int] | None:
    """The span (a, b) with the greatest (b - a + 1) * min(heights[a : b + 1]): float [n] -> span, None without any
    above 0.

    Of equal areas the one that ends first counts, of those the narrower one, as in LSTP's code.
    """
    best, span = 0.0, None
    starts: list[tuple[int, float]] = []  # where rectangles begin that are still open, and their heights, ascending
    for i, height in enumerate([*np.asarray(heights, np.float64).tolist(), -np.inf]):
        start = i
        while starts and starts[-1][1] >= height:
            start, reached = starts.pop()
            if (area := (i - start) * reached) > best:
                best, span = area, (start, i - 1)
        starts.append((start, height))
    return span


def released_span(scores: np.ndarray, subtract_minimum: bool = True) -> tuple[int, int]:
    """LSTP's pseudo-label of the scores float [n] of n frames; the whole video where no rectangle is above 0.

    Args:
      subtract_minimum: as its BLIP-2 module does; its Vicuna module takes the scores as they are.
    """
    heights = np.asarray(scores, np.float64)
    heights = heights - heights.min() if subtract_minimum else heights
    return largest_rectangle(heights) or (0, len(heights) - 1)


def evidence_span(scores: np.ndarray, smoothing: int = SMOOTHING) -> tuple[int, int] | None:
    """The span over which a question's scores [n] stand out: the largest rectangle above their mean, of the medians of
    `smoothing` neighbours, or, where those are all alike, of the scores. None where these are alike too: then the
    frames do not tell.

    Evidence is short, so the mean is what a frame without any scores; one frame with a score of 0 does not change it,
    as it does LSTP's minimum. A median, other than an average, keeps the ends of the span where they are.
    """
    scores = np.asarray(scores, np.float64)
    for values in (median_filter(scores, smoothing, mode="nearest"), scores):
        above = values - values.mean()
        if span := largest_rectangle(np.where(above > 1e-9, above, 0)):
            return span
    return None


def unigram_recall(gold: str, answer: str) -> float:
    """Share of the words of `gold` that are in the answer, LSTP's score of open answers.

    Words end at white space; lone commas and full stops do not count, case and punctuation within words do. A word
    that stands twice in `gold` counts twice.
    """
    words, said = [word for word in gold.split() if word not in (",", ".")], set(answer.split())
    return sum(word in said for word in words) / len(words) if words else 0.0


def to_steps(span: tuple[int, int], num_frames: int, num_steps: int) -> tuple[int, int]:
    """A span of `num_frames` frames as one of `num_steps` flow steps, as LSTP's sampler counts."""
    if num_frames == 1:
        return 0, num_steps - 1
    first, last = (int(i / (num_frames - 1) * (num_steps - 1)) for i in span)
    return first, last


# ---- from a span to frames -------------------------------------------------------------------------------


def best_span(start: np.ndarray, end: np.ndarray) -> tuple[int, int]:
    """The span first <= last with the greatest sum of logits start[first] + end[last]: float [T], [T]."""
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    so_far = np.maximum.accumulate(start)
    last = int(np.argmax(so_far + end))
    return int(np.argmax(start[: last + 1])), last


def frames_of_span(span: tuple[int, int], num_frames: int, k: int) -> np.ndarray:
    """k frames of a video of `num_frames`, ascending: the middles of k equal parts of the span, or, where the span has
    fewer frames, all of it and others evenly spaced."""
    first, last = span
    length = last - first + 1
    if length <= k:
        return fill_evenly(np.arange(first, last + 1), num_frames, k)
    return first + middles(length, k)


def middles(count: int, k: int) -> np.ndarray:
    """The middle of each of k equal parts of range(count), for k <= count: int [k]."""
    cuts = np.linspace(0, count, k + 1).astype(int)
    return (cuts[:-1] + cuts[1:] - 1) // 2


def released_frames(
    draws: Sequence[tuple[int, int]], num_steps: int, num_frames: int, k: int, variant: str
) -> np.ndarray:
    """The k frames that LSTP's code takes for two draws of (first, last) flow step.

    Args:
      draws: steps; one that is no step, or (0, 0), means the whole video; a last before the first means nothing.
      num_steps: L, of the video.
      num_frames: n, candidate frames.
      variant: of VARIANTS, which parts of the released code differ in: steps scaled to frames with or without the last
        frame, or cut by the ratio of the step to L.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, not one of {', '.join(VARIANTS)}")
    chosen = np.zeros(num_frames, bool)
    for first, last in draws:
        if first >= num_steps or last >= num_steps or first == last == 0:
            first, last = 0, num_steps - 1
        if variant == "ratio_exclusive":
            begin, stop = (step * num_frames // num_steps for step in (first, last))
        else:
            begin, stop = (step * (num_frames - 1) // max(num_steps - 1, 1) for step in (first, last))
            stop += variant == "scaled_inclusive"
        chosen[begin:stop] = True
    frames = np.flatnonzero(chosen) if chosen.any() else np.arange(num_frames)
    while len(frames) < k:
        frames = np.repeat(frames, 2)
    return frames[middles(len(frames), k)] if len(frames) > k else frames
