"""A question about one's own video as one HTML page: scores over time, the frames of every method, the answer."""

from collections.abc import Sequence

import numpy as np

from tspo_jax.data.questions import split_options
from tspo_jax.pages import templates
from tspo_jax.pages.report_page import Choice, Example
from tspo_jax.selection.methods import SEARCH, SPAN
from tspo_jax.selection.scoring import Scorer, fits, pick_by
from tspo_jax.selection.searching import Found
from tspo_jax.selection.video_source import Source

METHODS = {
    "topk": "agent, top-k",
    "bin-max": "agent, bin-max",
    "aks": "agent, AKS",
    SPAN: "agent, its span",
    "clip-topk": "CLIP top-k",
    "uniform": "uniform",
}  # method -> name for the reader
SEARCH_NAME = "T*, search by a detector"
NAMES = METHODS | {SEARCH: SEARCH_NAME, "flat": "captions, one answer", "backtrack": "captions, closer looks"}


def methods_of(scorer: Scorer) -> list[str]:
    """Those of METHODS that the scorer's agent, or none, can choose by."""
    return [method for method in METHODS if fits(scorer, method)]


def example(
    scorer: Scorer,
    source: Source,
    question: str,
    num_frames: int,
    answers: dict[str, str] | None = None,
    found: Found | None = None,
) -> Example:
    """What question.html shows of a question.

    Args:
      scorer: CLIP, and an agent whose methods are left out where there is none.
      source: the video.
      question: with its options, one a line, if it has any.
      num_frames: K.
      answers: method -> what was answered from its frames.
      found: what a search found, which is shown as one more method.
    """
    query, options = split_options(question)
    candidates = source.candidates()
    features, text = candidates.features, scorer.clip.text_features([query or question], batch_size=1)[0]
    clip_scores, scores = scorer(features, text)
    picks = {
        method: pick_by(scorer, method, features, text, (clip_scores, scores), num_frames)
        for method in methods_of(scorer)
    }
    names = METHODS
    if found:
        picks[SEARCH], fallback = found.picks, found.searched["fallback"]
        names = METHODS | {SEARCH: f"{SEARCH_NAME}: evenly spaced, {fallback}" if fallback else SEARCH_NAME}
    shown = np.unique(np.concatenate(list(picks.values())))
    frames = dict(zip(shown.tolist(), source.pictures(shown), strict=True))  # each is decoded once
    choices = [
        Choice(
            names[method],
            method,
            candidates.timestamps[picks[method]].tolist(),
            [frames[i] for i in picks[method].tolist()],
            (answers or {}).get(method),
            None,
        )
        for method in picks
    ]
    return Example(
        family="",
        query=query or question,
        options=options,
        answer="",
        video=source.name,
        duration=candidates.num_video_frames / candidates.fps,
        evidence=(),
        times=candidates.timestamps,
        before=standardised(clip_scores),
        after=None if scores is None else standardised(scores),
        choices=choices,
        curves=(("CLIP similarity", "clip-topk"), ("agent", "topk")),
    )


def page(title: str, examples: Sequence[Example]) -> str:
    """Questions as a page of their own."""
    return templates.render("questions.html", title=title, examples=examples)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores [T] with mean 0 and deviation 1, so that curves of different scales can be compared by their shape."""
    return (scores - scores.mean()) / max(float(scores.std()), 1e-12)
