"""Answers of an evaluation on disk, one JSON line each, and what they add up to.

A row is the answer to one question from the frames of one method and budget K:

    id, video, method, k          the question and how its frames were chosen
    candidate_idx, frame_idx      picked candidates, and their frame numbers in the video
    timestamps                    seconds
    answer, letter, correct       what the answerer wrote, the option it names (null: none), whether that is right
    solution, groups              the right letter; grouping -> labels of the question, e.g. {"family": ["lookup"]}
    fps, scores                   of the video; the agent's scores of the picked candidates

Three methods are controls, which tell how much of an answer has other causes than the selection: `permuted` shows the
frames of `uniform` and the options in another order (letters are those of the original order), `random` shows random
frames, `blank` as many black ones.

Two more answer in rounds, from captions (rounds.py): flat and backtrack. They are given no number of frames: k is 0,
and the frames are those that were looked at closely.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from tspo_jax.answering.backtracking import FAILED, PHASES, STRATEGIES
from tspo_jax.evaluation import statistics
from tspo_jax.selection.methods import NAMES, SEARCH

INDEX_FILE = "frame-idx"  # the method of rows whose frames come from an index file
PERMUTED, RANDOM, BLANK = CONTROLS = ("permuted", "random", "blank")
NO_BUDGET = 0  # the k of methods that are given no number of frames
RESAMPLES = 2000
BASELINES = ("uniform", "clip-topk")
PLAIN, CLOSER = "flat", "backtrack"  # strategies: all captions at once, and what closer looks gain over that
ALL = "all"
MACRO = "macro"


class ResultFile:
    """Rows of an evaluation that survive a kill: a batch is written and flushed at once, a line cut off is dropped.

    Of two rows of one key the later counts.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, size = _read(path) if path.exists() else ([], 0)
        self._rows = _by_key(rows)
        self._file = path.open("ab")
        self._file.truncate(size)

    @property
    def rows(self) -> list[dict]:
        return list(self._rows.values())

    def keys(self) -> set[tuple[str, str, int]]:
        """(id, method, k) of every row but of those where nobody answered, who are asked again."""
        return {key for key, row in self._rows.items() if row.get("phase") != FAILED}

    def append(self, rows: Sequence[Mapping]) -> None:
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._rows |= _by_key(rows)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file that may be being written. Raises ValueError naming a line that is none."""
    return list(_by_key(_read(Path(path))[0]).values())


def _read(path: Path) -> tuple[list[dict], int]:
    """The rows of the whole lines, and the size of these in bytes."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid json ({error}); remove the line") from None
        if not isinstance(row, dict) or not row.keys() >= {"id", "video", "method", "k", "correct", "groups"}:
            raise ValueError(f"{path}, line {number}: not a row of an evaluation; remove the line")
        rows.append(row)
    return rows, len(whole)


def _by_key(rows: Iterable[Mapping]) -> dict[tuple[str, str, int], dict]:
    return {(row["id"], row["method"], row["k"]): dict(row) for row in rows}


