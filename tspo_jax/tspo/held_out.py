"""Evaluation during training: a fixed set of held-out questions, answered from the frames that the agent picks now.

The methods that do not look at the agent are answered once per run. What was answered is in
RUN_DIR/held_out/rows.jsonl (rows of evaluation/results.py, with `step`), and RUN_DIR/report.html shows the newest.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer, ClipEncoder
from tspo_jax.config import Config
from tspo_jax.data import overlap
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import Question
from tspo_jax.devices import sharding
from tspo_jax.evaluation import results
from tspo_jax.evaluation import run as evaluate
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.evaluation.frame_sets import FrameSet
from tspo_jax.evaluation.results import ResultFile
from tspo_jax.runs.metrics import read_rows
from tspo_jax.selection.methods import METHODS
from tspo_jax.selection.scoring import AGENT_METHODS, LENGTH_MULTIPLE, TEMPERATURE, pick
from tspo_jax.tspo import programs

FOLDER = "held_out"  # in the run folder
MAIN = "topk"  # the method whose accuracy says which checkpoint is best
UNKNOWN = -1  # not answered yet, else 0 (wrong) or 1 (right)


class HeldOut:
    """`measure(step, agent)` answers the questions; several processes share them, and each gets the result.

    Args:
      clip: for the texts of the questions; it is not kept.
      graphdef: of the agent, and `initial`, its parameters before training.
      mesh: that the answerer will be on.
      write_page: pages.report.write_page, or what else shows the newest answers.
    Raises: ValueError or OSError for questions that cannot be asked, or a batch that the mesh cannot share.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        clip: ClipEncoder,
        graphdef: nnx.GraphDef,
        initial: dict,
        mesh: jax.sharding.Mesh,
        write_page: Callable[..., object],
    ):
        asked = config.evaluation
        if config.held_out.questions:
            asked = dataclasses.replace(asked, questions=config.held_out.questions)
        if MAIN not in asked.methods:
            raise ValueError(
                f"config.evaluation.methods lacks {MAIN}, by which config.held_out names the best checkpoint"
            )
        scoring = tuple(method for method in asked.methods if method in METHODS)  # a search would take too long
        asked = dataclasses.replace(asked, methods=scoring, controls=(), frame_idx="", budgets=asked.budgets[:1])
        self.config = dataclasses.replace(config, evaluation=asked)
        evaluate.check(asked)
        of_all = asked.batch_size * sharding.data_slice(mesh)[1]
        sharding.check_batch_size(mesh, of_all, "evaluation.batch_size, over all processes,")
        self._asked = items = evaluate.read_items(self.config)
        places = np.linspace(0, len(items), min(len(items), config.held_out.num_questions), endpoint=False, dtype=int)
        self.items = [items[place] for place in places]
        self.store = FrameStore(asked.store or config.data.store, clip.identity)
        videos = sorted({item.video for item in self.items})
        if absent := [video for video in videos if not self.store.has_features(video)]:
            lacks = f"lacks {len(absent)} videos of {asked.questions}, e.g. {absent[0]}, or their features"
            raise ValueError(f"{self.store.folder} {lacks}; run python -m tspo_jax.predecode")
        self._texts = clip.text_features([item.query for item in self.items])
        self._run_dir, self._mesh, self._write_page = run_dir, mesh, write_page
        asked_by = (asked.budgets, asked.benchmark, asked.protocol, self.store.features_sha256(videos))
        content = hashlib.sha256(Path(asked.questions).read_bytes() + str(asked_by).encode()).hexdigest()
        self.setting = f"{content} {len(self.items)} {self.store.clip_identity} {MAIN}"  # of the scores
        self._path = run_dir / FOLDER / f"rows_{content[:8]}.jsonl"  # otherwise asked, another file
        self._score = jax.jit(partial(programs.score, graphdef))
        self._before = self._scores(initial)

    def shared_with(self, questions: Iterable[Question]) -> list[str]:
        """What of the whole held-out file is trained on as well (data/overlap.py)."""
        return overlap.shared(*([(one.video, one.query) for one in asked] for asked in (questions, self._asked)))

    def measure(self, step: int, agent: dict, answerer: Answerer, rollout: Rollout) -> dict[str, float]:
        """Accuracy of every method after `step` updates; renews the report."""
        (k,) = self.config.evaluation.budgets
        methods = self.config.evaluation.methods
        after = self._scores(agent)
        earlier, correct = self._known()
        sets = []
        for item, (clip_scores, scores), known in zip(self.items, after, correct, strict=True):
            choices: dict[tuple[int, ...], list[tuple[str, int]]] = {}
            for j in np.flatnonzero(known == UNKNOWN):
                method = methods[j]
                picks = tuple(pick(method, clip_scores, scores, k).tolist())
                choices.setdefault(picks, []).append((method, k))
            order = tuple(range(len(item.options)))
            for picks, chosen_by in choices.items():
                of_picks = tuple(scores[list(picks)].tolist())
                sets.append(FrameSet(item, picks, tuple(chosen_by), of_picks, order))
        answered = self._answer(sets, answerer, rollout)
        number = {item.id: i for i, item in enumerate(self.items)}
        for row in answered:
            correct[number[row["id"]], methods.index(row["method"])] = row["correct"]
        if jax.process_index() == 0:
            with ResultFile(self._path) as file:
                file.append([row | {"step": step} for row in answered])
            self._report([*earlier, *answered], after)
        return dict(zip(methods, correct.mean(axis=0).tolist(), strict=True))

    def _known(self) -> tuple[list[dict], np.ndarray]:
        """The rows of earlier steps that still hold, in the first process; and in each, int8 [questions, methods]:
        whether they are correct, UNKNOWN where there is none."""
        methods, rows = self.config.evaluation.methods, {}
        places = {
            (item.id, method): (i, j)
            for i, item in enumerate(self.items)
            for j, method in enumerate(methods)
            if method not in AGENT_METHODS
        }
        if jax.process_index() == 0 and self._path.is_file():
            rows = {key: row for row in read_rows(self._path) if (key := (row["id"], row["method"])) in places}
        correct = np.full((len(self.items), len(methods)), UNKNOWN, np.int8)
        for key, row in rows.items():
            correct[places[key]] = row["correct"]
        # Not read by each: what one process has just written may not be visible to another one yet.
        return list(rows.values()), multihost_utils.broadcast_one_to_all(correct).copy()

    def _scores(self, agent: dict) -> list[np.ndarray]:
        """Cosines and logits, float32 [2, T], of each question's candidates; every process computes its share."""
        agent = jax.tree.map(lambda x: x.addressable_data(0), agent)
        lengths = [self.store.video(item.video).num_frames for item in self.items]
        index, count = jax.process_index(), jax.process_count()
        share = np.zeros((-(-len(self.items) // count), 2, max(lengths)), np.float32)
        for scores, item, text in zip(share, self.items[index::count], self._texts[index::count], strict=False):
            features = self.store.features(item.video)
            T = len(features)
            padded = np.pad(features, ((0, -T % LENGTH_MULTIPLE), (0, 0)))
            mask = np.arange(len(padded)) < T
            batch = {"features": padded[None], "text": text[None], "mask": mask[None]}
            norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(text)
            scores[0, :T] = features @ text / np.maximum(norms, 1e-8)
            scores[1, :T] = np.asarray(self._score(agent, batch, np.float32(TEMPERATURE)))[0, :T]
        joined = multihost_utils.process_allgather(share).swapaxes(0, 1).reshape(-1, *share.shape[1:])
        return [scores[:, :T] for scores, T in zip(joined, lengths, strict=False)]

    def _answer(self, sets: Iterable[FrameSet], answerer: Answerer, rollout: Rollout) -> list[dict]:
        answered = evaluate.answer(sets, self.items, self.store, answerer, self.config, rollout, self._mesh)
        return [
            row
            for batch in answered
            for frame_set, text in batch
            for row in evaluate.to_rows(frame_set, text, self.store, self.config)
        ]

    def _report(self, rows: list[dict], after: list[np.ndarray]) -> None:
        scores = {
            item.id: (before[1], now[1]) for item, before, now in zip(self.items, self._before, after, strict=True)
        }

        def scores_of(item: Item) -> tuple[np.ndarray, np.ndarray]:
            return scores[item.id]

        summary = results.summarize(rows, AGENT_METHODS, self.config.seed)
        log = read_rows(self._run_dir / "metrics.jsonl")
        self._write_page(self._run_dir, self.config, summary, rows, log, self.items, self.store, scores_of)
