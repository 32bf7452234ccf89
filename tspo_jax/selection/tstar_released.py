"""T*'s search as released (github.com/mll-lab-nu/TStar, 2025-09), for comparison with what was published.

Draw for draw the original's under the same random state. Its rules have weak places, which `tstar.py` does not share:
with a noisy detector and no cue it finds less than frames taken at random. What makes the original fail is done the
nearest way that works: videos shorter than the grid leave cells black, few points are fitted by a lower degree, and
frames are drawn evenly where no score is left to draw by.
"""

from collections.abc import Sequence

import numpy as np

from tspo_jax.models.owlvit import Detections
from tspo_jax.selection import frame_grid
from tspo_jax.selection.search_rounds import (
    CUE_WEIGHT,
    MAX_FRAMES,
    TARGET_WEIGHT,
    UNSEEN_SCORE,
    Detect,
    Look,
    Round,
    Search,
    Verified,
    spread,
    texts_of,
)

BOX_THRESHOLD = 0.005  # boxes below it are not looked at
SMOOTHING = 0.5  # bound of the spline's summed squared residuals
FRAME_SIZE, CELL_SIZE, ALONE_SIZE = (380, 800), (95, 200), (285, 600)  # height, width

Generator = np.random.RandomState | np.random.Generator


def search(
    num_seconds: int,
    look: Look,
    detect: Detect,
    targets: Sequence[str],
    cues: Sequence[str],
    *,
    k: int,
    grid: tuple[int, int],
    share: float,
    threshold: float,
    rng: Generator,
) -> Search:
    """Searches until every target was found in a frame alone, or the budget is spent.

    Args:
      num_seconds: N, candidates of the video.
      look, detect: see search_rounds; `detect` is asked for `texts_of(targets, cues)`.
      targets, cues: names; one given twice has to be found twice.
      k: frames to return.
      grid: rows and columns.
      share: of the N seconds that may be sampled (the last round may go over it), at most 1000 frames; looking at
        single frames is free.
      threshold: confidence above which a frame alone confirms a target.
      rng: `np.random.RandomState(seed)`, or a Generator around its bit generator, which draws the same.
    """
    texts, (rows, columns) = texts_of(targets, cues), grid
    weights = {text: CUE_WEIGHT for text in texts} | dict.fromkeys(targets, TARGET_WEIGHT)
    weights |= dict.fromkeys(cues, CUE_WEIGHT)  # a name in both lists ends as a cue
    weights = np.array([weights[text] for text in texts])
    N, m = num_seconds, min(rows * columns, num_seconds)
    budget = min(MAX_FRAMES, N * share)
    score, unvisited, probability = np.full(N, UNSEEN_SCORE), np.ones(N, bool), np.full(N, 1 / N)
    left, rounds, num_detections = list(range(len(targets))), [], 0

    while left and budget > 0:
        sampled, fallback = _sample(rng, probability, unvisited, m) if rounds else (_first(N, m), False)
        budget -= m
        frames = [_bilinear(frame, FRAME_SIZE) for frame in look(sampled)]
        picture = frame_grid.tile(frames, rows, columns, lambda frame: _bilinear(frame, CELL_SIZE))
        found = detect([picture])[0].above(BOX_THRESHOLD)
        cells = frame_grid.cells_of(found.boxes, *picture.shape[:2], rows, columns)
        confidence, named = np.zeros(m), [set() for _ in sampled]
        for cell, label, value in zip(cells, found.labels, _weighted(found, weights), strict=True):
            if cell < m:  # of a video shorter than the grid, the last cells show no frame
                confidence[cell] = max(confidence[cell], value)
                named[cell].add(texts[label])

        unvisited[sampled], score[sampled] = False, confidence
        spread(score, sampled, confidence)
        probability = _probability(score, unvisited)
        score_before = score.copy()
        searched = {targets[i] for i in left}
        candidates = [j for j in range(m) if named[j] & searched]
        alone = [_bilinear(frames[j], ALONE_SIZE) for j in candidates]
        looks = dict(zip(candidates, detect(alone) if alone else (), strict=True))
        num_detections += 1 + len(alone)
        verified = []
        for j in candidates:
            if not named[j].isdisjoint(targets[i] for i in left):
                verified.append(_verify(looks[j], int(sampled[j]), named[j], targets, texts, weights, left, threshold))
                score[sampled[j]] = verified[-1].score
        rounds.append(
            Round(
                sampled, fallback, confidence, score_before, score.copy(), probability, unvisited.copy(), budget,
                tuple(left), tuple(verified),
            )
        )  # fmt: skip

    picks = np.sort(_draw(rng, score, min(k, N)))
    return Search(picks, score, tuple(rounds), int(N - unvisited.sum()), num_detections)


