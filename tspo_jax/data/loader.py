"""Batches of questions with the features of their candidate frames, in a few static shapes, and the picked frames.

A batch holds questions of one kind whose candidates fit one bucket of T. What batch number n is depends on the
questions, the store, the configuration and the seed alone, not on workers: resuming is starting at n.

Grain reads and prefetches; its order is the one of its documentation: shuffle, repeat, slice per process, map, batch,
and a mixture over the (kind, bucket) groups. Nothing here uses jax, so that worker processes leave the devices alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import grain
import numpy as np

from tspo_jax.data.frame_store import READ_TOGETHER, FrameStore, StoreError, decode_jpeg
from tspo_jax.data.needle import Composition, NeedleConfig, compose
from tspo_jax.data.questions import Question

_SHOWN = 10  # problems in one message
_CHECKED_AT_ONCE = 32  # videos, before training: from a bucket, each costs several round trips
Batch = dict[str, object]


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What batches look like.

    Attributes:
      batch_size: questions per batch over all processes.
      picks: K by kind: frames to pick, for which a sample must have enough candidates.
      buckets: the sizes that T is padded to.
      min_frames, max_frames: as in the original, a video with fewer or more candidates than this is represented by
        max_frames evenly spaced ones; in a short video some then repeat. min_frames=0 keeps short videos as they are.
      needle: sizes of `specific` samples.
      mixture: share of batches by kind; None = in proportion to the questions.
      num_workers: processes that load ahead; 0 = threads of this one.
    """

    batch_size: int
    picks: Mapping[str, int]
    buckets: Sequence[int] = (128, 832)
    min_frames: int = 50
    max_frames: int = 128
    needle: NeedleConfig = dataclasses.field(default_factory=NeedleConfig)
    mixture: Mapping[str, float] | None = None
    num_workers: int = 0


def candidate_frames(num_stored: int, min_frames: int, max_frames: int) -> np.ndarray:
    """Numbers of the stored frames that represent a video, int64 ascending (see LoaderConfig)."""
    if min_frames <= num_stored <= max_frames:
        return np.arange(num_stored)
    return np.linspace(0, num_stored - 1, max_frames, dtype=np.int64)


