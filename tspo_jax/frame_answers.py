"""Texts of a frozen Video-MLLM for many (video, frame sets, prompt) requests, in batches of a few static shapes."""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import numpy as np

from tspo_jax import prompts, sharding
from tspo_jax.checkpoints import Answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.rollout import Answers, Rollout, unique_frames

PROMPT_MULTIPLE = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """What to ask: G sets of K stored frames of a video (`picks` int [G,K]), and the user's text.

    `id` is the caller's; with `blank`, black frames are shown in place of the stored ones.
    """

    id: Any
    video: str
    picks: np.ndarray
    text: str
    blank: bool = False


def answer_requests(
    requests: Iterable[Request],
    store: FrameStore,
    answerer: Answerer,
    rollout: Rollout,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    template: str = "",
    prompt_multiple: int = PROMPT_MULTIPLE,
) -> Iterator[list[tuple[Request, list[str]]]]:
    """Requests with their G answers, batch by batch, not in their order: a batch has one shape of picks and pixels.

    The frames of a batch are read while the one before is being answered. A last batch that is not full is filled up
    with its last request, so that it needs no compilation of its own. Prompts are padded to a multiple of
    `prompt_multiple` tokens; `template` is the answerer's own if empty. With several processes, `batch_size` is that of
    each. Raises ShardingError where the mesh cannot share a batch evenly.
    """
    sharding.check_batch_size(mesh, batch_size * sharding.data_slice(mesh)[1])
    pad_token = answerer.generation.pad_token_id

    def read(request: Request) -> tuple[Request, np.ndarray, np.ndarray]:
        """With the unique frames uint8 [U, ...] and the index [G,K] into them."""
        frames, index = unique_frames(request.picks[None])
        unique, places = np.unique(frames[0], return_inverse=True)
        shown = np.stack([answerer.processor.crop(frame) for frame in store.frames(request.video, unique)])
        return request, np.zeros_like(shown[places]) if request.blank else shown[places], index[0]

    def start(batch: list) -> Answers:
        batch = batch + batch[-1:] * (batch_size - len(batch))
        requests, frames, index = zip(*batch, strict=True)
        texts = [prompts.render(request.text, template or answerer.template, "") for request in requests]
        tokens = [prompts.tokenize(text, answerer.tokenizer) for text in texts]
        ids, lengths = prompts.pad(tokens, pad_token, prompt_multiple)
        return rollout(answerer.params, *sharding.put_batch(mesh, (np.stack(frames), np.stack(index), ids, lengths)))

    def finish(batch: list, answers: Answers) -> list[tuple[Request, list[str]]]:
        rows = jax.device_put((answers.tokens, answers.lengths), sharding.over_questions(mesh))
        texts = prompts.decode(*map(sharding.local_rows, rows), answerer.tokenizer)
        return [(request, answer) for (request, _, _), answer in zip(batch, texts, strict=False)]

    running = None
    with ThreadPoolExecutor() as pool:
        for batch in _batches(_read_ahead(requests, read, pool, batch_size), batch_size):
            started = batch, start(batch)
            if running:
                yield finish(*running)
            running = started
    if running:
        yield finish(*running)


def _read_ahead(requests: Iterable[Request], read, pool: ThreadPoolExecutor, size: int) -> Iterator[tuple]:
    """`read` of each request, at most `size` at a time in memory."""
    requests = iter(requests)
    while chunk := list(islice(requests, size)):
        yield from pool.map(read, chunk)


def _batches(readings: Iterable[tuple], size: int) -> Iterator[list]:
    waiting: dict[tuple, list] = {}
    for reading in readings:
        shape = reading[1].shape, reading[2].shape
        same = waiting.setdefault(shape, [])
        same.append(reading)
        if len(same) == size:
            yield waiting.pop(shape)
    yield from waiting.values()
