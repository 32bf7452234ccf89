"""Captions of stretches of stored videos as batches of frames and hidden words."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np

from tspo_jax.captioning.config import CaptioningConfig, Words
from tspo_jax.checkpoints.swinbert_folders import Captioner
from tspo_jax.data.caption_files import drawn, frames_of, read_examples
from tspo_jax.data.frame_store import FrameStore, check_side
from tspo_jax.models.bert_captioner import CaptionTokens

NOT_HIDDEN = -1


class Batch(NamedTuple):
    """B captions of L tokens about T frames.

    Attributes:
      frames: uint8 [B, T, S, S, 3], cropped.
      ids: int32 [B, L], some of them hidden.
      lengths: int32 [B], tokens that count.
      targets: int32 [B, L], the hidden tokens, NOT_HIDDEN elsewhere.
    """

    frames: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray


def hide_words(
    rng: np.random.Generator, ids: np.ndarray, length: int, tokens: CaptionTokens, vocab_size: int, words: Words
) -> tuple[np.ndarray, np.ndarray]:
    """A caption int [L] with some of its tokens hidden, and those tokens int [L], NOT_HIDDEN elsewhere.

    Of tokens 1 .. length - 1 (the end token may be hidden, the start never) `share` of the length are drawn; 80 %
    become [MASK], 10 % another token, 10 % stay.
    """
    count = min(max(1, round(words.share * length)), words.most, length - 1)
    places = rng.choice(np.arange(1, length), count, replace=False)
    hidden, targets = ids.copy(), np.full_like(ids, NOT_HIDDEN)
    targets[places] = ids[places]
    for place, chance in zip(places, rng.random(count), strict=True):
        if chance < 0.8:
            hidden[place] = tokens.mask
        elif chance < 0.9:
            hidden[place] = rng.integers(vocab_size)
    return hidden, targets


class CaptionBatches:
    """Endless batches of this process: batch n is a function of (seed, n).

    Raises ValueError for a caption that is longer than the model's limit, and for videos or stretches that the store
    does not have.
    """

    def __init__(
        self,
        config: CaptioningConfig,
        captioner: Captioner,
        store: FrameStore,
        pool: Executor,
        share: tuple[int, int] = (0, 1),
    ):
        self._config, self._captioner, self._store, self._pool, self._share = config, captioner, store, pool, share
        check_side(store.folder, store.settings, captioner.config.image_size)
        self.examples = read_examples(config.data.captions)
        longest = captioner.config.max_text
        for example in self.examples:
            if (length := 2 + len(captioner.tokenizer.encode(example.caption))) > longest:
                raise ValueError(
                    f"{config.data.captions}: {example.caption[:40]!r}.. has {length} tokens with [CLS] and [SEP]; the "
                    f"model's limit is {longest} (max_seq_length of args.json)"
                )
            frames_of(example, store)

    def start(self, first: int) -> Iterator[Batch]:
        while True:
            yield self.batch(first)
            first += 1

    def batch(self, number: int) -> Batch:
        index, count = self._share
        config, B, n = self._config, self._config.batch_size, len(self.examples)
        order = [drawn(config.seed, number * B + i, n) for i in range(B)]
        rows = self._pool.map(self._row, order[index::count], [(number, i) for i in range(B)][index::count])
        return Batch(*map(np.stack, zip(*rows, strict=True)))

    def _row(self, number: int, place: tuple[int, int]) -> tuple:
        example, captioner = self.examples[number], self._captioner
        there = frames_of(example, self._store)
        frames = self._store.frames(example.video, there[captioner.frame_places(len(there))])
        shown = np.stack([captioner.processor.crop(frame) for frame in frames])
        ids, mask = captioner.tokenizer.batch([example.caption], "[CLS]", captioner.config.max_text)
        rng = np.random.default_rng((self._config.seed, 1, *place))
        length, vocab_size = int(mask.sum()), captioner.config.bert.vocab_size
        hidden, targets = hide_words(rng, ids[0], length, captioner.tokens, vocab_size, self._config.words)
        return shown, hidden, np.int32(length), targets
