"""Pairs -> batches: texts as token ids, the frames of the whole video, everything of few static shapes."""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.selection.methods import uniform
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.pairs import Frames, Pair
from tspo_jax.tpo.programs import Pairs

TOKEN_MULTIPLE = 64  # prompts, their video included, are padded to a multiple of it


class PairError(ValueError):
    """Pairs that cannot be trained on, listed."""


class PairBatches:
    """Batches of pairs by number: batch n is a function of (seed, n) and the pairs.

    Args:
      name: of the file that the pairs come from, for messages.
      pool: threads that read and decode frames.
      share: (index, count) of this process: it gets every count-th row of a batch, from index on.
    Raises: PairError listing the pairs whose video is missing or that do not fit into the context, where
      config.data.strict or none is left.

    Attributes:
      pairs: those that can be trained on.
      frames: Frames -> their pictures as the answerer is shown them, uint8 [K, H, W, 3]; the newest are remembered.
      left_out: one message for each that cannot.
      reference: float32 [pairs, 2], to be filled in where the reference was computed before.
    """

    def __init__(
        self,
        config: TpoConfig,
        pairs: Sequence[Pair],
        name: str,
        answerer: Answerer,
        store: FrameStore,
        pool: Executor,
        share: tuple[int, int] = (0, 1),
    ):
        self.store, self._config, self._answerer, self._pool, self._share = store, config, answerer, pool, share
        self._processor = answerer.processor.for_frames(config.data.num_frames)
        self.frames = functools.lru_cache(config.data.cached_videos)(self._frames)
        self.pairs, self.left_out, tokens, steps, sizes = [], [], [], [], {}
        template = config.answerer.template or answerer.template
        limit = config.data.max_tokens or max_positions(answerer)
        for pair in pairs:
            try:
                size = self._frame_size(pair)
                times = self._times(pair)
                ids = self._tokens(pair, template, times)
                self._check_length(pair, ids, size, limit)
            except (PairError, ValueError, OSError) as error:
                self.left_out.append(f"{name}: pair {pair.id}: {error}")
                continue
            sizes.setdefault(size, pair.id)
            self.pairs.append(pair)
            tokens.append(ids)
            steps.append(answerer.config.time_steps(times))
        if self.left_out and (config.data.strict or not self.pairs):
            raise PairError("\n  ".join([f"{len(self.left_out)} pair(s) cannot be trained on:", *self.left_out[:20]]))
        if len(sizes) > 1:
            found = ", ".join(f"{h}x{w} ({pair})" for (h, w), pair in sizes.items())
            raise PairError(
                f"the videos of {name} would be shown in several sizes: {found}; give all frames one, e.g. "
                "--config.answerer.video.frame_size='(392, 728)'"
            )
        (size,) = sizes
        visual = answerer.config.num_visual_tokens(config.data.num_frames, *size)
        prompt_ids, self._answers = [t[0] for t in tokens], [t[1:] for t in tokens]
        longest = max(map(len, prompt_ids))
        # With the video in the place of one token, a multiple: the tokens of a prompt are dealt out to devices.
        room = -(-(longest - 1 + visual) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE - visual + 1
        ids, self._lengths = prompts.pad(prompt_ids, answerer.generation.pad_token_id)
        self._ids = np.pad(ids, ((0, 0), (0, room - longest)), constant_values=answerer.generation.pad_token_id)
        self._steps = None if steps[0] is None else np.array(steps, np.int32)
        self.answer_lengths = np.array([[len(a) for a in pair] for pair in self._answers], np.int32)
        self.reference = np.zeros((len(self.pairs), 2), np.float32)

    def __len__(self) -> int:
        return len(self.pairs)

    def order(self, number: int, size: int) -> np.ndarray:
        """Pairs of batch `number` of `size`: every epoch goes through all of them, in an order of its own."""
        places = np.arange(number * size, (number + 1) * size)
        epochs = places // len(self)
        shuffled = {e: np.random.default_rng((self._config.seed, e)).permutation(len(self)) for e in set(epochs)}
        return np.array([shuffled[e][place % len(self)] for e, place in zip(epochs, places, strict=True)])

    def endless(self, first: int) -> Iterator[Pairs]:
        """The batches of training from number `first` on: this process's rows."""
        number = first
        while True:
            yield self.rows(self.order(number, self._config.batch_size))
            number += 1

    def all(self, size: int) -> Iterator[tuple[np.ndarray, Pairs]]:
        """(pairs of the batch, its rows of this process), over all pairs once; the last batch is filled up with rows of
        weight 0."""
        for start in range(0, len(self), size):
            index = np.arange(start, min(start + size, len(self)))
            yield index, self.rows(index, size - len(index))

    def rows(self, index: np.ndarray, fill: int = 0) -> Pairs:
        """The rows of these pairs, and `fill` of weight 0 behind them."""
        longest = self.answer_lengths[index].max()
        buckets = self._config.data.answer_buckets
        room = next((bucket for bucket in buckets if bucket >= longest), math.ceil(longest / 32) * 32)
        weights_of = np.array([1.0] * len(index) + [0.0] * fill, np.float32)
        first, count = self._share
        index, weights_of = np.append(index, [index[-1]] * fill).astype(int)[first::count], weights_of[first::count]
        answers = np.full((len(index), 2, room), self._answerer.generation.pad_token_id, np.int32)
        for row, i in zip(answers, index, strict=True):
            for of_answer, ids in zip(row, self._answers[i], strict=True):
                of_answer[: len(ids)] = ids
        return Pairs(
            np.stack([self.frames(self.shown(self.pairs[i])) for i in index]),
            self._ids[index],
            self._lengths[index],
            answers,
            self.answer_lengths[index],
            weights_of,
            self.reference[index],
            None if self._steps is None else self._steps[index],
        )

    def shown(self, pair: Pair) -> Frames:
        """The K frames of training: those that the pair names, or evenly spaced ones of its whole video."""
        K = self._config.data.num_frames
        if pair.shown:
            return tuple(pair.shown[i] for i in np.linspace(0, len(pair.shown) - 1, K).astype(int))
        T = self.store.video(pair.video).num_frames
        picks = uniform(np.empty(T), K) if T >= K else np.linspace(0, T - 1, K).astype(int)
        return tuple((pair.video, int(i)) for i in picks)

    def _times(self, pair: Pair) -> FrameTimes:
        """When the frames of training are; of a mixture of videos their places in it, as if at 1 fps."""
        shown = self.shown(pair)
        if pair.shown:
            return FrameTimes.of(np.linspace(0, len(pair.shown) - 1, len(shown)).astype(int))
        video = self.store.video(pair.video)
        return FrameTimes.of(video.timestamps[[i for _, i in shown]], video.duration)

    def _frames(self, shown: Frames) -> np.ndarray:
        """The pictures as the answerer is shown them: uint8 [K, H, W, 3]."""
        pictures: dict[tuple[str, int], np.ndarray] = {}
        for video in dict.fromkeys(video for video, _ in shown):
            wanted = sorted({i for other, i in shown if other == video})
            for i, frame in zip(wanted, self.store.frames(video, wanted, self._pool), strict=True):
                pictures[video, i] = self._processor.crop(frame)
        return np.stack([pictures[frame] for frame in shown])

    def _frame_size(self, pair: Pair) -> tuple[int, int]:
        """Height and width that the pair's frames are shown in. Raises PairError for a video that is not stored."""
        sizes = set()
        for video in {pair.video} if not pair.shown else {video for video, _ in pair.shown}:
            if video not in self.store:
                raise PairError(f"video {video} is not in {self.store.folder}; run python -m tspo_jax.predecode")
            entry = self.store.video(video)
            last = max((i for other, i in pair.shown if other == video), default=0)
            if last >= entry.num_frames:
                raise PairError(f"shows frame {last} of {video}, which has {entry.num_frames}")
            sizes.add(tuple(self._processor.size_of(entry.height, entry.width)))
        if len(sizes) > 1:
            raise PairError(f"its videos would be shown in several sizes: {sorted(sizes)}")
        return sizes.pop()

    def _tokens(self, pair: Pair, template: str, times: FrameTimes) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the prompt and of both answers, which end with the end of the turn."""
        prompt = prompts.render(pair.prompt, template, self._config.data.suffix)
        prompt = self._answerer.config.write_times(prompt, times)
        tokenizer, end = self._answerer.tokenizer, end_of_turn(self._answerer)
        texts = (self._config.data.answer_text.replace("{answer}", text) for text in (pair.chosen, pair.rejected))
        answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if answers[0] == answers[1] or not all(answers):
            raise PairError("its answers have the same tokens, or none")
        return prompts.tokenize(prompt, tokenizer), *([*ids, end] for ids in answers)

    def _check_length(self, pair: Pair, ids: tuple, size: tuple[int, int], limit: int) -> None:
        K, of = self._config.data.num_frames, self._answerer.config.num_visual_tokens
        text = len(ids[0]) - 1 + max(map(len, ids[1:]))
        if (total := text + of(K, *size)) > limit:
            fit = next((k for k in range(K - 1, 0, -1) if text + of(k, *size) <= limit), 0)
            raise PairError(
                f"{K} frames make {total} tokens with its texts, more than the {limit} of the context; {fit} frames "
                "would fit (config.data.num_frames)"
            )


def rows_of(size: int, count: int) -> np.ndarray:
    """Where each of `size` rows of a batch lies in the global array, which holds one process's rows after another's."""
    return np.argsort(np.concatenate([np.arange(size)[i::count] for i in range(count)]))


def max_positions(answerer: Answerer) -> int:
    """Tokens that the answerer was made for."""
    config = weights.read_config(answerer.folder)
    return int((config.get("text_config") or config).get("max_position_embeddings", 32768))


def end_of_turn(answerer: Answerer) -> int:
    """The token that ends an answer: the template's <|im_end|> where the checkpoint stops at that, else its first."""
    ends = answerer.generation.eos_token_ids
    token = answerer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return token if token in ends else ends[0]
