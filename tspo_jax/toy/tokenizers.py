"""Byte-level BPE tokenizers for the tiny checkpoints, in the formats of CLIP and Qwen2, trained on the world's text.

Every byte has a token of its own, so that any question can be asked; the world's words become single tokens.
"""

import json
from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

MAX_VOCABULARY = 2048  # more than the world's words need: training stops when all are merged


def clip_tokenizer(texts: Iterable[str], max_length: int) -> CLIPTokenizer:
    """CLIP's form: lower case, `</w>` at the end of words, start and end token around a text."""
    vocab, merges = _train(CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}), texts, "</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):  # the largest ids, as in the original
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def qwen2_tokenizer(texts: Iterable[str], max_length: int, special_tokens: Iterable[str] = ()) -> Qwen2Tokenizer:
    """Qwen2's form: no start token, <|endoftext|>, <|im_start|>, <|im_end|> and more behind the vocabulary."""
    vocab, merges = _train(Qwen2Tokenizer(), texts, "")
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *special_tokens],
        model_max_length=max_length,
    )


def _train(
    blank: PreTrainedTokenizerBase, texts: Iterable[str], suffix: str
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges learned with the normaliser and the splitting rule of `blank`."""
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        **({"end_of_word_suffix": suffix} if suffix else {}),
    )
    blank.backend_tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(blank.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = alphabet + [letter + suffix for letter in alphabet if suffix]
    tokens += [token for token in model["vocab"] if token not in set(tokens)]
    return {token: i for i, token in enumerate(tokens)}, merges
