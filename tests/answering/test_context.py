"""Prompts that the answerer was not made for are named with all numbers."""

import dataclasses

import pytest

from tspo_jax.answering import context, prompts
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.models.video_prompt import FrameTimes


@pytest.mark.parametrize("checkpoint", ["llava_video_grid", "llava_video_one_token"])
def test_prompts_beyond_the_context(golden, checkpoint):
    answerer = load_answerer(golden / checkpoint)
    asked = [("a", prompts.render("Why?")), ("b", prompts.render("Why " * 400 + "?"))]
    words = [len(prompts.tokenize(text, answerer.tokenizer)) - 1 for _, text in asked]
    frames = answerer.config.num_visual_tokens(4, 28, 28)

    def limited(limit):
        language = dataclasses.replace(answerer.config.language, max_position_embeddings=limit)
        return dataclasses.replace(answerer, config=dataclasses.replace(answerer.config, language=language))

    def beyond(limit, new=0):
        return context.beyond(limited(limit), asked, 4, 28, 28, new)

    assert beyond(None) == [] and beyond(words[1] + frames) == []
    assert len(beyond(words[0] + frames - 1)) == 2
    (line,) = beyond(words[1] + frames - 1)
    total = words[1] + frames
    assert line == (
        f"b: {words[1]} tokens of text and {frames} of 4 frames are {total}, more than the {total - 1} that "
        f"{answerer.folder} can read"
    )
    (line,) = beyond(total + 7, new=8)
    assert f"of 4 frames, and up to 8 of the answer, are {total + 8}, more than the {total + 7} that" in line

    # Of written prompts, however long they are padded.
    times = [[FrameTimes.unknown(4)]] * 2
    ids, lengths, _ = prompts.write([text for _, text in asked], times, answerer, at_least=1000)
    context.check(limited(total + 8), ids, lengths, (4, 28, 28), 8)
    context.check(limited(None), ids, lengths, (4, 28, 28), 8)
    message = f"with 4 frames takes {total} tokens and its answer up to 8, more than the {total + 7} that the model can"
    with pytest.raises(ValueError, match=message):
        context.check(limited(total + 7), ids, lengths, (4, 28, 28), 8)
