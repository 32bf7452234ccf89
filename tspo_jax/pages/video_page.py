"""A question about one's own video as one HTML page: scores over time, the frames of every method, the answer."""

import numpy as np

from tspo_jax.data.questions import split_options
from tspo_jax.pages import report_page
from tspo_jax.pages.report_page import Choice, Example
from tspo_jax.selection.scoring import AGENT_METHODS, Scorer, pick
from tspo_jax.selection.video_source import Source

METHODS = {
    "topk": ("agent, top-k", "trained"),
    "bin-max": ("agent, bin-max", "other"),
    "aks": ("agent, AKS", "other"),
    "clip-topk": ("CLIP top-k", "clip"),
    "uniform": ("uniform", "uniform"),
}  # method -> name for the reader, colour


def section(
    scorer: Scorer, source: Source, question: str, num_frames: int, answers: dict[str, str] | None = None
) -> str:
    """The question as an HTML element.

    Args:
      scorer: CLIP, and an agent whose methods are left out where there is none.
      source: the video.
      question: with its options, one a line, if it has any.
      num_frames: K.
      answers: method -> what was answered from its frames.
    """
    query, options = split_options(question)
    candidates = source.candidates()
    clip_scores, scores = scorer.ask(candidates.features, query or question)
    methods = [method for method in METHODS if scores is not None or method not in AGENT_METHODS]
    picks = {method: pick(method, clip_scores, scores, num_frames) for method in methods}
    shown = np.unique(np.concatenate(list(picks.values())))
    frames = dict(zip(shown.tolist(), source.pictures(shown), strict=True))  # each is decoded once
    choices = [
        Choice(
            *METHODS[method],
            candidates.timestamps[picks[method]].tolist(),
            [frames[i] for i in picks[method].tolist()],
            (answers or {}).get(method),
            None,
        )
        for method in methods
    ]
    curves = [None if scores is None else standardised(clip_scores)]
    curves.append(standardised(clip_scores if scores is None else scores))
    return report_page.example_section(
        Example(
            "",
            query or question,
            options,
            "",
            source.name,
            candidates.num_video_frames / candidates.fps,
            (),
            candidates.timestamps,
            *curves,
            choices,
            ("CLIP similarity", "CLIP similarity" if scores is None else "agent"),
        )
    )


def page(*args, **kwargs) -> str:
    """`section` as a page of its own."""
    return report_page.document("Chosen frames", ["<h1>Chosen frames</h1>", section(*args, **kwargs)])


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores [T] with mean 0 and deviation 1, so that curves of different scales can be compared by their shape."""
    return (scores - scores.mean()) / max(float(scores.std()), 1e-12)
