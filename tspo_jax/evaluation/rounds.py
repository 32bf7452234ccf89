"""Methods flat and backtrack of an evaluation: questions answered from captions, in rounds (answering/backtracking.py).

Every call is kept in RUN_DIR/evaluation/calls.jsonl: a stopped evaluation goes on there, and the coarse captions of a
video are made once for all its questions and both methods. A row of the results has, beside those of a selection's,

    phase, rounds, periods            how the question ended, and what was looked at closely, in seconds
    captions, writer_calls, writer_tokens, seconds    what it cost, also where another question shared it
    failures                          errors of the models

and as frames the candidates in those periods, none where the coarse captions were enough; its k is 0.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import STRATEGIES, Outcome, Settings
from tspo_jax.answering.own_models import nearest
from tspo_jax.answering.strategies import WriterOptions, answer_questions
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.config import Config, Rounds
from tspo_jax.data.frame_store import FrameStore, VideoEntry
from tspo_jax.evaluation import frame_indices
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.evaluation.results import NO_BUDGET

CALLS = "calls.jsonl"  # in the evaluation's folder


def settings_of(rounds: Rounds) -> Settings:
    """Raises ValueError naming what makes no sense."""
    budgets = {name: getattr(rounds, f"max_{name}") or None for name in ("captions", "writer_calls", "writer_tokens")}
    try:
        return Settings(windows=rounds.windows, rounds=rounds.rounds, **budgets)
    except ValueError as error:
        raise ValueError(f"config.evaluation.rounds: {error}") from None


def answer(
    items: Sequence[Item],
    todo: Iterable[tuple[str, str, int]],
    store: FrameStore,
    answerer: Answerer,
    config: Config,
    mesh: Mesh,
    folder: Path,
) -> Iterator[dict]:
    """Rows of the (id, method, k) in `todo` whose methods are strategies, one after another."""
    rounds, of_id, todo = config.evaluation.rounds, {item.id: item for item in items}, sorted(todo)
    tokens = rounds.max_new_tokens
    writer = WriterOptions(rounds.writer, rounds.writer_model, rounds.writer_context, tokens, rounds.writer_timeout)
    for strategy in STRATEGIES:
        asked = [
            Asked(item.id, item.video, item.query, tuple(item.options))
            for item in (of_id[item_id] for item_id, method, _ in todo if method == strategy)
        ]
        outcomes = answer_questions(
            strategy,
            asked,
            store,
            answerer,
            settings_of(rounds),
            writer,
            mesh,
            captioner=rounds.captioner,
            calls_file=folder / CALLS,
            caption_tokens=tokens,
            batch_size=config.evaluation.batch_size,
            encode_chunk=config.answerer.encode_chunk,
            attention=config.answerer.attention,
            template=config.answerer.template,
        )
        for outcome in outcomes if asked else ():
            yield to_row(of_id[outcome.id], strategy, outcome, store.video(outcome.video))


def to_row(item: Item, method: str, outcome: Outcome, video: VideoEntry) -> dict:
    """The line of rows.jsonl for a question that was answered in rounds."""
    picks = candidates_in(outcome.periods, video.timestamps).tolist()
    return {
        "id": item.id,
        "video": item.video,
        "method": method,
        "k": NO_BUDGET,
        "candidate_idx": picks,
        "frame_idx": video.frame_idx[picks].tolist(),
        "timestamps": [round(t, 3) for t in video.timestamps[picks].tolist()],
        "answer": outcome.answer or "",
        "fps": video.fps,
        "scores": None,
        "letter": outcome.option,
        "solution": item.answer,
        "correct": outcome.option == item.answer,
        "groups": {name: list(labels) for name, labels in item.groups.items()},
        **{name: getattr(outcome, name) for name in ("phase", "rounds", "periods", "captions", "writer_calls")},
        **{name: getattr(outcome, name) for name in ("writer_tokens", "seconds", "failures")},
    }


def candidates_in(periods: Iterable[tuple[float, float]], timestamps: np.ndarray) -> np.ndarray:
    """Indices of the candidates that lie in any of the periods; of one between two candidates, the nearest to it."""
    found = [np.zeros(0, int)]
    for start, end in periods:
        inside = np.flatnonzero((timestamps >= start) & (timestamps <= end))
        found.append(inside if len(inside) else nearest(timestamps, [(start + end) / 2]))
    return np.unique(np.concatenate(found))


def write_periods(folder: Path, rows: Iterable[Mapping]) -> Path | None:
    """FOLDER/periods.jsonl: the frames of the periods that backtrack looked at closely, an index file in the neutral
    form; questions without any are not in it. None where nothing was looked at."""
    versions = frame_indices.our_versions()
    chosen = [
        frame_indices.Selection(
            row["id"],
            row["video"],
            tuple(row["frame_idx"]),
            tuple(row["timestamps"]),
            row["fps"],
            None,
            row["method"],
            versions,
        )
        for row in rows
        if row["method"] == "backtrack" and row["frame_idx"]
    ]
    if not chosen:
        return None
    frame_indices.write_neutral(folder / "periods.jsonl", chosen)
    return folder / "periods.jsonl"
