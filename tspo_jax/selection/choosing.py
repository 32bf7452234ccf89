"""The frames of a video that a question needs, as the entry points report them."""

import numpy as np

from tspo_jax.data.questions import split_options
from tspo_jax.selection import methods
from tspo_jax.selection.scoring import Candidates, Scorer, check_method, pick_by
from tspo_jax.selection.video_source import Source


def select_frames(scorer: Scorer, candidates: Candidates, question: str, num_frames: int, method: str) -> dict:
    """The frames for `question`, as entry points report them (`scores` is None without an agent)."""
    check_method(scorer, method)
    if not question.strip():
        raise ValueError("the question is empty")
    text = scorer.clip.text_features([query(question)], batch_size=1)[0]
    clip_scores, scores = scorer(candidates.features, text)
    picks = pick_by(scorer, method, candidates.features, text, (clip_scores, scores), num_frames)
    return {
        "frame_idx": candidates.frame_idx[picks].tolist(),
        "timestamps": candidates.timestamps[picks].tolist(),
        "candidate_idx": candidates.frame_idx.tolist(),
        "clip_scores": clip_scores.tolist(),
        "scores": None if scores is None else scores.tolist(),
        "fps": candidates.fps,
        "num_video_frames": candidates.num_video_frames,
        "method": method,
        "decoder": candidates.decoder,
    }


def picks_of(result: dict, source: Source) -> list[int]:
    """The candidate indices of the frames that `select_frames` chose."""
    return np.searchsorted(source.frame_idx, result["frame_idx"]).tolist()


def query(question: str) -> str:
    """What the agent reads: the question without its options."""
    return split_options(question)[0] or question


def choose(source: Source, scorer: Scorer | None, question: str, num_frames: int, method: str) -> list[int]:
    """Candidate indices: by the agent, or evenly spaced where there is none."""
    if scorer is None:
        return methods.uniform(source.frame_idx, num_frames).tolist()
    return picks_of(select_frames(scorer, source.candidates(), question, num_frames, method), source)
