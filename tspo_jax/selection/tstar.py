"""T*: looks for named objects in a video with a detector, a grid of frames at a time, instead of scoring every frame.

After "Re-thinking Temporal Search" (arXiv 2504.02259). A round shows the detector a grid of frames, credits every frame
with what is found in its cell, and looks at the most promising ones alone; where a target is seen there, it is found.
Where the next frames come from is the schedule:

  mix       half of them from the best quarter of the frames not yet seen, by linear interpolation between the scores of
            those seen, the other half at random where little was seen: never much worse than random
  random    all at random among the frames not yet seen: what any claim for a search has to beat
  released  the published code's rules and random numbers, for comparison (tstar_released.py)

`search` needs no model of its own: frames and detections come from two functions.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tspo_jax.models.owlvit import Detections
from tspo_jax.models.preprocessing import resize
from tspo_jax.selection import frame_grid, tstar_released
from tspo_jax.selection.methods import fill_evenly, topk, uniform
from tspo_jax.selection.search_options import SearchOptions, objects
from tspo_jax.selection.search_rounds import (
    CUE_WEIGHT,
    MAX_FRAMES,
    SPREAD_REACH,
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

BEST_SHARE = 0.25  # of the unseen frames, from which half of a round of `mix` comes
GATE = 0.5  # of the threshold: a cell with less of a target is not looked at alone
ALONE_PER_ROUND = 4  # frames that are looked at alone, at most
EVIDENCE = 0.1  # of the threshold: frames with a lower score are returned only to fill up


def search(
    num_seconds: int,
    look: Look,
    detect: Detect,
    targets: Sequence[str],
    cues: Sequence[str],
    k: int,
    options: SearchOptions,
    rng: tstar_released.Generator | None = None,
) -> Search:
    """The k candidates of a video in which the targets are most surely seen.

    With the schedules of our own: the k best of the final score, filled up with evenly spaced frames where fewer have
    any evidence; evenly spaced ones, and why, where nothing was found.

    Args:
      num_seconds: N, candidates of the video, one second apart.
      look: seconds -> frames; called for those that are looked at only.
      detect: pictures -> Detections with scores of `texts_of(targets, cues)`.
      targets, cues: names of what the question is about, and of what may be near it.
      k: frames to return, all where there are fewer.
      rng: random numbers; by default those of options.seed.
    Raises: ValueError for a video without candidates, k < 1, and targets or cues that `objects` would change (schedule
      released takes any).
    """
    if num_seconds < 1:
        raise ValueError("the video has no candidate frame to search")
    if k < 1:
        raise ValueError(f"num_frames is {k}: at least one frame has to be picked")
    if options.schedule == "released":
        return tstar_released.search(
            num_seconds, look, detect, targets, cues, k=k, grid=options.grid, share=options.share,
            threshold=options.threshold, rng=rng or np.random.RandomState(options.seed),
        )  # fmt: skip
    if (tuple(targets), tuple(cues)) != objects(targets, cues):
        raise ValueError(f"targets {list(targets)} and cues {list(cues)} hold empty or repeated names")
    if not targets:
        return not_searched(num_seconds, k, "the question names no object to search for")
    return _Searcher(num_seconds, look, detect, targets, cues, options, rng or np.random.default_rng(options.seed)).run(
        k
    )


def not_searched(num_seconds: int, k: int, reason: str, notes: Sequence[str] = ()) -> Search:
    """Evenly spaced frames, for want of anything to search for."""
    picks = uniform(np.zeros(num_seconds), k)
    return Search(picks, np.full(num_seconds, UNSEEN_SCORE), (), 0, 0, reason, tuple(notes))


class _Searcher:
    """A search with the schedules mix and random."""

    def __init__(self, num_seconds, look, detect, targets, cues, options, rng):
        self._look, self._detect, self._options, self._rng = look, detect, options, rng
        self._targets, self._texts = targets, texts_of(targets, cues)
        self._weights = np.array([TARGET_WEIGHT] * len(targets) + [CUE_WEIGHT] * len(cues))
        self._N, self._cells = num_seconds, options.grid[0] * options.grid[1]
        self._score, self._unseen = np.full(num_seconds, UNSEEN_SCORE), np.ones(num_seconds, bool)
        self._left, self._rounds, self._num_detections = list(range(len(targets))), [], 0

    def run(self, k: int) -> Search:
        allowed = int(min(MAX_FRAMES, self._N * self._options.share))
        notes = ()
        if allowed < min(self._cells, self._N):
            notes = (f"the budget of {allowed} frames is less than one grid of {self._cells}; one was looked at",)
        budget = max(allowed, min(self._cells, self._N))
        while self._left and budget > 0 and self._unseen.any():
            sampled = self._sample(min(self._cells, budget, int(self._unseen.sum())))
            budget -= len(sampled)
            self._round(sampled, budget)
        return self._finish(k, notes)

    def _sample(self, count: int) -> np.ndarray:
        """`count` seconds that were not seen yet, ascending."""
        if not self._rounds:
            return ((np.arange(count) + 0.5) * self._N / count).astype(int)
        draw = mixed_draw if self._options.schedule == "mix" else random_draw
        return np.sort(draw(self._rng, self._score, self._unseen, count))

    def _round(self, sampled: np.ndarray, budget: int) -> None:
        frames = list(self._look(sampled))
        in_cells = self._look_at_grid(frames)
        confidence = (in_cells * self._weights).max(axis=1)
        # Before spreading, so that a frame which looked better than it is does not raise its neighbours.
        certain = confidence.copy()
        verified = self._look_alone(frames, sampled, in_cells, certain)
        self._unseen[sampled] = False
        self._score[sampled] = certain
        spread(self._score, sampled, certain)
        score, left = self._score.copy(), tuple(self._left)
        self._rounds.append(
            Round(sampled, False, confidence, score, score, None, self._unseen.copy(), budget, left, tuple(verified))
        )

    def _look_at_grid(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """How surely each object is in each of m frames: float [m, objects], the blank text left out."""
        (rows, columns), side = self._options.grid, self._options.picture_size
        # A cell is as large as the detector sees it, so that the picture is not resized a second time.
        picture = frame_grid.tile(
            frames, rows, columns, lambda frame: resize(frame, side // rows, side // columns, Image.Resampling.BILINEAR)
        )
        found = self._detect([picture])[0]
        self._num_detections += 1
        cells = frame_grid.cells_of(found.boxes, *picture.shape[:2], rows, columns)
        in_cells = np.zeros((rows * columns, len(self._weights)))
        np.maximum.at(in_cells, cells, self._of_objects(found))
        return in_cells[: len(frames)]

    def _of_objects(self, found: Detections) -> np.ndarray:
        """Scores [S, objects] of the boxes, the blank text left out."""
        return found.scores[:, : len(self._weights)]

    def _look_alone(
        self, frames: Sequence[np.ndarray], sampled: np.ndarray, in_cells: np.ndarray, confidence: np.ndarray
    ) -> list[Verified]:
        """The most promising frames one by one: `confidence` [m] is replaced, and targets seen in them are found."""
        promising = in_cells[:, self._left].max(axis=1)
        best = [j for j in np.argsort(-promising, kind="stable") if promising[j] >= GATE * self._options.threshold]
        best, verified = best[:ALONE_PER_ROUND], []
        for j, found in zip(best, self._detect([frames[j] for j in best]) if best else (), strict=True):
            in_frame = self._of_objects(found).max(axis=0, initial=0.0)
            there = [i for i in self._left if in_frame[i] > self._options.threshold]
            self._left = [i for i in self._left if i not in there]
            confidence[j] = (in_frame * self._weights).max()
            verified.append(Verified(int(sampled[j]), 1, float(confidence[j]), there[0] if there else -1))
        self._num_detections += len(best)
        return verified

    def _finish(self, k: int, notes: Sequence[str]) -> Search:
        with_evidence = np.flatnonzero(self._score >= EVIDENCE * self._options.threshold)
        num_frames, fallback = int(self._N - self._unseen.sum()), ""
        if len(with_evidence):
            picks = with_evidence[topk(self._score[with_evidence], k)]
        else:
            picks = with_evidence
            names = ", ".join(self._targets)
            fallback = f"nothing like {names} was detected in the {num_frames} frames that were looked at"
        picks = fill_evenly(picks, self._N, k)
        return Search(picks, self._score, tuple(self._rounds), num_frames, self._num_detections, fallback, tuple(notes))


def random_draw(rng: np.random.Generator, score: np.ndarray, unseen: np.ndarray, count: int) -> np.ndarray:
    """`count` of the frames that were not seen (bool [N]), whatever the scores: int [count]."""
    return rng.choice(np.flatnonzero(unseen), count, replace=False)


def mixed_draw(rng: np.random.Generator, score: np.ndarray, unseen: np.ndarray, count: int) -> np.ndarray:
    """`count` frames that were not seen: int [count], half of them where it looks good, half where little was seen.

    The first half comes from the best quarter by linear interpolation between the scores of the seen frames, the more
    likely the more a frame stands out from that quarter, less so the neighbours of seen frames, which would show the
    same. The other half is uniform among the unseen frames that are farther from any seen one than the median.

    Args:
      score: float [N].
      unseen: bool [N], False for at least one frame, True for at least `count`.
    """
    seen, candidates = np.flatnonzero(~unseen), rng.permutation(np.flatnonzero(unseen))  # of equal ones, any is first
    after = np.searchsorted(seen, candidates)
    neighbours = np.stack([seen[np.maximum(after - 1, 0)], seen[np.minimum(after, len(seen) - 1)]])
    distance = np.abs(neighbours - candidates).min(axis=0)

    expected = np.interp(candidates, seen, score[seen])
    best = np.argsort(-expected, kind="stable")[: max(count, int(BEST_SHARE * len(candidates)))]
    stands_out = (expected[best] - expected[best[-1]] + UNSEEN_SCORE) * np.minimum(distance[best], 2 * SPREAD_REACH)
    promising = rng.choice(best, -(-count // 2), replace=False, p=stands_out / stands_out.sum())

    others = np.setdiff1d(np.arange(len(candidates)), promising)
    remote = others[np.argsort(-distance[others], kind="stable")[: max(count // 2, len(others) // 2)]]
    return candidates[np.concatenate([promising, rng.choice(remote, count // 2, replace=False)])]
