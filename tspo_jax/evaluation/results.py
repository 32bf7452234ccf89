"""Answers of an evaluation on disk, one JSON line each, and what they add up to.

A row is the answer to one question from the frames of one method and budget K:

    id, video, method, k          the question and how its frames were chosen
    candidate_idx, frame_idx      picked candidates, and their frame numbers in the video
    timestamps                    seconds
    answer, letter, correct       what the answerer wrote, the option it names (null: none), whether that is right
    solution, groups              the right letter; grouping -> labels of the question, e.g. {"family": ["lookup"]}
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from tspo_jax.evaluation import statistics
from tspo_jax.selection import METHODS

RESAMPLES = 2000
BASELINES = ("uniform", "clip-topk")
ALL = "all"


class ResultFile:
    """Rows of an evaluation that survive a kill: a batch is written and flushed at once, a line cut off is dropped.

    Attributes:
      rows: all that are in the file.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.rows = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid json ({error}); remove the line") from None
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def keys(self) -> set[tuple[str, str, int]]:
        """(id, method, k) of every row."""
        return {(row["id"], row["method"], row["k"]) for row in self.rows}

    def append(self, rows: Sequence[Mapping]) -> None:
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += rows

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def summarize(rows: Iterable[Mapping], trained: Sequence[str], seed: int = 0) -> dict:
    """Accuracies, and what the trained methods gain over the baselines, each with a 95 % interval clustered by video.

    Args:
      rows: of a `ResultFile`.
      trained: methods that look at the trained agent's scores.
      seed: of the bootstrap.

    Returns:
      num_questions, num_videos;
      accuracy: a list of {method, k, grouping, label, n, accuracy, low, high}, in [0, 1];
      differences: a list of {method, baseline, k, grouping, label, n, difference, low, high, p_value, mcnemar_p,
        inside_noise}, over the questions that both have answered;
      all questions have the grouping and label "all".
    """
    answers: dict[tuple[str, int], dict[str, Mapping]] = {}
    for row in rows:
        answers.setdefault((row["method"], row["k"]), {})[row["id"]] = row
    accuracy, differences = [], []
    for (method, k), own in answers.items():
        for where, ids in _groups(own):
            correct, videos = _correct(own, ids)
            estimate = statistics.clustered_mean(correct, videos, seed, RESAMPLES)
            numbers = {"n": len(ids), "accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
            accuracy.append({"method": method, "k": k} | where | numbers)
        for baseline in BASELINES if method in trained else ():
            other = answers.get((baseline, k), {})
            for where, ids in _groups({i: row for i, row in own.items() if i in other}):
                a, videos = _correct(own, ids)
                b, _ = _correct(other, ids)
                difference = statistics.paired_difference(a, b, videos, seed, RESAMPLES)
                numbers = {"n": len(ids), "difference": difference.value, "low": difference.low}
                numbers |= {"high": difference.high, "p_value": difference.p_value}
                numbers |= {"mcnemar_p": statistics.mcnemar(a, b), "inside_noise": difference.inside_noise}
                differences.append({"method": method, "baseline": baseline, "k": k} | where | numbers)
    order = list(METHODS)
    for table_rows in (accuracy, differences):  # the order of the file's rows, in which they were answered, is no use
        table_rows.sort(
            key=lambda row: (
                row["grouping"] != ALL,
                row["grouping"],
                row["label"],
                row["k"],
                row["method"] in trained,
                order.index(row["method"]),
                row.get("baseline", ""),
            )  # fmt: skip
        )
    everything = [row for own in answers.values() for row in own.values()]
    return {
        "num_questions": len({row["id"] for row in everything}),
        "num_videos": len({row["video"] for row in everything}),
        "accuracy": accuracy,
        "differences": differences,
    }


def _groups(answers: Mapping[str, Mapping]) -> list[tuple[dict[str, str], list[str]]]:
    """Of {id: row}: ({"grouping", "label"}, ids) of all questions and of each label of each grouping."""
    groups: dict[tuple[str, str], list[str]] = {(ALL, ALL): list(answers)} if answers else {}
    for question, row in answers.items():
        for grouping, labels in row["groups"].items():
            for label in labels:
                groups.setdefault((grouping, label), []).append(question)
    return [({"grouping": grouping, "label": label}, ids) for (grouping, label), ids in sorted(groups.items())]


def _correct(answers: Mapping[str, Mapping], ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    return np.array([answers[i]["correct"] for i in ids]), [answers[i]["video"] for i in ids]


def table(summary: Mapping) -> Table:
    """The summary for the terminal; differences inside the noise are marked `~`."""
    out = Table(
        title=f"{summary['num_questions']} questions about {summary['num_videos']} videos",
        caption="accuracy in %, differences in points, [95 % interval over videos], ~ inside the noise",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("questions")
    for heading in ("K", "method", "accuracy", *(f"- {baseline}" for baseline in BASELINES)):
        out.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    gains = {(r["label"], r["grouping"], r["method"], r["baseline"], r["k"]): r for r in summary["differences"]}
    last = None
    for row in summary["accuracy"]:
        group = row["label"], row["grouping"]
        if last not in (None, group):
            out.add_section()
        found = [gains.get((*group, row["method"], baseline, row["k"])) for baseline in BASELINES]
        name = "" if group == last else f"{row['label']} ({row['n']})"
        differences = [difference_text(gain) if gain else "" for gain in found]
        out.add_row(name, str(row["k"]), row["method"], accuracy_text(row), *differences)
        last = group
    return out


def accuracy_text(row: Mapping) -> str:
    return f"{100 * row['accuracy']:.1f}{_interval(row)}"


def difference_text(row: Mapping) -> str:
    return f"{'~ ' if row['inside_noise'] else ''}{100 * row['difference']:+.1f}{_interval(row)}"


def _interval(row: Mapping) -> str:
    return "" if row["low"] is None else f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
