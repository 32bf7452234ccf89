"""Which frames an evaluation answers its questions from: those of several selection methods, equal ones once."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax import config as config_module
from tspo_jax.answering.grounding import grounder
from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import processes, sharding
from tspo_jax.evaluation import benchmarks, results
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.selection import methods
from tspo_jax.selection.scoring import Scorer, pick, pick_by
from tspo_jax.selection.search_options import SearchOptions
from tspo_jax.selection.searching import Searcher
from tspo_jax.selection.video_source import stored_source

VIDEOS_AT_ONCE = 8  # of each of several processes: what they tell each other waits for the batch that is being answered


@dataclasses.dataclass(frozen=True)
class FrameSet:
    """Frames to answer a question from.

    Attributes:
      item: the question, its options in the order in which they are asked.
      picks: candidate indices, ascending.
      choices: the (method, K) that chose them.
      scores: of the picks, by the agent.
      order: the question's options in terms of the original ones.
      blank: black frames are shown instead.
      searched: what the search that chose them reports, by (method, K).
    """

    item: Item
    picks: tuple[int, ...]
    choices: tuple[tuple[str, int], ...]
    scores: tuple[float, ...]
    order: tuple[int, ...]
    blank: bool = False
    searched: Mapping[tuple[str, int], dict] = dataclasses.field(default_factory=dict)


def search_options(search: config_module.Search, seed: int) -> SearchOptions:
    """Raises ValueError naming what makes no sense."""
    try:
        return SearchOptions(search.schedule, search.grid, search.share, search.threshold, seed)
    except ValueError as error:
        raise ValueError(f"config.evaluation.search: {error}") from None


def make_searcher(config: Config, answerer: Answerer) -> Searcher:
    """Of method tstar; the answerer names objects for questions whose lines do not. The detector is whole on every
    device, which share its pictures."""
    mesh = sharding.make_mesh((("data", -1), ("model", 1)), jax.local_devices())
    search = config.evaluation.search
    detector = load_detector(search.detector, jnp.dtype(config.answerer.dtype), mesh)
    return Searcher(detector, search_options(search, config.seed), ground=grounder(answerer))


def choose(
    items: Sequence[Item],
    store: FrameStore,
    scorer: Scorer,
    todo: Set[tuple[str, str, int]],
    chosen: Mapping[str, tuple[int, ...]],
    seed: int,
    searcher: Searcher | None = None,
) -> Iterator[FrameSet]:
    """The frame sets of the (id, method, k) in `todo`, video by video; `chosen` are those of an index file, and
    `searcher` those of method tstar.

    Several processes share the videos, and each gets all frame sets; all must ask for as many.
    """
    choices: dict[str, list[tuple[str, int]]] = {}
    for item_id, method, k in sorted(todo):
        choices.setdefault(item_id, []).append((method, k))
    asked = [item for item in items if item.id in choices]
    texts = scorer.clip.text_features([item.query for item in asked])
    asked_about: dict[str, list[tuple[Item, np.ndarray]]] = {}
    for item, text in zip(asked, texts, strict=True):
        asked_about.setdefault(item.video, []).append((item, text))

    def of_video(video: str) -> Iterator[list]:
        """[item id, picks, asked as, (method, K)s, scores of the picks, [(method, K), what its search reports]s]."""
        features, source = store.features(video), stored_source(store, video)
        for item, text in asked_about[video]:
            clip_scores, scores = scorer(features, text)
            agreeing: dict[tuple, list[tuple[str, int]]] = {}
            searched = {}
            for method, k in choices[item.id]:
                if method == results.INDEX_FILE:
                    picks = chosen[item.id]
                elif method == results.RANDOM:
                    picks = pick("topk", clip_scores, random_generator(seed, item, k).random(len(scores)), k).tolist()
                elif method in results.CONTROLS:
                    picks = pick("uniform", clip_scores, scores, k).tolist()
                elif method == methods.SEARCH:
                    found = searcher(source, with_options(item), k, item.targets, item.cues)
                    picks, searched[method, k] = found.picks.tolist(), found.searched
                else:
                    picks = pick_by(scorer, method, features, text, (clip_scores, scores), k).tolist()
                asked_as = method if method in (results.PERMUTED, results.BLANK) else ""
                agreeing.setdefault((tuple(picks), asked_as), []).append((method, k))
            for (picks, asked_as), chosen_by in agreeing.items():
                of_picks = scores[list(picks)].tolist()
                yield [item.id, picks, asked_as, chosen_by, of_picks, list(searched.items())]

    by_id, names = {item.id: item for item in asked}, list(asked_about)
    index, count = jax.process_index(), jax.process_count()
    at_once = count * (VIDEOS_AT_ONCE if count > 1 else 1)
    for start in range(0, len(names), at_once):
        part = names[start : start + at_once]
        shares = processes.of_all([list(of_video(video)) for video in part[index::count]])
        for place in range(len(part)):  # in the order of the videos
            for item_id, *found in shares[place % count][place // count]:
                yield _frame_set(by_id[item_id], seed, *found)


def _frame_set(item: Item, seed: int, picks, asked_as: str, chosen_by, scores, searched) -> FrameSet:
    picks, scores, chosen_by = tuple(picks), tuple(scores), tuple(map(tuple, chosen_by))
    if asked_as == results.PERMUTED:
        shuffled = shuffled_order(seed, item)
        return FrameSet(benchmarks.permuted(item, shuffled), picks, chosen_by, scores, shuffled)
    searched = {tuple(choice): report for choice, report in searched}
    order = tuple(range(len(item.options)))
    return FrameSet(item, picks, chosen_by, scores, order, asked_as == results.BLANK, searched)


def with_options(item: Item) -> str:
    """A question and its options, one a line."""
    return "\n".join([item.query, *(f"{benchmarks.LETTERS[i]}. {text}" for i, text in enumerate(item.options))])


def random_generator(seed: int, item: Item, k: int) -> np.random.Generator:
    """Of one question and budget; independent of the order in which questions are answered."""
    digest = hashlib.sha256(f"{item.id} {k}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], np.uint32)])


def shuffled_order(seed: int, item: Item) -> tuple[int, ...]:
    """An order of the options that moves at least one of them."""
    rng, identity = random_generator(seed, item, 0), tuple(range(len(item.options)))
    order = identity
    while order == identity and len(identity) > 1:
        order = tuple(rng.permutation(len(identity)).tolist())
    return order
