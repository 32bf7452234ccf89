"""A frame bank with every content, and tokenizers trained on the toy world's sentences and conversations."""

import itertools

import numpy as np
from transformers import CLIPTokenizer, Qwen2Tokenizer

from tspo_jax.toy.answerer_training import ConversationWriter, training_texts
from tspo_jax.toy.clip_training import sentence
from tspo_jax.toy.frame_bank import BALL_NAMES, NOTHING, SETTING_NAMES, THING_NAMES, FrameBank
from tspo_jax.toy.tokenizers import clip_tokenizer, qwen2_tokenizer


def full_bank(size: int = 24, copies: int = 1) -> FrameBank:
    """Every content `copies` times, as noise: uint8 [n, size, size, 3]."""
    things, balls = (range(NOTHING, len(names)) for names in (THING_NAMES, BALL_NAMES))
    contents = list(itertools.product(range(len(SETTING_NAMES)), things, balls)) * copies
    pixels = np.random.default_rng(0).integers(256, size=(len(contents), size, size, 3), dtype=np.uint8)
    return FrameBank(pixels, *np.array(contents).T)


def conversation_tokenizer() -> Qwen2Tokenizer:
    writer = ConversationWriter(full_bank(size=1))
    return qwen2_tokenizer(training_texts(writer, np.random.default_rng(0), 500), max_length=1024)


def sentence_tokenizer() -> CLIPTokenizer:
    bank, rng = full_bank(size=1), np.random.default_rng(0)
    rows = rng.permutation(len(bank.pixels))[:2000]
    return clip_tokenizer(sorted({sentence(rng, *bank.words(i)) for i in rows}), max_length=77)