def summarize(
    rows: Iterable[Mapping],
    trained: Sequence[str],
    seed: int = 0,
    macro: str | None = None,
    beside: Mapping[str, str] | None = None,
) -> dict:
    """Accuracies, and what the trained methods gain over the baselines, each with a 95 % interval clustered by video.

    Args:
      rows: of a `ResultFile`.
      trained: methods that look at the trained agent's scores.
      seed: of the bootstrap.
      macro: grouping whose labels count the same, however many questions they have, in further rows of both lists;
        their grouping is "macro" (MLVU's M-Avg).
      beside: method of the rows of another run's agent -> the method by which it chose (evaluation/beside.py). They
        are compared with the baselines, and are one to the same method of this run.

    Returns:
      num_questions, num_videos;
      accuracy: a list of {method, k, grouping, label, n, accuracy, low, high}, in [0, 1];
      differences: a list of {method, baseline, k, grouping, label, n, difference, low, high, p_value, mcnemar_p,
        inside_noise}, over the questions that both have answered; inside the noise is a difference whose interval
        holds 0, that is below the churn floor, or that Holm's procedure over all differences of the summary does not
        tell from 0;
      rounds: a list as of `by_phase`;
      controls: a list of {k, n, churn, churn_correct, churn_floor, frames_matter, blank}, of what was measured
        (`controls_of`);
      beside: as given;
      all questions have the grouping and label "all".
    """
    beside = dict(beside or {})
    answers: dict[tuple[str, int], dict[str, Mapping]] = {}
    for row in rows:
        answers.setdefault((row["method"], row["k"]), {})[row["id"]] = row
    controls = [row for k in sorted({k for _, k in answers}) if len(row := controls_of(answers, k)) > 1]
    floors = {row["k"]: row.get("churn_floor", 0.0) for row in controls}
    accuracy, differences, p_values = [], [], []
    for (method, k), own in answers.items():
        for where, ids, weights in _groups(own, macro):
            correct, videos = _correct(own, ids)
            estimate = statistics.clustered_mean(correct, videos, seed, RESAMPLES, weights=weights)
            numbers = {"n": len(ids), "accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
            accuracy.append({"method": method, "k": k} | where | numbers)
        baselines = [*BASELINES, *(name for name, of in beside.items() if of == method)]
        if method == CLOSER:
            baselines = [PLAIN]
        for baseline in baselines if method in (*trained, *beside, SEARCH, INDEX_FILE, CLOSER) else ():
            other = answers.get((baseline, k), {})
            for where, ids, weights in _groups({i: row for i, row in own.items() if i in other}, macro):
                a, videos = _correct(own, ids)
                b, _ = _correct(other, ids)
                difference = statistics.paired_difference(a, b, videos, seed, RESAMPLES, weights=weights)
                numbers = {"n": len(ids), "difference": difference.value, "low": difference.low}
                numbers |= {"high": difference.high, "p_value": difference.p_value}
                noise = difference.inside_noise or (where["label"] == ALL and abs(difference.value) <= floors.get(k, 0))
                numbers |= {"mcnemar_p": statistics.mcnemar(a, b), "inside_noise": noise}
                differences.append({"method": method, "baseline": baseline, "k": k} | where | numbers)
                p_values.append(statistics.cluster_t_test(a, b, videos, weights))
    for row, is_sure in zip(differences, statistics.holm(p_values), strict=True):
        row["inside_noise"] = row["inside_noise"] or not is_sure
    order = [*CONTROLS, *beside, *NAMES, INDEX_FILE, *STRATEGIES]
    for table_rows in (accuracy, differences):  # the order of the file's rows, in which they were answered, is no use
        table_rows.sort(
            key=lambda row: (
                row["grouping"] != ALL,
                row["grouping"],
                row["label"],
                row["k"],
                row["method"] in (*trained, *beside),
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
        "rounds": by_phase(everything, seed),
        "controls": controls,
        "beside": beside,
    }


def by_phase(rows: Iterable[Mapping], seed: int = 0) -> list[dict]:
    """How the questions of each strategy ended and what they cost: {method, phase, n, accuracy, low, high, captions,
    writer_calls, writer_tokens, seconds}; costs are means of a question, phase "all" is all of them."""
    rows, found = list(rows), []
    for method in STRATEGIES:
        for phase in (ALL, *PHASES):
            own = [row for row in rows if row["method"] == method and phase in (ALL, row["phase"])]
            if own:
                correct, videos = np.array([row["correct"] for row in own]), [row["video"] for row in own]
                estimate = statistics.clustered_mean(correct, videos, seed, RESAMPLES)
                numbers = {"n": len(own), "accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
                costs = ("captions", "writer_calls", "writer_tokens", "seconds")
                numbers |= {name: round(float(np.mean([row[name] for row in own])), 3) for name in costs}
                found.append({"method": method, "phase": phase} | numbers)
    return found


def controls_of(answers: Mapping[tuple[str, int], Mapping[str, Mapping]], k: int) -> dict:
    """How far answers at budget k depend on the frames, and how far on nothing.

    Args:
      answers: (method, k) -> question id -> row.

    Returns: {"k"} and, each where its rows are there, with shares in [0, 1]:
      churn, churn_correct: questions whose letter, and whose being right, changes with the order of the options alone;
      churn_floor: difference of accuracies that such flips explain (statistics.churn_floor);
      frames_matter: questions whose letter is not the same from all frame sets, of any method, random or blank; the
        others can show no difference between methods (at least two frame sets are needed);
      blank: accuracy without anything to see;
      n: questions that have all of these rows.
    """
    at_k = {method: rows for (method, budget), rows in answers.items() if budget == k}
    found = {"k": k}
    if PERMUTED in at_k and "uniform" in at_k:
        both = [(row, at_k["uniform"][i]) for i, row in at_k[PERMUTED].items() if i in at_k["uniform"]]
        flips = [a["correct"] != b["correct"] for a, b in both]
        if both:
            found["churn"] = float(np.mean([a["letter"] != b["letter"] for a, b in both]))
            found["churn_correct"] = float(np.mean(flips))
            found["churn_floor"] = statistics.churn_floor(np.array(flips), [row["video"] for row, _ in both])
    sets = [rows for method, rows in at_k.items() if method != PERMUTED]
    common = set.intersection(*map(set, sets)) if sets else set()
    if common and {RANDOM, BLANK} & at_k.keys():
        found["frames_matter"] = float(np.mean([len({rows[i]["letter"] for rows in sets}) > 1 for i in common]))
    if at_k.get(BLANK):
        found["blank"] = float(np.mean([row["correct"] for row in at_k[BLANK].values()]))
    return found | ({"n": len(common)} if len(found) > 1 else {})


def _groups(
    answers: Mapping[str, Mapping], macro: str | None
) -> list[tuple[dict[str, str], list[str], np.ndarray | None]]:
    """Of {id: row}: ({"grouping", "label"}, ids, their weights if they differ) of all questions, of each label of each
    grouping, and of all questions with the labels of grouping `macro` weighing the same."""
    groups: dict[tuple[str, str], list[str]] = {(ALL, ALL): list(answers)} if answers else {}
    for question, row in answers.items():
        for grouping, labels in row["groups"].items():
            for label in labels:
                groups.setdefault((grouping, label), []).append(question)
    found = [({"grouping": grouping, "label": label}, ids, None) for (grouping, label), ids in sorted(groups.items())]
    if macro and answers:
        weights = [sum(1 / len(groups[macro, label]) for label in row["groups"][macro]) for row in answers.values()]
        found.append(({"grouping": MACRO, "label": f"mean of {macro}"}, list(answers), np.array(weights)))
    return found


def _correct(answers: Mapping[str, Mapping], ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    return np.array([answers[i]["correct"] for i in ids]), [answers[i]["video"] for i in ids]


def controls_text(controls: Mapping) -> str:
    """One line on what answers depend on at one budget."""
    parts = []
    if "churn" in controls:
        parts.append(
            f"another order of the options changes {100 * controls['churn']:.1f} % of the letters and flips "
            f"{100 * controls['churn_correct']:.1f} % of right and wrong: differences up to "
            f"{100 * controls['churn_floor']:.1f} points are noise"
        )
    if "frames_matter" in controls:
        parts.append(f"the frames matter in {100 * controls['frames_matter']:.1f} % of the questions")
    if "blank" in controls:
        parts.append(f"{100 * controls['blank']:.1f} % are right without any frame")
    return f"K = {controls['k']}: " + "; ".join(parts)


def notes(summary: Mapping) -> list[str]:
    """What to know about the numbers of a summary, a line each: the videos it lacks, its controls, and how questions
    ended that were answered in rounds."""
    lines = [controls_text(controls) for controls in summary["controls"]]
    for row in summary["rounds"]:
        cost = f"{row['captions']:.1f} captions, {row['writer_calls']:.1f} calls of the writer, {row['seconds']:.1f} s"
        lines.append(f"{row['method']}, {row['phase']} ({row['n']}): {accuracy_text(row)} %; a question took {cost}")
    if missing := summary.get("missing_videos"):
        listed = ", ".join(missing[:5])
        lines.insert(0, f"without the questions about {len(missing)} videos that are missing: {listed}")
    return lines


def table(summary: Mapping) -> Table:
    """The summary for the terminal; differences inside the noise are marked `~`."""
    legend = "accuracy in %, differences in points, [95 % interval over videos], ~ inside the noise"
    legend += f" (all differences together: Holm, 5 %); no interval below {statistics.MIN_CLUSTERS} videos"
    out = Table(
        title=f"{summary['num_questions']} questions about {summary['num_videos']} videos",
        caption="\n".join([legend, *_beside_lines(summary), *notes(summary)]),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("questions")
    for heading in ("K", "method", "accuracy", *(f"- {baseline}" for baseline in BASELINES)):
        out.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    gains = {(r["label"], r["grouping"], r["method"], r["baseline"], r["k"]): r for r in summary["differences"]}
    last, n = None, 0
    for row in summary["accuracy"]:
        group = row["label"], row["grouping"]
        if last not in (None, group):
            out.add_section()
        n = n if group == last else row["n"]
        method = row["method"] if row["n"] == n else f"{row['method']} ({row['n']})"
        found = [gains.get((*group, row["method"], baseline, row["k"])) for baseline in BASELINES]
        name = "" if group == last else f"{row['label']} ({row['n']})"
        differences = [difference_text(gain) if gain else "" for gain in found]
        out.add_row(name, str(row["k"] or ""), method, accuracy_text(row), *differences)
        last = group
    return out


def _beside_lines(summary: Mapping) -> list[str]:
    """What this run's agent gains over those of other runs, and closer looks over none, on all questions, a line
    each."""
    return [
        f"{f'K = {k}: ' if (k := row['k']) else ''}{row['method']} - {row['baseline']}: {difference_text(row)}"
        for row in summary["differences"]
        if row["baseline"] in (*summary["beside"], PLAIN) and row["label"] == ALL
    ]


def accuracy_text(row: Mapping) -> str:
    return f"{100 * row['accuracy']:.1f}{_interval(row)}"


def difference_text(row: Mapping) -> str:
    return f"{'~ ' if row['inside_noise'] else ''}{100 * row['difference']:+.1f}{_interval(row)}"


def _interval(row: Mapping) -> str:
    return "" if row["low"] is None else f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
