"""Conversation templates, and prompts as token ids with one place for the video."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.letters import LETTERS
from tspo_jax.data.questions import Question
from tspo_jax.models.families import FAMILIES
from tspo_jax.models.video_prompt import VIDEO_TOKEN, FrameTimes
from tspo_jax.models.video_tags import IMAGE_TAG, VIDEO_TAG

LETTER_SUFFIX = "Please answer with the option's letter from the given choices directly."

# Conversations of one user turn, with IMAGE_TAG or VIDEO_TAG where the visual tokens go.
TEMPLATES = {name: text for family in FAMILIES for name, text in family.templates.items()}

_VIDEO_PLACE = re.compile(rf"(<\|vision_start\|>)?({IMAGE_TAG}|{re.escape(VIDEO_TAG)})(<\|vision_end\|>)?\n?")


def render(question: str, template: str = "qwen_1_5", suffix: str = LETTER_SUFFIX) -> str:
    """The prompt as text, with IMAGE_TAG or VIDEO_TAG in the place of the video.

    Args:
      question: with its options, one a line.
      template: a name of TEMPLATES; see `Answerer.template`.
      suffix: the last line of the user's text; empty for none.

    Raises: ValueError for an unknown template, or a question that is empty or holds a tag itself.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, not one of {', '.join(TEMPLATES)}")
    if not question.strip():
        raise ValueError("the question is empty")
    text = f"{question}\n{suffix.removeprefix(chr(10))}" if suffix else question
    for tag in (IMAGE_TAG, VIDEO_TAG):
        if tag in text:
            raise ValueError(f"the question holds {tag}; leave it out, the template has the place of the video")
    return TEMPLATES[template].replace("{text}", text)


def render_text(text: str, template: str = "qwen_1_5") -> str:
    """The prompt of a user's turn without a video; tags in the text, which would stand for one, are left out.

    Raises: ValueError for an unknown template and an empty text.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, not one of {', '.join(TEMPLATES)}")
    for tag in (IMAGE_TAG, VIDEO_TAG):
        text = text.replace(tag, "")
    if not text.strip():
        raise ValueError("the text is empty")
    return _VIDEO_PLACE.sub("", TEMPLATES[template]).replace("{text}", text)


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a rendered prompt: the texts between the tags are tokenised apart, a VIDEO_TOKEN for each tag."""
    first, *others = re.split(f"{IMAGE_TAG}|{re.escape(VIDEO_TAG)}", prompt)
    ids = list(_token_ids(tokenizer, first))
    for part in others:
        ids += [VIDEO_TOKEN, *_token_ids(tokenizer, part)]
    return ids


@functools.lru_cache(maxsize=4096)  # the words between the frames of a video are few, and come again and again
def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class Prompts(NamedTuple):
    """Prompts of B questions with G sets of frames each, as the rollout takes them.

    Attributes:
      ids: int32 [B, G, N], right padded.
      lengths: int32 [B, G].
      steps: int32 [B, G, pairs], where the frames lie in time, for a model whose text does not tell it; else None.
    """

    ids: np.ndarray
    lengths: np.ndarray
    steps: np.ndarray | None


def write(
    rendered: Sequence[str],
    times: Sequence[Sequence[FrameTimes]],
    answerer: Answerer,
    multiple: int = 1,
    at_least: int = 1,
    num_frames: int = 0,
) -> Prompts:
    """Rendered prompts [B] with the times of each one's frame sets [B][G], each of K frames or, where `num_frames` says
    how many the shape has, of at most so many; see `pad`."""
    config, tokenizer = answerer.config, answerer.tokenizer
    texts = [[config.write_times(text, of_set) for of_set in sets] for text, sets in zip(rendered, times, strict=True)]
    tokens = [tokenize(text, tokenizer) for sets in texts for text in sets]
    ids, lengths = pad(tokens, answerer.generation.pad_token_id, multiple, at_least)
    steps = [[config.time_steps(of_set) for of_set in sets] for sets in times]
    if steps[0][0] is None:
        steps = None
    else:
        pairs = -(-max(num_frames, *(len(t.seconds) for sets in times for t in sets)) // config.temporal_patch_size)
        steps = np.array([[np.pad(s, (0, pairs - len(s)), mode="edge") for s in sets] for sets in steps], np.int32)
    shape = len(texts), len(texts[0])
    return Prompts(ids.reshape(*shape, -1), lengths.reshape(shape), steps)


def pad(
    prompts: Sequence[Sequence[int]], pad_token_id: int, multiple: int = 1, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of B prompts as one array, padded on the right.

    Returns: int32 [B, N] with N the longest length, or `at_least`, rounded up to `multiple` (few lengths, few
    compilations), and the lengths int32 [B].
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    N = -(-max(lengths.max(), at_least) // multiple) * multiple
    padded = np.full((len(prompts), N), pad_token_id, np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    return padded, lengths


def decode(tokens: np.ndarray, lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list:
    """Answers as text, without special tokens and outer white space: int [..., N], int [...] -> nested lists [...]."""
    if lengths.ndim:
        return [decode(t, n, tokenizer) for t, n in zip(tokens, lengths, strict=True)]
    return tokenizer.decode(tokens[: int(lengths)].tolist(), skip_special_tokens=True).strip()


def option_tokens(questions: Sequence[Question], text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token that names each option in an answer: int32 [questions, O], -1 where there are fewer options.

    Args:
      text: how it is written there, with {letter}, e.g. "{letter}", or " {letter}" behind other words.
    Raises: ValueError where that is not one token.
    """
    letters = LETTERS[: max(len(question.options) for question in questions)]
    ids = [tokenizer(text.format(letter=letter), add_special_tokens=False)["input_ids"] for letter in letters]
    if any(len(of_letter) != 1 for of_letter in ids) or len({tuple(of_letter) for of_letter in ids}) < len(letters):
        raise ValueError(
            f"answerer.option_text is {text!r}: written with {', '.join(letters)} it must be one token each, by which "
            f"the rewards probability and margin tell the options apart, but it is {ids}"
        )
    counts = np.array([len(question.options) for question in questions])
    return np.where(np.arange(len(letters)) < counts[:, None], np.array(ids, np.int32)[:, 0], -1).astype(np.int32)