def _first(num_seconds: int, m: int) -> np.ndarray:
    """m frames from the start of the video on: with N slightly below 2 m, the first half of it."""
    return np.arange(0, num_seconds, num_seconds // m)[:m]


def _sample(rng: Generator, probability: np.ndarray, unvisited: np.ndarray, m: int) -> tuple[np.ndarray, bool]:
    """m seconds in the order of drawing, and whether visited ones could be among them.

    Nearly uniform among the unvisited frames in the best quarter of P: m / N is much more than P differs by.
    """
    everywhere = probability + m / len(probability)
    weights = everywhere * unvisited
    weights = np.where(weights >= np.percentile(weights, 75), weights, 0)
    fallback = np.count_nonzero(weights) < m or weights.sum() == 0
    return _draw(rng, everywhere if fallback else weights, m), fallback


def _draw(rng: Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """`count` different indices with these weights; evenly where too few have any (the original fails there)."""
    if np.count_nonzero(weights) < count:
        weights = np.ones(len(weights))
    return rng.choice(len(weights), size=count, replace=False, p=weights / weights.sum())


def _weighted(found: Detections, weights: np.ndarray) -> np.ndarray:
    """The confidence of each box times the weight of its name."""
    return found.confidence * weights[found.labels]


def _probability(score: np.ndarray, unvisited: np.ndarray) -> np.ndarray:
    """P: a smoothing spline through the scores of the visited frames, continued over the video. float [N], sum 1."""
    N, visited = len(score), np.flatnonzero(~unvisited)
    degree = min(3, len(visited) - 1)
    fitted = np.full(N, score[visited[0]])
    if degree:
        from scipy.interpolate import UnivariateSpline  # here: whoever asks for --help need not wait for it

        fitted = UnivariateSpline(visited, score[visited], k=degree, s=SMOOTHING)(np.arange(N))
    probability = 1 / (1 + np.exp(-np.maximum(1 / N, fitted)))
    return probability / probability.sum()


def _verify(
    alone: Detections,
    second: int,
    named: set[str],
    targets: Sequence[str],
    texts: Sequence[str],
    weights: np.ndarray,
    left: list[int],
    threshold: float,
) -> Verified:
    """Looks at a frame alone and removes at most one target from `left`, in place.

    The confidence that confirms may be another object's, as in the original.
    """
    alone = alone.above(BOX_THRESHOLD)
    there = {texts[label] for label in alone.labels}
    best = float(_weighted(alone, weights).max(initial=0.0))
    calls = 0
    for target in [targets[i] for i in left]:
        if target in named:
            calls += 1
            if target in there and best > threshold:
                removed = next(i for i in left if targets[i] == target)
                left.remove(removed)
                return Verified(second, calls, best, targets.index(target))
    return Verified(second, calls, best, -1)


def _bilinear(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3] between pixel centres, without smoothing: how the original shrinks frames.

    Pillow's resize would smooth.
    """
    for axis, wanted in enumerate(size):
        length = frame.shape[axis]
        place = np.clip((np.arange(wanted, dtype=np.float32) + 0.5) * (length / wanted) - 0.5, 0, length - 1)
        before = place.astype(int)
        after = np.minimum(before + 1, length - 1)
        share = (place - before).astype(np.float32).reshape(-1, *[1] * (2 - axis))
        one = frame.take(before, axis).astype(np.float32)
        frame = one + (frame.take(after, axis) - one) * share
    return np.rint(frame).astype(np.uint8)
