"""The answering Video-MLLM as captioner and writer of backtracking: clips of stored videos described in batches, and
replies to prompts without a video."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tspo_jax.answering import prompts
from tspo_jax.answering.calls import CaptionCall, Reply
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout, greedy_decode, penalized_tokens
from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.models import attention
from tspo_jax.models.layers import merge_params
from tspo_jax.models.video_prompt import text_prompt

_MULTIPLE = 256  # tokens; prompts are padded to this times a power of 2: few lengths, few compilations


class TextAnswers:
    """Greedy replies to prompts without a video; `num_compilations` counts the programs.

    Args:
      answerer: whose language model replies.
      max_new_tokens: length at which a reply is cut.
      batch_size: prompts at a time; a reply does not depend on it.
      mesh, attention: as of the rollout.
    """

    def __init__(
        self,
        answerer: Answerer,
        max_new_tokens: int,
        batch_size: int = 4,
        mesh: Mesh | None = None,
        attention: str = "auto",
        template: str = "",
    ):
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} and batch_size {batch_size} must be at least 1")
        self.answerer, self.max_new_tokens, self.batch_size = answerer, max_new_tokens, batch_size
        self.template = template or answerer.template
        self._mesh, self._attention = mesh, attention
        self.num_compilations = 0
        self._program = jax.jit(self._reply)

    def tokens(self, text: str) -> list[int]:
        """Of a user's turn with this text."""
        return self.answerer.tokenizer(prompts.render_text(text, self.template), add_special_tokens=False)["input_ids"]

    def __call__(self, texts: Sequence[str]) -> list[str]:
        tokens = [self.tokens(text) for text in texts]
        replies: list[str] = [""] * len(texts)
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(tokens):
            by_length.setdefault(padded_length(len(ids)), []).append(i)
        for length, rows in by_length.items():
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                shown = [tokens[row] for row in batch]
                shown += [shown[-1]] * (self.batch_size - len(shown))  # one shape, one compilation
                ids, lengths = prompts.pad(shown, self.answerer.generation.pad_token_id, length)
                found = self._program(self.answerer.params, ids, lengths)
                made = prompts.decode(*map(np.asarray, found), self.answerer.tokenizer)
                for row, text in zip(batch, made, strict=False):
                    replies[row] = text
        return replies

    def _reply(self, params: dict, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.num_compilations += 1  # runs while tracing, which is once per shape
        model = merge_params(self.answerer.graphdef, params)
        with attention.computed_by(self._attention, self._mesh):
            logits, cache, places = model.prefill(text_prompt(model.language_model.embed_tokens(ids), lengths))
            penalized = penalized_tokens(ids, lengths, self.answerer.generation, logits.shape[-1])
            tokens, lengths, *_ = greedy_decode(
                model.decode,
                logits,
                cache.extend(self.max_new_tokens),
                places,
                self.answerer.generation,
                self.max_new_tokens,
                penalized,
            )
        return tokens, lengths


def padded_length(num_tokens: int) -> int:
    """_MULTIPLE times the smallest power of 2 that is enough."""
    return _MULTIPLE * 2 ** max(0, (-(-num_tokens // _MULTIPLE) - 1).bit_length())


class OwnWriter:
    """The answerer's language model as a writer (calls.Writer), of no more context than it has positions."""

    def __init__(self, answers: TextAnswers, context: int = 32768):
        most = answers.answerer.config.language.max_position_embeddings or context
        self._answers, self.context = answers, min(context, most)
        self.max_new_tokens = answers.max_new_tokens
        self.identity = identity_of(answers.answerer, answers.template, answers.max_new_tokens)
        if self.context <= self.max_new_tokens:
            raise ValueError(f"a context of {self.context} tokens has no room for {self.max_new_tokens} new ones")

    def count(self, text: str) -> int:
        return len(self._answers.tokens(text)) if text.strip() else 0

    def write(self, prompts: Sequence[str]) -> list[Reply]:
        return [Reply(text) for text in self._answers(prompts)]


class OwnCaptioner:
    """The answerer as a captioner of stored videos (calls.Captioner): the stored frame nearest to each time is shown.

    A frame has at most a call's `max_pixels` (`within`).
    """

    def __init__(
        self,
        answerer: Answerer,
        store: FrameStore,
        rollout: Rollout,
        mesh: Mesh,
        batch_size: int = 10,
        template: str = "",
    ):
        self._answerer, self._store, self._rollout, self._mesh = answerer, store, rollout, mesh
        self._batch_size, self._template = batch_size, template
        self.identity = identity_of(answerer, template or answerer.template, rollout.max_new_tokens)

    def describe(self, calls: Sequence[CaptionCall]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(calls)
        by_pixels: dict[int, list[Request]] = {}
        for i, call in enumerate(calls):
            if call.video not in self._store:
                replies[i] = Reply(None, f"{call.video} is not in {self._store.folder}")
                continue
            picks = nearest(self._store.video(call.video).timestamps, call.times)
            by_pixels.setdefault(call.max_pixels, []).append(Request(i, call.video, picks[None], call.instruction))
        for max_pixels, requests in by_pixels.items():
            shown_by = within(self._answerer, max_pixels)
            batches = answer_requests(
                requests, self._store, shown_by, self._rollout, self._mesh, self._batch_size, self._template
            )
            for batch in batches:
                for request, (text,) in batch:
                    replies[request.id] = Reply(text)
        return replies


def within(answerer: Answerer, max_pixels: int) -> Answerer:
    """The answerer, each frame shown near its own aspect ratio with at most so many pixels. Where all frames have the
    size of the tower (LLaVA-Video) they keep it."""
    processor = answerer.processor
    if not hasattr(processor, "keeping_aspect"):
        return answerer
    most = min(max_pixels, processor.max_pixels)
    least = min(processor.min_pixels, int(most / 1.05))  # Qwen3-VL's frames have at least 1.05 times its least
    shown_by = dataclasses.replace(processor.keeping_aspect(least, most), min_pixels=least)
    return dataclasses.replace(answerer, processor=shown_by)


def nearest(timestamps: np.ndarray, times: Sequence[float]) -> np.ndarray:
    """The index of the timestamp (ascending) that is nearest to each time, the earlier of two: int [len(times)]."""
    middles = (timestamps[1:] + timestamps[:-1]) / 2
    return np.searchsorted(middles, np.asarray(times), side="left")


def identity_of(answerer: Answerer, template: str, max_new_tokens: int) -> str:
    """What a text of this answerer depends on, besides its prompt: its checkpoint, the adapters on it, and so on."""
    dtype = jax.tree.leaves(answerer.params)[0].dtype
    video = dataclasses.asdict(video) if (video := getattr(answerer.config, "video", None)) else ""
    of_weights = (
        f"{weights.checkpoint_identity(answerer.folder)} {adapters.identity(answerer.params)} {jnp.dtype(dtype)}"
    )
    return f"{of_weights} {template} {max_new_tokens} {video}"


def default_mesh() -> Mesh:
    """One device, for a single question."""
    return sharding.make_mesh([("data", 1), ("model", 1)], jax.devices()[:1])
