"""Templates, tokenisation around the video, padding, and answers as text."""

import json

import numpy as np
import pytest
from transformers import Qwen2Tokenizer

from tspo_jax.answering import prompts
from tspo_jax.data.questions import Question
from tspo_jax.models.video_prompt import VIDEO_TOKEN


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Qwen2Tokenizer.from_pretrained(golden / "llava_video_grid")


@pytest.mark.parametrize("name", ["llava_video_grid", "llava_video_one_token"])
def test_prompt_and_token_ids_of_the_original(golden, tokenizer, name):
    arrays = np.load(golden / f"{name}.npz")
    for case in json.loads(str(arrays["meta"])):
        prompt = prompts.render(case["question"])
        assert prompt == case["prompt"]
        assert prompts.tokenize(prompt, tokenizer) == arrays[f"case{case['case']}/input_ids"].tolist()


def test_template_of_the_published_evaluation():
    assert prompts.render("Why?", "chatml_direct", "Think.") == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhy?\nThink.<|im_end|>"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "suffix, user", [("", "Why?"), ("Be brief.", "Why?\nBe brief."), ("\nBe brief.", "Why?\nBe brief.")]
)
def test_suffix_is_the_last_line(suffix, user):
    assert f"<image>\n{user}<|im_end|>" in prompts.render("Why?", suffix=suffix)


def test_chat_template_of_qwen2_5_vl(tokenizer):
    prompt = prompts.render("Why?", "qwen2_5_vl", "Think.")
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|><|vision_end|>Why?\nThink.<|im_end|>\n<|im_start|>assistant\n"
    )
    before, after = prompt.split("<|video_pad|>")
    ids = [tokenizer(part)["input_ids"] for part in (before, after)]
    assert prompts.tokenize(prompt, tokenizer) == [*ids[0], VIDEO_TOKEN, *ids[1]]


def test_braces_in_a_question_are_text():
    assert "What is {text}?" in prompts.render("What is {text}?")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="llama.*qwen_1_5"):
        prompts.render("Why?", template="llama")
    with pytest.raises(ValueError, match="<image>"):
        prompts.render("<image>\nWhy?")
    with pytest.raises(ValueError, match="video_pad"):
        prompts.render("<|video_pad|>Why?")
    with pytest.raises(ValueError, match="question is empty"):
        prompts.render(" \n")


def test_padding_to_a_multiple():
    ids, lengths = prompts.pad([[1, VIDEO_TOKEN, 2], [VIDEO_TOKEN], [1, 2, 3, VIDEO_TOKEN, 5]], 9, multiple=4)
    assert ids.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [3, 1, 5]
    assert ids.tolist() == [
        [1, VIDEO_TOKEN, 2, 9, 9, 9, 9, 9],
        [VIDEO_TOKEN, 9, 9, 9, 9, 9, 9, 9],
        [1, 2, 3, VIDEO_TOKEN, 5, 9, 9, 9],
    ]


def test_answers_lose_special_tokens_and_what_follows_their_length(tokenizer):
    answers = [tokenizer(text)["input_ids"] for text in ("B. A dog<|im_end|>", " A<|im_end|>BBBB")]
    tokens, lengths = prompts.pad(answers, 0)
    lengths[1] = 3
    assert prompts.decode(tokens[None], lengths[None], tokenizer) == [["B. A dog", "A"]]


def test_option_tokens(tokenizer):
    def question(*options):
        return Question(0, "v", "q", "q", options, "A", "general", source="train.jsonl, line 1")

    questions = [question("a cat", "a dog", "two"), question("yes", "no")]
    tokens = prompts.option_tokens(questions, "{letter}", tokenizer)
    assert [tokenizer.decode(row[row >= 0]) for row in tokens] == ["ABC", "AB"] and tokens[1, 2] == -1
    for text in ("The {letter}", "the same"):
        with pytest.raises(
            ValueError, match=f"answerer.option_text is '{text}': written with A, B, C it must be one token"
        ):
            prompts.option_tokens(questions, text, tokenizer)
