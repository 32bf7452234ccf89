"""Evidence of questions from what the frozen answerer says of single frames: labels without people (after LSTP).

Every candidate frame (or window of a few) of a question's video is shown to the answerer alone; what the right option
gets there is the frame's score, and the span over which the scores stand out is the question's evidence
(selection/spans.py). It goes into the question file as `evidence`, which policy.warm_start_steps learns from.

Looking coarsely first costs less: every n-th window, then all of those around the span that they give.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.answering.frame_answers import Request, scored_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.frame_store import FrameStore, VideoEntry
from tspo_jax.data.letters import LETTERS, option_letter
from tspo_jax.data.questions import Question
from tspo_jax.data.row_file import RowFile
from tspo_jax.selection import spans

SCORES = ("probability", "correct")


@dataclasses.dataclass(frozen=True)
class Labelling:
    """How frames are shown and scored.

    Attributes:
      window: frames that are shown together.
      coarse: at first only every so many windows; 1 = all at once.
      group: windows of a question that are answered in one piece.
      score: of SCORES: the probability of the right option among the options, or whether the answer names it.
    """

    window: int = 1
    coarse: int = 1
    group: int = 16
    score: str = "probability"

    def __post_init__(self):
        for name in ("window", "coarse", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, not one of {', '.join(SCORES)}")


@dataclasses.dataclass(frozen=True)
class Label:
    """What the answerer says of a question: `scores` float [T] of its candidates; `span` (first, last), None where no
    frames stand out; `evidence` in seconds, as a question file has it."""

    scores: np.ndarray
    span: tuple[int, int] | None
    evidence: tuple[tuple[float, float], ...]


class EvidenceLabels:
    """Labels questions about the videos of a store; what was answered is in a file, and a stopped run goes on.

    Args:
      path: jsonl file of the scores.
      batch_size: groups that are answered at a time.
      template, suffix: of the prompt.
      option_text: how an answer names an option (config.answerer.option_text).
    """

    def __init__(
        self,
        questions: Sequence[Question],
        store: FrameStore,
        answerer: Answerer,
        rollout: Rollout,
        mesh: jax.sharding.Mesh,
        labelling: Labelling,
        path: str | Path,
        *,
        batch_size: int,
        template: str = "",
        suffix: str = prompts.LETTER_SUFFIX,
        option_text: str = "{letter}",
    ):
        self._questions, self._store, self._answerer, self._rollout = questions, store, answerer, rollout
        self._mesh, self._how, self._batch_size, self._template = mesh, labelling, batch_size, template
        self._texts = [f"{question.question}\n{suffix}" if suffix else question.question for question in questions]
        self._options = prompts.option_tokens(questions, option_text, answerer.tokenizer)
        self._file = RowFile(path)

    def cost(self) -> dict[str, int]:
        """What is still to be done: `answers` (of windows; of a coarse run at least, since the fine ones are not known
        yet), `frames` that are encoded, `tokens` that are prefilled, those of groups that are not full included."""
        todo = list(self._requests(self._coarse))
        answers = sum(len(request.id[1]) for request in todo)
        tokens = 0
        for request in todo:
            video = self._store.video(request.video)
            size = self._answerer.processor.for_frames(self._how.window).size_of(video.height, video.width)
            visual = self._answerer.config.num_visual_tokens(self._how.window, *size)
            text = len(self._answerer.tokenizer(request.text)["input_ids"])
            tokens += len(request.picks) * (visual + text)
        return {"answers": answers, "frames": answers * self._how.window, "tokens": tokens}

    def num_answers(self) -> int:
        """Windows that were answered so far, in this run or before."""
        return sum(len(row["windows"]) for row in self._file.rows.values())

    def label(self, advance: Callable[[int], None] = lambda answers: None) -> Iterator[tuple[Question, Label]]:
        """Answers what is missing, then the label of every question in order.

        Args:
          advance: is told how many windows were answered.
        """
        self._answer(self._coarse, advance)
        if self._how.coarse > 1:
            self._answer(self._fine, advance)
        for question in self._questions:
            yield question, self._label(question)

    def _num_windows(self, question: Question) -> int:
        return -(-self._store.video(question.video).num_frames // self._how.window)

    def _coarse(self, question: Question) -> np.ndarray:
        """Windows int that are looked at first: every n-th, from the middle of the first n on."""
        count = self._num_windows(question)
        return np.arange(min(self._how.coarse // 2, count - 1), count, self._how.coarse)

    def _fine(self, question: Question) -> np.ndarray:
        """Those of the span that the coarse ones give, and as far as the next coarse ones beside it."""
        looked_at = self._coarse(question)
        span = spans.evidence_span(self._known(question)[looked_at])
        if span is None:
            return looked_at
        reach = self._how.coarse - 1
        first, last = looked_at[span[0]] - reach, looked_at[span[1]] + reach
        return np.arange(max(0, first), min(self._num_windows(question), last + 1))

    def _known(self, question: Question) -> np.ndarray:
        """Scores float [windows], nan where none is known."""
        scores = np.full(self._num_windows(question), np.nan)
        for row in self._rows_of(question):
            scores[row["windows"]] = row["scores"]
        return scores

    def _rows_of(self, question: Question) -> list[dict]:
        return [row for row in self._file.rows.values() if row["question"] == question.index]

    def _requests(self, windows: Callable[[Question], np.ndarray]) -> Iterator[Request]:
        """Of the windows without a score, `group` at a time, the last of a group repeated where there are fewer."""
        for question in self._questions:
            wanted = windows(question)
            missing = wanted[np.isnan(self._known(question)[wanted])]
            last = self._store.video(question.video).num_frames - 1
            for start in range(0, len(missing), self._how.group):
                part = missing[start : start + self._how.group]
                full = np.pad(part, (0, self._how.group - len(part)), mode="edge")
                picks = full[:, None] * self._how.window + np.arange(self._how.window)
                request = question, part.tolist()
                options = self._options[question.index]
                yield Request(
                    request, question.video, np.minimum(picks, last), self._texts[question.index], options=options
                )

    def _answer(self, windows: Callable[[Question], np.ndarray], advance: Callable[[int], None]) -> None:
        requests = list(self._requests(windows))  # what is known may not change while they are made
        batches = scored_requests(
            requests, self._store, self._answerer, self._rollout, self._mesh, self._batch_size, self._template
        )
        for batch in batches:
            rows = []
            for request, texts, log_probs in batch:
                question, part = request.id
                scores = self._scores(question, texts, log_probs)[: len(part)]
                number = f"{question.index}:{part[0]}:{len(part)}"
                rows.append({"id": number, "question": question.index, "windows": part, "scores": scores})
            self._file.append(rows)
            advance(sum(len(row["windows"]) for row in rows))

    def _scores(self, question: Question, texts: Sequence[str], log_probs: np.ndarray) -> list[float]:
        if self._how.score == "correct":
            return [float(option_letter(text, len(question.options)) == question.answer) for text in texts]
        return np.exp(log_probs[:, LETTERS.index(question.answer)].astype(np.float64)).round(6).tolist()

    def _label(self, question: Question) -> Label:
        video, known = self._store.video(question.video), self._known(question)
        looked_at = np.flatnonzero(~np.isnan(known))
        windows = np.interp(np.arange(len(known)), looked_at, known[looked_at])
        scores = np.repeat(windows, self._how.window)[: video.num_frames]
        span = spans.evidence_span(scores)
        return Label(scores, span, () if span is None else (seconds_of(span, video),))


def seconds_of(span: tuple[int, int], video: VideoEntry) -> tuple[float, float]:
    """When the candidates of a span are on screen: from the first one's time to that of the one after the last."""
    times = video.timestamps
    after = times[span[1] + 1] if span[1] + 1 < len(times) else max(video.duration, times[-1])
    return round(float(times[span[0]]), 3), round(float(after), 3)


def overlap(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Intersection over union of two sets of spans in seconds."""
    edges = np.unique([time for span in (*a, *b) for time in span])
    middles, lengths = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    inside = [np.any([(middles > s) & (middles < e) for s, e in spans_], axis=0) for spans_ in (a, b)]
    union = lengths[inside[0] | inside[1]].sum()
    return float(lengths[inside[0] & inside[1]].sum() / union) if union else 0.0