class Loader(Iterator[Batch]):
    """Endless batches of this process: B rows with T candidates each. A context manager that ends its threads.

    `repeated` has one line for each group of questions that is smaller than a batch.

    A batch has `kind` (str), `k` (int), `index` int32 [B] (question), `copy` int32 [B] (tells rows of a batch with the
    same question apart), `features` float32 [B,T,D] (zero where padded),
    `mask` bool [B,T] (padding on the right), `needle_mask` bool [B,T] (frame of the target; all False in `general`),
    `video` int32 [B,T] (position in `names`) and `frame` int32 [B,T] (stored frame), both -1 where padded, and the
    rows of the per-question arrays.

    Args:
      store: opened with the identity of the CLIP checkpoint.
      per_question: arrays whose rows belong to the questions, e.g. text_features [Q,D].
      process_index, process_count: B is batch_size / process_count; together the processes see every row once.

    Raises StoreError for questions whose video or features are not in the store, ValueError for too few candidates for
    K, a T that no bucket holds, and a batch size that the processes cannot share.
    """

    def __init__(
        self,
        store: FrameStore,
        questions: Sequence[Question],
        config: LoaderConfig,
        seed: int,
        per_question: Mapping[str, np.ndarray] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if config.batch_size % process_count:
            raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {process_count} processes")
        samples = _Samples(store, questions, per_question or {}, config, seed)
        groups = samples.groups()
        weights = _weights({group: len(rows) for group, rows in groups.items()}, config.mixture)
        datasets = [
            grain.MapDataset.source(rows)
            .seed((seed + number) % 2**32)
            .shuffle()
            .repeat()
            .map_with_index(_Sample(samples, kind, bucket, len(rows)))[process_index::process_count]
            .batch(config.batch_size // process_count, drop_remainder=True, batch_fn=_stack)
            for number, ((kind, bucket), rows) in enumerate(groups.items())
        ]
        self.names = tuple(samples.names)
        self.repeated = [
            f"{len(rows)} {kind} questions (with up to {bucket} candidates) are fewer than a batch of "
            f"{config.batch_size}: a batch holds some of them several times, each with other draws"
            for ((kind, bucket), rows), weight in zip(groups.items(), weights, strict=True)
            if weight > 0 and len(rows) < config.batch_size
        ]
        used = [(dataset, weight) for dataset, weight in zip(datasets, weights, strict=True) if weight > 0]
        self._parts, self._weights = zip(*used, strict=True)
        self._dataset = grain.MapDataset.mix(self._parts, self._weights)
        self._num_workers = config.num_workers
        self._next = 0
        self._iterator = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._reading())
        batch = next(self._iterator)
        self._next += 1
        return batch

    def examples(self) -> list[tuple[float, Batch]]:
        """The first batch of every kind and bucket, with its share of all batches."""
        total = sum(self._weights)
        return [(weight / total, part[0]) for part, weight in zip(self._parts, self._weights, strict=True)]

    def get_state(self) -> dict[str, int]:
        """What a checkpoint must hold: the number of the next batch."""
        return {"next_batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on where a loader of the same questions, store, configuration and seed was; workers may differ."""
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Ends threads and processes that load ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _reading(self) -> grain.IterDataset:
        rest = self._dataset[self._next :]
        if not self._num_workers:
            return rest.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
        one_at_a_time = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
        return rest.to_iter_dataset(one_at_a_time).mp_prefetch(options)


class _Samples:
    """Makes the sample of a question; travels to worker processes by pickle."""

    def __init__(self, store, questions, per_question, config: LoaderConfig, seed: int):
        for name, rows in per_question.items():
            if len(rows) != len(questions):
                raise ValueError(f"{name} has {len(rows)} rows for {len(questions)} questions")
        self.store, self.questions, self.per_question = store, questions, per_question
        self.config, self.seed = config, seed
        self.names = sorted({question.video for question in questions})
        self.video = {name: i for i, name in enumerate(self.names)}
        source = {question.video: question.source for question in reversed(questions)}

        def check(name: str) -> tuple[int, str]:
            """Stored frames of a video, and what is wrong with it."""
            try:
                length = store.video(name).num_frames
                if store.has_features(name):
                    return length, ""
                return length, f"the features of {name} are missing or of older frames; run predecode with --clip"
            except StoreError as error:
                return 0, str(error)

        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
            checked = list(pool.map(check, self.names))
        self.lengths = np.array([length for length, _ in checked], np.int64)
        found = zip(self.names, checked, strict=True)
        if problems := [f"{source[name]}: video: {problem}" for name, (_, problem) in found if problem]:
            more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise StoreError(f"{len(problems)} video(s) are not ready\n" + "\n".join(problems[:_SHOWN]) + more)

    def groups(self) -> dict[tuple[str, int], np.ndarray]:
        """Positions of the questions by kind and bucket."""
        groups: dict[tuple[str, int], list[int]] = {}
        for position, question in enumerate(self.questions):
            groups.setdefault((question.kind, self._bucket(question)), []).append(position)
        return {group: np.array(groups[group]) for group in sorted(groups)}

    def candidates(self, question: Question) -> np.ndarray:
        length = self.lengths[self.video[question.video]]
        return candidate_frames(length, self.config.min_frames, self.config.max_frames)

    def composition(self, question: Question, draw: int) -> Composition:
        candidates, target = self.candidates(question), self.video[question.video]
        if question.kind == "specific":
            return compose(self.seed, draw, target, candidates, self.lengths, self.config.needle)
        size = len(candidates)
        return Composition(np.full(size, target, np.int32), candidates.astype(np.int32), np.zeros(size, bool))

    def _bucket(self, question: Question) -> int:
        """The bucket of all samples of a question, however many groups a needle sample draws."""
        needle, k = self.config.needle, self.config.picks[question.kind]
        fewest = most = len(self.candidates(question))
        if question.kind == "specific":
            fewest = needle.group_frames * (needle.min_true_groups + needle.distractor_groups)
            most = needle.max_frames
        where = f"{question.source}: {question.kind} question about {question.video}"
        if k > fewest:
            raise ValueError(f"{where}: {k} frames are to be picked, but there may be only {fewest} candidates")
        fitting = [bucket for bucket in self.config.buckets if bucket >= most]
        if not fitting:
            sizes = ", ".join(map(str, self.config.buckets))
            raise ValueError(f"{where}: has up to {most} candidates, more than the largest of the buckets ({sizes})")
        return min(fitting)


class _Sample:
    """The map of one (kind, bucket) group: (number of the draw, position of the question) -> one row of a batch."""

    def __init__(self, samples: _Samples, kind: str, bucket: int, num_questions: int):
        self.samples, self.kind, self.bucket, self.num_questions = samples, kind, bucket, num_questions

    def __call__(self, draw: int, position: int) -> Batch:
        samples, position, batch_size = self.samples, int(position), self.samples.config.batch_size
        question = samples.questions[position]
        refs = samples.composition(question, draw)
        padding = (0, self.bucket - len(refs.video))
        return {
            "kind": self.kind,
            "k": samples.config.picks[self.kind],
            "index": np.int32(question.index),
            # The same question comes again in another epoch: how many began since this batch did.
            "copy": np.int32(draw // self.num_questions - draw // batch_size * batch_size // self.num_questions),
            "features": self._features(refs),
            "mask": np.arange(self.bucket) < len(refs.video),
            "needle_mask": np.pad(refs.mask, padding),
            "video": np.pad(refs.video, padding, constant_values=-1),
            "frame": np.pad(refs.frame, padding, constant_values=-1),
            **{name: rows[position] for name, rows in samples.per_question.items()},
        }

    def _features(self, refs: Composition) -> np.ndarray:
        """float32 [bucket, D]; every video is read once."""
        features = None
        for video in np.unique(refs.video):
            places = np.flatnonzero(refs.video == video)
            rows = self.samples.store.features(self.samples.names[video], refs.frame[places])
            features = np.zeros((self.bucket, rows.shape[1]), np.float32) if features is None else features
            features[places] = rows
        return features


def _stack(rows: Sequence[Batch]) -> Batch:
    first = rows[0]
    return {name: first[name] if name in ("kind", "k") else np.stack([r[name] for r in rows]) for name in first}


def _weights(counts: Mapping[tuple[str, int], int], mixture: Mapping[str, float] | None) -> list[float]:
    """Share of batches of every group: by its questions, or within its kind's share of the mixture."""
    if mixture is None:
        return [float(count) for count in counts.values()]
    of_kind = {kind: sum(count for (k, _), count in counts.items() if k == kind) for kind, _ in counts}
    if set(mixture) - set(of_kind) or sum(mixture.values()) <= 0 or min(mixture.values()) < 0:
        raise ValueError(
            f"shares of batches {dict(mixture)}: they must not be negative, and of kinds that the questions have: "
            f"{', '.join(sorted(of_kind))}"
        )
    return [mixture.get(kind, 0.0) * count / of_kind[kind] for (kind, _), count in counts.items()]


def fetch_frames(
    store: FrameStore,
    names: Sequence[str],
    video: np.ndarray,
    frame: np.ndarray,
    resize: Callable[[np.ndarray], np.ndarray],
    pool: Executor,
) -> np.ndarray:
    """Pictures of (video, frame) pairs: uint8 [B,U,S,S,3]; a pair is read once however often it is asked for.

    Args:
      names: what the video numbers mean (Loader.names).
      video, frame: int [B,U], a batch's references at the picked candidates.
      resize: uint8 [H,W,3] -> uint8 [S,S,3], run by the threads of `pool` after the JPEG decoder.
    """
    if video.min() < 0:
        raise ValueError("a padded frame was picked")
    places: dict[tuple[int, int], list[int]] = {}
    for place, pair in enumerate(zip(video.ravel().tolist(), frame.ravel().tolist(), strict=True)):
        places.setdefault(pair, []).append(place)

    first, *others = sorted(places)
    picture = resize(decode_jpeg(next(store.jpegs(names[first[0]], first[1:]))))
    frames = np.empty((video.size, *picture.shape), np.uint8)
    frames[places[first]] = picture

    def read_into_place(pairs: list[tuple[int, int]]) -> None:
        jpegs = store.jpegs(names[pairs[0][0]], [number for _, number in pairs])
        for pair, jpeg in zip(pairs, jpegs, strict=True):
            frames[places[pair]] = resize(decode_jpeg(jpeg))

    of_videos = [list(pairs) for _, pairs in itertools.groupby(others, key=lambda pair: pair[0])]
    together = [pairs[i : i + READ_TOGETHER] for pairs in of_videos for i in range(0, len(pairs), READ_TOGETHER)]
    for _ in pool.map(read_into_place, together):  # raises what a thread raised
        pass
    return frames.reshape(*video.shape, *picture.shape)
