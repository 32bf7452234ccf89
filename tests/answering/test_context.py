"""Prompts that the answerer was not made for are named with all numbers."""

import dataclasses

import pytest

from tspo_jax.answering import context, prompts
from tspo_jax.checkpoints.folders import load_answerer


@pytest.mark.parametrize("checkpoint", ["llava_video_grid", "llava_video_one_token"])
def test_prompts_beyond_the_context(golden, checkpoint):
    answerer = load_answerer(golden / checkpoint)
    asked = [("a", prompts.render("Why?")), ("b", prompts.render("Why " * 400 + "?"))]
    words = [len(prompts.tokenize(text, answerer.tokenizer)) - 1 for _, text in asked]
    frames = answerer.config.num_visual_tokens(4, 28, 28)

    def beyond(limit):
        language = dataclasses.replace(answerer.config.language, max_position_embeddings=limit)
        limited = dataclasses.replace(answerer, config=dataclasses.replace(answerer.config, language=language))
        return context.beyond(limited, asked, 4, 28, 28)

    assert beyond(None) == [] and beyond(words[1] + frames) == []
    assert len(beyond(words[0] + frames - 1)) == 2
    (line,) = beyond(words[1] + frames - 1)
    total = words[1] + frames
    assert line == (
        f"b: {words[1]} tokens of text and {frames} of 4 frames are {total}, more than the {total - 1} that "
        f"{answerer.folder} can read"
    )
