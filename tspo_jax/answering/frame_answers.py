"""Texts of a frozen Video-MLLM for many (video, frame sets, prompt) requests, in batches of a few static shapes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from tspo_jax.answering import context, prompts, shapes
from tspo_jax.answering.rollout import Answers, Rollout, unique_frames
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.models.video_prompt import FrameTimes


@dataclasses.dataclass(frozen=True)
class Request:
    """What to ask: G sets of K stored frames of a video (`picks` int [G,K]), and the user's text.

    `id` is the caller's; with `blank`, black frames are shown in place of the stored ones. `options` int [O] are the
    tokens that name the options in an answer (prompts.option_tokens), for `scored_requests`.
    """

    id: Any
    video: str
    picks: np.ndarray
    text: str
    blank: bool = False
    options: np.ndarray | None = None


def answer_requests(*args, **kwargs) -> Iterator[list[tuple[Request, list[str]]]]:
    """`scored_requests` without the scores."""
    for batch in scored_requests(*args, **kwargs):
        yield [(request, texts) for request, texts, _ in batch]


def scored_requests(
    requests: Iterable[Request],
    store: FrameStore,
    answerer: Answerer,
    rollout: Rollout,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    template: str = "",
    of_all: shapes.Shapes = shapes.Shapes(),  # noqa: B008 (it is frozen)
) -> Iterator[list[tuple[Request, list[str], np.ndarray | None]]]:
    """Requests with their G answers and, where they have options, float32 [G,O] log-probabilities of these (see
    rollout.Answers); batch by batch, not in their order: a batch has one shape of picks, pixels and text, one of
    options.

    The frames of a batch are read while the one before is being answered. A last batch that is not full is filled up
    with its last request, so that it needs no compilation of its own. `of_all` are the shapes that all requests are
    padded to; `template` is the answerer's own if empty. Several processes must make the same requests: each reads the
    frames of its share, `batch_size` requests at a time, and gets all answers. Raises ShardingError where the mesh
    cannot share a batch evenly, and ValueError for a prompt that is longer than the answerer can read.
    """
    share, num_shares = sharding.data_slice(mesh)
    sharding.check_batch_size(mesh, batch_size * num_shares)

    def write(batch: Sequence[Request], **padding) -> prompts.Prompts:
        texts = [prompts.render(request.text, template or answerer.template, "") for request in batch]
        return prompts.write(texts, [times(request) for request in batch], answerer, shapes.MULTIPLE, **padding)

    def shape(request: Request) -> Shape:
        video, (G, K) = store.video(request.video), request.picks.shape
        size = processor(request).size_of(video.height, video.width)
        ids, lengths, _ = write([request])
        context.check(answerer, ids, lengths, (K, *size), rollout.max_new_tokens)
        slots = of_all.num_frames(K)
        options = None if request.options is None else len(request.options)
        return Shape(G, slots, of_all.num_tokens(slots, int(lengths.max())), size, options)

    def processor(request: Request):
        return answerer.processor.for_frames(request.picks.shape[1])

    def times(request: Request) -> list[FrameTimes]:
        video = store.video(request.video)
        return [FrameTimes.of(video.timestamps[picks], video.duration) for picks in request.picks]

    def read(request: Request, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """The unique frames uint8 [U, ...] and the index [G, slots] into them."""
        missing = slots - request.picks.shape[1]
        frames, index = unique_frames(np.pad(request.picks, ((0, 0), (0, missing)), mode="edge")[None])
        unique, places = np.unique(frames[0], return_inverse=True)
        crop = processor(request).crop
        shown = np.stack([crop(frame) for frame in store.frames(request.video, unique)])
        return np.zeros_like(shown[places]) if request.blank else shown[places], index[0]

    def start(of: Shape, batch: list[Request]) -> Answers:
        rows = np.minimum(np.arange(batch_size) + share * batch_size, len(batch) - 1)  # of this process
        distinct, places = np.unique(rows, return_inverse=True)
        read_them = pool.map(read, [batch[row] for row in distinct], [of.num_frames] * len(distinct))
        frames, index = map(np.stack, zip(*read_them, strict=True))
        ids, lengths, steps = write(batch, at_least=of.num_tokens, num_frames=of.num_frames)
        steps = None if steps is None else steps[rows]
        options = None if of.options is None else np.stack([batch[row].options for row in rows])
        counts = (
            np.repeat([[batch[row].picks.shape[1]] for row in rows], of.num_sets, axis=1) if of_all.frames else None
        )
        shown = frames[places], index[places], ids[rows], lengths[rows], options, steps, counts
        return rollout(answerer.params, *sharding.put_batch(mesh, shown))

    def finish(batch: list[Request], answers: Answers) -> list[tuple[Request, list[str], np.ndarray | None]]:
        parts = answers.tokens, answers.lengths, answers.option_log_probs
        tokens, lengths, scores = jax.device_put(parts, sharding.replicated(mesh))
        texts = prompts.decode(np.asarray(tokens), np.asarray(lengths), answerer.tokenizer)
        scores = [None] * len(batch) if scores is None else np.asarray(scores)
        return list(zip(batch, texts[: len(batch)], scores[: len(batch)], strict=True))

    running = None
    with ThreadPoolExecutor() as pool:
        for of, batch in _batches(requests, shape, batch_size * num_shares):
            started = batch, start(of, batch)
            if running:
                yield finish(*running)
            running = started
    if running:
        yield finish(*running)


class Shape(NamedTuple):
    """Of a request in a batch: its sets, places for frames of each and for tokens of text, pixels, options."""

    num_sets: int
    num_frames: int
    num_tokens: int
    size: tuple[int, int]
    options: int | None


def _batches(
    requests: Iterable[Request], shape: Callable[[Request], Shape], size: int
) -> Iterator[tuple[Shape, list[Request]]]:
    waiting: dict[Shape, list[Request]] = {}
    for request in requests:
        same = waiting.setdefault(of := shape(request), [])
        same.append(request)
        if len(same) == size:
            yield of, waiting.pop(of)
    yield from waiting.items()
