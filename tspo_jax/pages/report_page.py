"""The report as one HTML page: pure functions from numbers and pictures to text. No network, no script, no files.

The page is well-formed XML after its doctype, so that a test can parse it. Its look is in templates/report.html and
static/style.css.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tspo_jax.data.letters import LETTERS
from tspo_jax.evaluation.results import difference_text, notes
from tspo_jax.pages import charts, templates


@dataclass(frozen=True)
class Choice:
    """What a method showed to the answerer.

    Attributes:
      method: name for the reader.
      colour: CSS class: the method's own name.
      times: seconds of the frames [K].
      frames: uint8 pictures [K] of [H, W, 3].
      answer: as written; correct: whether it is right. None where it was not asked for, or is not known.
    """

    method: str
    colour: str
    times: Sequence[float]
    frames: Sequence[np.ndarray]
    answer: str | None
    correct: bool | None

    def moments(self) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds, picture) of each frame."""
        return zip(self.times, self.frames, strict=True)


@dataclass(frozen=True)
class Example:
    """A held-out question.

    Attributes:
      family, query, options, answer: the question, its option texts and the right letter; "" where there is none.
      video, duration: name and seconds.
      evidence: spans [(start, end)] in seconds.
      times: of the candidates, seconds [T].
      before, after: scores of the candidates by the untrained and the trained agent [T], or what `curves` says; None
        has no curve.
      choices: of the methods.
      curves: (name, colour) of the two.
    """

    family: str
    query: str
    options: Sequence[str]
    answer: str
    video: str
    duration: float
    evidence: Sequence[tuple[float, float]]
    times: np.ndarray
    before: np.ndarray | None
    after: np.ndarray | None
    choices: Sequence[Choice]
    curves: Sequence[tuple[str, str]] = (("scores before training", "before"), ("after", "after"))

    def lettered(self) -> Iterator[tuple[str, str]]:
        """(letter, text) of each option."""
        return zip(LETTERS, self.options, strict=False)

    def is_evidence(self, seconds: float) -> bool:
        return any(start <= seconds <= end for start, end in self.evidence)

    def chart(self) -> charts.Chart:
        """The scores over the video and where each method picked."""
        drawn = zip(self.curves, (self.before, self.after), strict=True)
        return charts.over_time(
            f"Scores over time: {self.query}",
            self.times,
            self.duration,
            [(*curve, scores) for curve, scores in drawn if scores is not None],
            [(choice.method, choice.colour, choice.times) for choice in self.choices],
            self.evidence,
        )


def page(
    title: str,
    facts: Mapping[str, str],
    curves: Mapping[str, Sequence[charts.Curve]],
    summary: Mapping,
    names: Mapping[str, str],
    examples: Sequence[Example],
) -> str:
    """The page.

    Args:
      title: of the page.
      facts: what was run, name -> value.
      curves: chart title -> curves; empty where nothing was trained.
      summary: of results.summarize.
      names: method -> its name for the reader, in the order of the table.
      examples: held-out questions.
    """
    return templates.render(
        "report.html",
        title=title,
        facts=facts,
        summary=summary,
        names=names,
        notes=notes(summary),
        tables=[_table(summary, names, k) for k in sorted({row["k"] for row in summary["accuracy"]})],
        charts=[charts.over_steps(name, lines) for name, lines in curves.items()],
        examples=examples,
    )


def _table(summary: Mapping, names: Mapping[str, str], k: int) -> dict:
    """The numbers at one budget: a line for each label of each grouping, an entry for each method and each pair."""
    accuracy = [row for row in summary["accuracy"] if row["k"] == k]
    gains = [row for row in summary["differences"] if row["k"] == k]
    methods = [method for method in names if any(row["method"] == method for row in accuracy)]
    pairs = list(dict.fromkeys((row["method"], row["baseline"]) for row in gains))
    lines = []
    for grouping, label in dict.fromkeys((row["grouping"], row["label"]) for row in accuracy):
        here = {row["method"]: row for row in accuracy if (row["grouping"], row["label"]) == (grouping, label)}
        gained = {
            (row["method"], row["baseline"]): row | {"text": difference_text(row).removeprefix("~ ")}
            for row in gains
            if (row["grouping"], row["label"]) == (grouping, label)
        }
        lines.append(
            {
                "label": label,
                "n": max(row["n"] for row in here.values()),
                "accuracies": [here.get(method) for method in methods],
                "gains": [gained.get(pair) for pair in pairs],
            }
        )
    return {"k": k, "methods": methods, "pairs": pairs, "lines": lines}
