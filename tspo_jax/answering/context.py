"""Prompts that are longer than what an answerer was made for."""

from collections.abc import Iterable

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.models.video_prompt import FrameTimes


def beyond(
    answerer: Answerer, rendered: Iterable[tuple[str, str]], num_frames: int, height: int, width: int
) -> list[str]:
    """One line, with all numbers, for each prompt (name, rendered text) that with so many frames, of that size as they
    are shown, has more tokens than the model has positions; [] where the model does not tell."""
    limit = answerer.config.language.max_position_embeddings
    if limit is None:
        return []
    visual = answerer.config.num_visual_tokens(num_frames, height, width)
    times = FrameTimes(FrameTimes.unknown(num_frames).seconds, float(num_frames))  # what they are makes no difference
    lines = []
    for name, text in rendered:
        words = len(prompts.tokenize(answerer.config.write_times(text, times), answerer.tokenizer)) - 1
        if words + visual > limit:
            of = f"{words} tokens of text and {visual} of {num_frames} frames"
            lines.append(f"{name}: {of} are {words + visual}, more than the {limit} that {answerer.folder} can read")
    return lines
