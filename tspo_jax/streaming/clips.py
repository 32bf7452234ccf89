"""A stored video as clips of equally many frames, and questions about stored videos as batches of such clips."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.frame_store import FrameStore, VideoEntry
from tspo_jax.data.questions import Question

_MULTIPLE = 64  # tokens; texts are padded to a multiple of it


class Clip(NamedTuple):
    """Frames of a clip: indices int [T] into the stored ones, the last repeated where the video ends in mid-clip; and
    when it starts and ends, in seconds."""

    frames: np.ndarray
    start: float
    end: float


def clips_of(video: VideoEntry, frames: int, most: int = 0) -> list[Clip]:
    """The clips of `frames` stored frames each; at most `most`, evenly spread (0 = all)."""
    times, T = video.timestamps, video.num_frames
    step = float(np.median(np.diff(times))) if T > 1 else 1.0
    starts = np.arange(0, T, frames)
    if most and len(starts) > most:
        starts = starts[np.arange(most) * len(starts) // most]
    rows = [np.minimum(np.arange(start, start + frames), T - 1) for start in starts]
    return [Clip(row, float(times[row[0]]), float(times[row[-1]]) + step) for row in rows]


class QuestionBatch(NamedTuple):
    """B questions, each about a video of at most K clips of T frames.

    Attributes:
      pixels: uint8 [B, K, T, S, S, 3], zero where there is no clip.
      times: float32 [B, K, 2] seconds. is_clip: bool [B, K], a prefix.
      evidence: bool [B, K], the clips that hold the evidence; none where nobody knows.
      words, word_lengths: the question alone, int [B, N] and [B].
      ids, lengths: the prompt with a VIDEO_TOKEN and the answer behind it, int [B, M]; tokens of the prompt alone [B].
      targets: the answer's tokens int [B, A], -1 behind them.
      index: int [B], of the question in its file.
    """

    pixels: np.ndarray
    times: np.ndarray
    is_clip: np.ndarray
    evidence: np.ndarray
    words: np.ndarray
    word_lengths: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    index: np.ndarray


class QuestionClips:
    """Batches of questions by number: batch n is a function of (seed, n) and the questions.

    Args:
      frames: T. clips: K; with `one_clip` a clip of the evidence alone is shown (K = 1), or any where nobody knows it.
      pool: threads that read and decode frames.
      share: (index, count) of this process: it gets every count-th row of a batch, from index on.
    Raises: ValueError naming the first question whose video is not in the store, or where no question is left.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        store: FrameStore,
        answerer: Answerer,
        pool: Executor,
        *,
        frames: int,
        clips: int,
        one_clip: bool,
        batch_size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ):
        if not questions:
            raise ValueError("there are no questions to train on")
        for question in questions:
            if question.video not in store:
                raise ValueError(f"{question.source}: {question.video} is not in {store.folder}; run predecode")
        self._questions, self._store, self._answerer, self._pool = questions, store, answerer, pool
        self._frames, self._clips, self._one_clip = frames, 1 if one_clip else clips, one_clip
        self._batch_size, self._seed, self._share = batch_size, seed, share
        self._processor = answerer.processor.for_frames(frames)
        tokens = [self._tokens(question) for question in questions]
        self._tokens_of = tokens
        # One length for all, so that there is one program.
        self._words = _rounded(max(len(words) for words, *_ in tokens))
        self._prompt = _rounded(max(len(prompt) + len(answer) for _, prompt, answer in tokens))
        self._answer = max(len(answer) for *_, answer in tokens)

    def endless(self, first: int) -> Iterator[QuestionBatch]:
        """Batches from number `first` on, by passes over all questions in random order."""
        number = len(self._questions)
        place, of_process = first * self._batch_size, slice(self._share[0], None, self._share[1])
        while True:
            rows = [self._drawn(place + i, number) for i in range(self._batch_size)]
            place += self._batch_size
            yield self.batch(rows[of_process])

    def _drawn(self, place: int, number: int) -> int:
        epoch, at = divmod(place, number)
        return int(np.random.default_rng((self._seed, epoch)).permutation(number)[at])

    def batch(self, rows: Sequence[int]) -> QuestionBatch:
        shown = list(self._pool.map(self._shown, rows))
        size = shown[0][0].shape[1:]
        if any(pixels.shape[1:] != size for pixels, *_ in shown):
            raise ValueError("the videos of a batch are shown in several sizes; give all one frame_size")
        pixels, times, evidence = (np.stack([self._padded(x[i]) for x in shown]) for i in range(3))
        is_clip = np.arange(self._clips) < np.array([len(x[1]) for x in shown])[:, None]
        words, prompt, answers = zip(*(self._tokens_of[row] for row in rows), strict=True)
        pad = self._answerer.generation.pad_token_id
        whole = [[*p, *a] for p, a in zip(prompt, answers, strict=True)]
        targets = np.full((len(rows), self._answer), -1, np.int32)
        for row, answer in zip(targets, answers, strict=True):
            row[: len(answer)] = answer
        words, word_lengths = prompts.pad(words, pad, self._words)
        lengths = np.array([len(p) for p in prompt], np.int32)
        index = np.array([self._questions[row].index for row in rows], np.int32)
        ids = prompts.pad(whole, pad, self._prompt)[0]
        return QuestionBatch(
            pixels, times.astype(np.float32), is_clip, evidence, words, word_lengths, ids, lengths, targets, index
        )

    def _padded(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, self._clips - len(x)), *[(0, 0)] * (x.ndim - 1)))

    def _shown(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        question = self._questions[row]
        clips = clips_of(self._store.video(question.video), self._frames, 0 if self._one_clip else self._clips)
        evidence = [any(s < clip.end and e >= clip.start for s, e in question.evidence) for clip in clips]
        if self._one_clip:
            holding = [i for i, holds in enumerate(evidence) if holds] or list(range(len(clips)))
            chosen = holding[len(holding) // 2]
            clips, evidence = [clips[chosen]], [evidence[chosen]]
        frames = np.concatenate([clip.frames for clip in clips])
        unique, places = np.unique(frames, return_inverse=True)
        pixels = np.stack([self._processor.crop(frame) for frame in self._store.frames(question.video, unique)])
        pixels = pixels[places].reshape(len(clips), self._frames, *pixels.shape[1:])
        return pixels, np.array([(clip.start, clip.end) for clip in clips]), np.array(evidence)

    def _tokens(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        """Of the question alone, of the prompt, and of the answer: its letter and the end token."""
        tokenizer = self._answerer.tokenizer
        words = question_tokens(question.question, self._answerer)
        prompt = prompts.tokenize(prompts.render(question.question, self._answerer.template), tokenizer)
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        return words, prompt, [*answer, self._answerer.generation.eos_token_ids[0]]


def question_tokens(question: str, answerer: Answerer) -> list[int]:
    """What the clips are selected by: the question with its options, without a conversation around it."""
    return answerer.tokenizer(question, add_special_tokens=False)["input_ids"]


def _rounded(number: int) -> int:
    return -(-number // _MULTIPLE) * _MULTIPLE
