"""Prompts that are longer than what an answerer was made for."""

from collections.abc import Iterable

import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.models.video_prompt import VIDEO_TOKEN, FrameTimes


def check(answerer: Answerer, ids: np.ndarray, lengths: np.ndarray, frames: tuple[int, int, int], new: int) -> None:
    """Raises ValueError for prompts (prompts.Prompts) that with `frames` (number, height, width as they are shown) and
    up to `new` tokens of an answer have more tokens than the model has positions."""
    limit = answerer.config.language.max_position_embeddings
    text = (lengths - (ids == VIDEO_TOKEN).sum(axis=-1)).max()
    tokens = int(text) + answerer.config.num_visual_tokens(*frames)
    if limit and tokens + new > limit:
        raise ValueError(
            f"a prompt with {frames[0]} frames takes {tokens} tokens and its answer up to {new}, more than the {limit} "
            "that the model can read (max_position_embeddings): show it fewer frames, or smaller ones"
        )


def beyond(
    answerer: Answerer, rendered: Iterable[tuple[str, str]], num_frames: int, height: int, width: int, new: int = 0
) -> list[str]:
    """One line, with all numbers, for each prompt (name, rendered text) that with so many frames, of that size as they
    are shown, and up to `new` tokens of an answer has more tokens than the model has positions; [] where the model does
    not tell."""
    limit = answerer.config.language.max_position_embeddings
    if limit is None:
        return []
    visual = answerer.config.num_visual_tokens(num_frames, height, width)
    times = FrameTimes(FrameTimes.unknown(num_frames).seconds, float(num_frames))  # what they are makes no difference
    lines = []
    for name, text in rendered:
        words = len(prompts.tokenize(answerer.config.write_times(text, times), answerer.tokenizer)) - 1
        if words + visual + new > limit:
            of = f"{words} tokens of text and {visual} of {num_frames} frames"
            of += f", and up to {new} of the answer," if new else ""
            total = words + visual + new
            lines.append(f"{name}: {of} are {total}, more than the {limit} that {answerer.folder} can read")
    return lines
