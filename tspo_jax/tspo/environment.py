"""What answers picks with rewards: their frames are fetched, the frozen Video-MLLM answers, the answers are scored.

A batch is answered `answerer.question_chunk` questions at a time, so that the frames of the next ones are fetched and
decoded while the device works.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tspo_jax.answering import context, prompts, shapes
from tspo_jax.answering.rollout import Answers, Rollout, unique_frames
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.letters import option_letter
from tspo_jax.data.loader import Batch, fetch_frames
from tspo_jax.data.questions import Question, QuestionError
from tspo_jax.devices import sharding
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.runs.metrics import DeviceClock, Stopwatch
from tspo_jax.tspo.rewards import OPTION_REWARDS, group_rewards

_NAMED = 3  # questions


class Shown(NamedTuple):
    """What the MLLM is shown of some rows [start:stop] of a batch: its arguments behind the parameters."""

    frames: np.ndarray  # uint8 [b,U,S,S,3]
    index: np.ndarray  # int [b,G,K] into them
    prompt_ids: np.ndarray  # int [b,G,N]
    prompt_lengths: np.ndarray
    options: np.ndarray | None
    steps: np.ndarray | None  # see prompts.Prompts


class PromptLengths(NamedTuple):
    """Of prompts with some number of frames, each place of visual tokens being one.

    Attributes:
      of_question: int [questions], the most that each takes.
      rungs: what those of a kind are padded to, chunk by chunk (shapes.ladder).
      shares: float [rungs], of the chunks.
      visual: tokens that the frames add.
    """

    of_question: np.ndarray
    rungs: tuple[int, ...]
    shares: np.ndarray
    visual: int


class Environment:
    """Picks -> rewards.

    Args:
      questions, store, names: of the loader that gives the batches.
      answerer: on `mesh`.
      pool: threads that read and decode pictures.
      clock: told of what the device is given to do.
    """

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        questions: Sequence[Question],
        store: FrameStore,
        names: Sequence[str],
        answerer: Answerer,
        pool: Executor,
        clock: DeviceClock,
    ):
        self._config, self._mesh, self._questions, self._store = config, mesh, questions, store
        self._names, self._answerer, self._pool, self._clock = names, answerer, pool, clock
        self._num_chunks = num_chunks(config, mesh)
        a = config.answerer
        template = a.template or answerer.template
        self._texts = [prompts.render(question.question, template) for question in questions]
        self.rollout = Rollout.of(
            answerer,
            max_new_tokens=a.max_new_tokens,
            encode_chunk=a.encode_chunk,
            prefill_chunk=a.prefill_chunk,
            mesh=mesh,
            attention=a.attention,
            float32_precision=a.float32_precision,
        )

    def show(self, rows: Batch, picks: np.ndarray, watch: Stopwatch) -> Iterator[Shown]:
        """Fetches the frames of picks int [B,G,K], ascending, chunk by chunk as they are asked for.

        Called by all processes in the same order: they agree on the length of the prompts of each chunk.
        """
        chunks, of_k = self._chunks(len(picks)), self.prompt_lengths(rows["kind"], picks.shape[-1])
        longest = np.array([of_k.of_question[rows["index"][start:stop]].max() for start, stop in chunks])
        if len(of_k.rungs) > 1 and jax.process_count() > 1:
            longest = multihost_utils.process_allgather(longest).max(axis=0)
        lengths = [shapes.least(of_k.rungs, tokens) for tokens in longest]
        return self._show(rows, picks, watch, list(zip(chunks, lengths, strict=True)))

    def _show(
        self, rows: Batch, picks: np.ndarray, watch: Stopwatch, chunks: Sequence[tuple[tuple[int, int], int]]
    ) -> Iterator[Shown]:
        for (start, stop), length in chunks:
            with watch("fetch"):
                part = slice(start, stop)
                candidates, index = unique_frames(picks[part])
                video, frame = (np.take_along_axis(rows[name][part], candidates, axis=1) for name in ("video", "frame"))
                crop = self._answerer.processor.for_frames(picks.shape[-1]).crop
                frames = fetch_frames(self._store, self._names, video, frame, crop, self._pool)
                ids, lengths, steps = self._prompts(rows, picks, start, stop, length)
                options = rows["options"][part] if "options" in rows else None
                shown = Shown(frames, index, ids, lengths, options, steps)
            yield shown

    def _prompts(self, rows: Batch, picks: np.ndarray, start: int, stop: int, length: int) -> prompts.Prompts:
        """Of rows [start:stop], padded to `length`."""
        texts = [self._texts[i] for i in rows["index"][start:stop]]
        times = [[self._times(rows, row, of_set) for of_set in picks[row]] for row in range(start, stop)]
        return prompts.write(texts, times, self._answerer, shapes.MULTIPLE, length)

    def _times(self, rows: Batch, row: int, picks: np.ndarray) -> FrameTimes:
        """When picks int [K] are shown: in their video, or in the needle sample, a video of one frame a second."""
        if rows["kind"] == "specific":
            return FrameTimes.of(picks, float(rows["mask"][row].sum()))
        video = self._store.video(self._names[rows["video"][row, 0]])
        return FrameTimes.of(video.timestamps[rows["frame"][row, picks]], video.duration)

    @functools.cache  # noqa: B019 (an environment lives as long as its run)
    def prompt_lengths(self, kind: str, k: int) -> PromptLengths:
        latest = max(self._store.video(name).duration for name in self._names)
        latest = max(latest, float(max(self._config.data.buckets)))  # of needle samples
        of_question = shapes.text_tokens(self._texts, self._answerer, k, latest)
        of_kind = [tokens for tokens, q in zip(of_question, self._questions, strict=True) if q.kind == kind]
        together = self._config.batch_size // self._num_chunks
        visual = self._answerer.config.num_visual_tokens(k, *self._frame_size(self._names[0], k))
        rungs = shapes.ladder(of_kind, shapes.MULTIPLE, visual, together)
        return PromptLengths(of_question, rungs, shapes.chances(of_kind, rungs, together), visual)

    def long_prompts(self, kind: str, k: int) -> list[str]:
        """A line for each length of prompts above the shortest: whose they are, and what they cost."""
        of_question, (shortest, *longer), _, visual = self.prompt_lengths(kind, k)
        lines = []
        for below, length in itertools.pairwise((shortest, *longer)):
            of_length = (of_question > below) & (of_question <= length)
            found = [q.source for q, it_is in zip(self._questions, of_length, strict=True) if it_is and q.kind == kind]
            named = ", ".join(found[:_NAMED]) + ", ..." * (len(found) > _NAMED)
            lines.append(
                f"prompts of {len(found)} {kind} questions are padded to {length} tokens of text, the shortest to "
                f"{shortest}: with {k} frames a batch that holds one prefills "
                f"{(visual + length) / (visual + shortest):.2f} times as much ({named})"
            )
        return lines

    def _frame_size(self, name: str, k: int) -> tuple[int, int]:
        video = self._store.video(name)
        return self._answerer.processor.for_frames(k).size_of(video.height, video.width)

    def ask(self, shown: Iterable[Shown], watch: Stopwatch) -> list[Answers]:
        """Starts the answers to all chunks; returns before they are there."""
        answers = []
        for chunk in one_ahead(shown):
            with watch("answer"):
                given = sharding.put_batch(self._mesh, chunk)
                since = time.perf_counter()
                started = self.rollout(self._answerer.params, *given)
                self._clock.started(started.tokens, since)
                answers.append(started)
        return answers

    def measure(self, rows: Batch, picks: np.ndarray, answers: Sequence[Answers], watch: Stopwatch) -> dict:
        """What the host learns from the answers, when they are there (see `measure`)."""
        completions, options = [], []
        for chunk in answers:
            with watch("answer"):
                of_questions = sharding.over_questions(self._mesh)
                wanted = jax.device_put((chunk.tokens, chunk.lengths, chunk.option_log_probs), of_questions)
                tokens, lengths, log_probs = jax.tree.map(sharding.local_rows, wanted)
            with watch("reward"):
                completions += prompts.decode(tokens, lengths, self._answerer.tokenizer)
                options.append(log_probs)
        with watch("reward"):
            questions = [self._questions[i] for i in rows["index"]]
            solutions, counts = zip(*((q.answer, len(q.options)) for q in questions), strict=True)
            options = None if options[0] is None else np.concatenate(options)
            return measure(self._config, rows, picks, completions, solutions, options, counts)

    def labels(self, rows: Batch) -> np.ndarray:
        """The frames to learn from in a warm start: those of the evidence, else of a needle sample's target video.

        Returns: bool [B,T]; a row without any is a question that has neither.
        """
        labels = rows["needle_mask"].copy()
        for row, i in enumerate(rows["index"]):
            question = self._questions[i]
            if not question.evidence:
                continue
            is_target = rows["mask"][row] & (rows["video"][row] == self._names.index(question.video))
            times = self._store.video(question.video).timestamps[np.where(is_target, rows["frame"][row], 0)]
            shown = np.any([(times >= start) & (times < end) for start, end in question.evidence], axis=0)
            labels[row] = is_target & shown
        return labels

    def abstract_call(self, rows: Batch, k: int, length: int) -> tuple[Any, tuple]:
        """The rollout's program and its arguments as shapes, for a chunk of a batch like `rows` with K = k, and prompts
        of one of the rungs of `prompt_lengths`."""
        b, G = len(rows["index"]) // self._num_chunks, self._config.policy.group_size
        size = self._frame_size(self._names[rows["video"][0, 0]], k)
        frames, index = np.empty((b, G * k, *size, 3), np.uint8), np.zeros((b, G, k), np.int32)
        options = rows["options"][:b] if "options" in rows else None
        ids, lengths, steps = self._prompts(rows, index, 0, b, length)
        chunk = Shown(frames, index, ids, lengths, options, steps)
        return self.rollout.program, (self._answerer.params, *sharding.abstract_batch(self._mesh, chunk))

    def _chunks(self, num_rows: int) -> list[tuple[int, int]]:
        size = num_rows // self._num_chunks
        return [(start, start + size) for start in range(0, num_rows, size)]


def one_ahead(shown: Iterable[Shown]) -> Iterator[Shown]:
    """The same, each fetched by a thread while the one before is being answered: a program may block its caller."""
    chunks = iter(shown)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk


class Fetching:
    """`shown` fetched by a thread from now on: iterating waits for it."""

    def __init__(self, shown: Iterable[Shown]):
        thread = ThreadPoolExecutor(1)
        self._all = thread.submit(list, shown)
        thread.shutdown(wait=False)

    def __iter__(self) -> Iterator[Shown]:
        return iter(self._all.result())


def num_chunks(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Even parts that a batch is answered in: of answerer.question_chunk questions, or more where the mesh needs it."""
    size, data = config.batch_size, mesh.shape["data"]
    wanted = min(config.answerer.question_chunk or size, size)
    return next(size // part for part in range(data, size + 1, data) if part >= wanted and size % part == 0)


def arrays_per_question(config: Config, questions: Sequence[Question], answerer: Answerer) -> dict[str, np.ndarray]:
    """What the loader puts beside each question: `options`, where they count."""
    if not any(name in weights for weights in reward_weights(config).values() for name in OPTION_REWARDS):
        return {}
    return {"options": prompts.option_tokens(questions, config.answerer.option_text, answerer.tokenizer)}


def measure(
    config: Config,
    rows: Batch,
    picks: np.ndarray,
    completions: Sequence[Sequence[str]],
    solutions: Sequence[str],
    option_log_probs: np.ndarray | None = None,
    num_options: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Rewards (by name, and `total`) and `unparsed` [B,G], `unique_frames` and `cosine_spread` [B].

    picks are int [B,G,K], completions [B][G], solutions and num_options [B], option_log_probs float [B,G,O] where a
    reward needs them.
    """
    rewards = group_rewards(
        rows["kind"],
        completions,
        solutions,
        picks,
        rows["needle_mask"],
        reward_weights(config),
        rows["mask"].sum(axis=1),
        option_log_probs,
        num_options,
    )
    counts = num_options or [0] * len(completions)
    unparsed = [
        [option_letter(completion, count) is None for completion in group]
        for group, count in zip(completions, counts, strict=True)
    ]
    return {
        **rewards,
        "unparsed": np.array(unparsed, np.float32),
        "unique_frames": np.array([len(np.unique(group)) for group in picks], np.float32),
        "cosine_spread": cosine_spread(rows),
    }


def reward_weights(config: Config) -> dict[str, dict[str, float]]:
    """Of `group_rewards`: the paper's rewards always, further ones where they count."""
    paper = {"general": ("accuracy",), "specific": ("accuracy", "location")}
    weights_of_kind = {}
    for kind, always in paper.items():
        fields = dataclasses.asdict(getattr(config.data, kind))
        further = [name for name in ("coverage", *OPTION_REWARDS) if fields[name]]
        weights_of_kind[kind] = {name: fields[name] for name in (*always, *further)}
    return weights_of_kind


def cosine_spread(rows: Batch) -> np.ndarray:
    """Standard deviation of the CLIP similarities within each video: float32 [B]."""
    features, text = rows["features"], rows["text"]
    norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(text, axis=-1, keepdims=True)
    cosines = np.einsum("btd,bd->bt", features, text) / np.maximum(norms, 1e-8)
    return np.std(cosines, axis=1, where=rows["mask"])


def within_context(
    config: Config, questions: Sequence[Question], store: FrameStore, answerer: Answerer
) -> tuple[list[int], list[str]]:
    """The places of the questions whose prompts the answerer can read with the most frames that a step shows, and one
    line for each of the others: it would be cut, or answered with nonsense. Raises QuestionError where none is left, or
    data.strict and one is too long."""
    most = max(config.data.general.k, config.data.specific.k, *config.policy.random_k)
    there = next((question.video for question in questions if question.video in store), None)
    if there is None:  # the loader says so
        return [*range(len(questions))], []
    video = store.video(there)  # all are shown in one size: check_frame_sizes
    size = answerer.processor.for_frames(most).size_of(video.height, video.width)
    template = config.answerer.template or answerer.template
    rendered = [(question.source, prompts.render(question.question, template)) for question in questions]
    lines = context.beyond(answerer, rendered, most, *size, new=config.answerer.max_new_tokens)
    if lines and (config.data.strict or len(lines) == len(questions)):
        raise QuestionError("\n".join(lines[:20]))
    too_long = {line.partition(": ")[0] for line in lines}
    return [i for i, question in enumerate(questions) if question.source not in too_long], lines


def check_frame_sizes(
    store: FrameStore, answerer: Answerer, budgets: Sequence[int] = (), names: Collection[str] | None = None
) -> None:
    """Raises ValueError where videos (the named ones, or all) would be shown in different sizes: a batch, and a needle
    sample, has one.

    `budgets` are the numbers of frames that are shown, for a model that shows fewer frames larger.
    """
    if answerer.processor.frame_size:
        return
    shown = [name for name in store.names() if names is None or name in names]
    videos = [store.video(name) for name in shown]
    for processor in [answerer.processor.for_frames(k) for k in budgets] or [answerer.processor]:
        sizes = {processor.size_of(video.height, video.width) for video in videos}
        if len(sizes) <= 1:
            continue
        found = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"the videos of {store.folder} would be shown in several sizes ({found}); give all frames one, "
            "e.g. --config.answerer.video.frame_size='(392, 728)'"
        )
