"""Evaluation during training: a fixed set of held-out questions, answered from the frames that the agent picks now.

The methods that do not look at the agent are answered once per run. What was answered is in
RUN_DIR/held_out/rows.jsonl (rows of evaluation/results.py, with `step`), and RUN_DIR/report.html shows the newest.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tspo_jax import evaluate, programs, report
from tspo_jax.checkpoints import Answerer, ClipEncoder
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.evaluation import results
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.evaluation.results import ResultFile
from tspo_jax.metrics import read_rows
from tspo_jax.rollout import Rollout
from tspo_jax.scoring import AGENT_METHODS, LENGTH_MULTIPLE, TEMPERATURE, pick

FOLDER = "held_out"  # in the run folder
MAIN = "topk"  # the method whose accuracy says which checkpoint is best


class HeldOut:
    """`measure(step, agent)` answers the questions; with several processes each answers all of them.

    Args:
      clip: for the texts of the questions; it is not kept.
      graphdef: of the agent, and `initial`, its parameters before training.
    Raises: ValueError or OSError for questions that cannot be asked.
    """

    def __init__(self, config: Config, run_dir: Path, clip: ClipEncoder, graphdef: nnx.GraphDef, initial: dict):
        asked = config.evaluation
        if config.held_out.questions:
            asked = dataclasses.replace(asked, questions=config.held_out.questions)
        if MAIN not in asked.methods:
            raise ValueError(
                f"config.evaluation.methods lacks {MAIN}, by which config.held_out names the best checkpoint"
            )
        asked = dataclasses.replace(asked, controls=(), frame_idx="", budgets=asked.budgets[:1])
        self.config = dataclasses.replace(config, evaluation=asked)
        evaluate.check(asked)
        items = evaluate.read_items(self.config)
        places = np.linspace(0, len(items), min(len(items), config.held_out.num_questions), endpoint=False, dtype=int)
        self.items = [items[place] for place in places]
        self.store = FrameStore(asked.store or config.data.store, clip.identity)
        if absent := sorted({item.video for item in self.items if item.video not in self.store}):
            raise ValueError(f"{self.store.folder} lacks {len(absent)} videos of {asked.questions}, e.g. {absent[0]}")
        self._texts = clip.text_features([item.query for item in self.items])
        self._run_dir = run_dir
        content = hashlib.sha256(Path(asked.questions).read_bytes() + str(asked.budgets).encode()).hexdigest()
        self._path = run_dir / FOLDER / f"rows_{content[:8]}.jsonl"  # other questions or budgets, another file
        self._score = jax.jit(partial(programs.score, graphdef))
        self._before = self._scores(initial)

    def measure(
        self, step: int, agent: dict, answerer: Answerer, rollout: Rollout, mesh: jax.sharding.Mesh
    ) -> dict[str, float]:
        """Accuracy of every method after `step` updates; renews the report."""
        (k,) = self.config.evaluation.budgets
        after = self._scores(agent)
        earlier = read_rows(self._path) if self._path.is_file() else []
        lasting = [method for method in self.config.evaluation.methods if method not in AGENT_METHODS]
        asked = {(item.id, method) for item in self.items for method in lasting}
        known = {key: row for row in earlier if (key := (row["id"], row["method"])) in asked}
        sets = []
        for item, (clip_scores, scores) in zip(self.items, after, strict=True):
            choices: dict[tuple[int, ...], list[tuple[str, int]]] = {}
            for method in self.config.evaluation.methods:
                if (item.id, method) not in known:
                    picks = tuple(pick(method, clip_scores, scores, k).tolist())
                    choices.setdefault(picks, []).append((method, k))
            order = tuple(range(len(item.options)))
            for picks, chosen_by in choices.items():
                of_picks = tuple(scores[list(picks)].tolist())
                sets.append(evaluate.FrameSet(item, picks, tuple(chosen_by), of_picks, order))
        answered = self._answer(sets, answerer, rollout, mesh)
        rows = [*known.values(), *answered]
        if jax.process_index() == 0:
            with ResultFile(self._path) as file:
                file.append([row | {"step": step} for row in answered])
            self._report(rows, after)
        correct: dict[str, list[bool]] = {}
        for row in rows:
            correct.setdefault(row["method"], []).append(row["correct"])
        return {method: float(np.mean(values)) for method, values in correct.items()}

    def _scores(self, agent: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """Cosines and logits [T] of each question's candidates."""
        found = []
        for item, text in zip(self.items, self._texts, strict=True):
            features = self.store.features(item.video)
            T = len(features)
            padded = np.pad(features, ((0, -T % LENGTH_MULTIPLE), (0, 0)))
            mask = np.arange(len(padded)) < T
            batch = {"features": padded[None], "text": text[None], "mask": mask[None]}
            logits = np.asarray(self._score(agent, batch, np.float32(TEMPERATURE)))[0, :T]
            norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(text)
            found.append((features @ text / np.maximum(norms, 1e-8), logits))
        return found

    def _answer(
        self, sets: Iterable[evaluate.FrameSet], answerer: Answerer, rollout: Rollout, mesh: jax.sharding.Mesh
    ) -> list[dict]:
        answered = evaluate.answer(sets, self.items, self.store, answerer, self.config, rollout, mesh)
        return [
            row
            for batch in answered
            for frame_set, text in batch
            for row in evaluate.to_rows(frame_set, text, self.store, self.config)
        ]

    def _report(self, rows: list[dict], after: list[tuple[np.ndarray, np.ndarray]]) -> None:
        scores = {
            item.id: (before[1], now[1]) for item, before, now in zip(self.items, self._before, after, strict=True)
        }

        def scores_of(item: Item) -> tuple[np.ndarray, np.ndarray]:
            return scores[item.id]

        summary = results.summarize(rows, AGENT_METHODS, self.config.seed)
        log = read_rows(self._run_dir / "metrics.jsonl")
        report.write_page(self._run_dir, self.config, summary, rows, log, self.items, self.store, scores_of)
