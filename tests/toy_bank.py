"""A frame bank with every content, and tokenizers trained on the toy world's sentences and conversations."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
from transformers import CLIPTokenizer, Qwen2Tokenizer

from tspo_jax.checkpoints.folders import Generation
from tspo_jax.toy.clip_training import sentence
from tspo_jax.toy.conversations import ConversationWriter, training_texts
from tspo_jax.toy.frame_bank import BALL_NAMES, NOTHING, SETTING_NAMES, THING_NAMES, FrameBank
from tspo_jax.toy.tiny_answerers import TINY_ANSWERERS
from tspo_jax.toy.tokenizers import clip_tokenizer, qwen2_tokenizer


def full_bank(size: int = 24, copies: int = 1) -> FrameBank:
    """Every content `copies` times, as noise: uint8 [n, size, size, 3]."""
    things, balls = (range(NOTHING, len(names)) for names in (THING_NAMES, BALL_NAMES))
    contents = list(itertools.product(range(len(SETTING_NAMES)), things, balls)) * copies
    pixels = np.random.default_rng(0).integers(256, size=(len(contents), size, size, 3), dtype=np.uint8)
    return FrameBank(pixels, *np.array(contents).T)


@functools.cache
def conversation_tokenizer(name: str = "llava_video") -> Qwen2Tokenizer:
    tiny, writer = TINY_ANSWERERS[name], ConversationWriter(full_bank(size=1))
    texts = training_texts(writer, np.random.default_rng(0), 500, tiny.architecture(0))
    return qwen2_tokenizer(texts, 1024, tiny.special_tokens.values())


def reader(name: str = "llava_video") -> SimpleNamespace:
    """What of a family's answerer is needed to write and read prompts."""
    tokenizer = conversation_tokenizer(name)
    a = TINY_ANSWERERS[name].architecture(len(tokenizer))
    generation = Generation((tokenizer.eos_token_id,), tokenizer.pad_token_id, 1.0)
    return SimpleNamespace(params={}, config=a.config, template=a.template, tokenizer=tokenizer, generation=generation)


def sentence_tokenizer() -> CLIPTokenizer:
    bank, rng = full_bank(size=1), np.random.default_rng(0)
    rows = rng.permutation(len(bank.pixels))[:2000]
    return clip_tokenizer(sorted({sentence(rng, *bank.words(i)) for i in rows}), max_length=77)
