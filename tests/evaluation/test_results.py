"""Rows that survive a kill, and their sums."""

import io
import json

import pytest
from rich.console import Console

from tspo_jax.evaluation.results import ResultFile, read_rows, summarize, table


def row(question, method, correct, k=8, family="lookup", video=None):
    return {
        "id": str(question), "video": video or f"v{question}", "method": method, "k": k, "correct": correct,
        "groups": {"family": [family]},
    }  # fmt: skip


def test_rows_are_there_after_reopening(tmp_path):
    with ResultFile(tmp_path / "new" / "rows.jsonl") as file:
        file.append([row(0, "uniform", True), row(0, "topk", False)])
        file.append([row(1, "topk", False)])
    with ResultFile(tmp_path / "new" / "rows.jsonl") as file:
        assert file.keys() == {("0", "uniform", 8), ("0", "topk", 8), ("1", "topk", 8)}
        assert len(file.rows) == 3


def test_a_line_cut_in_the_middle_is_written_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(0, "topk", True)) + "\n" + json.dumps(row(1, "topk", True))[:30])
    with ResultFile(path) as file:
        assert file.keys() == {("0", "topk", 8)}
        file.append([row(1, "topk", False)])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["0", "1"]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "0"\n{}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 1: not valid json"):
        ResultFile(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"id": "0"}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 1: not a row of an evaluation"):
        ResultFile(tmp_path / "rows.jsonl")


def test_reading_changes_nothing(tmp_path):
    """A report made while an evaluation writes: the line that is half written stays."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text := json.dumps(row(0, "topk", True)) + "\n" + json.dumps(row(1, "topk", True))[:30])
    assert [found["id"] for found in read_rows(path)] == ["0"] and path.read_text() == text


def find(rows, **wanted):
    (found,) = [r for r in rows if wanted.items() <= r.items()]
    return found


@pytest.fixture
def summary():
    """40 videos; topk is right in 30 of them, uniform in 10 of these, clip-topk in 29 of these."""
    rows = []
    for i in range(40):
        family = "lookup" if i % 2 else "relation"
        rows.append(row(i, "topk", i < 30, family=family))
        rows.append(row(i, "uniform", i < 10, family=family))
        rows.append(row(i, "clip-topk", i < 29, family=family))
    return summarize(rows, ("topk", "bin-max", "aks"))


def test_summary(summary):
    assert (summary["num_questions"], summary["num_videos"]) == (40, 40)
    everything = find(summary["accuracy"], method="topk", label="all")
    assert everything["n"] == 40 and everything["accuracy"] == 0.75
    assert everything["low"] == pytest.approx(0.75 - 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)
    assert find(summary["accuracy"], method="uniform", label="relation")["accuracy"] == 0.25
    gain = find(summary["differences"], baseline="uniform", label="all")
    assert gain["difference"] == 0.5 and gain["low"] > 0.3 and not gain["inside_noise"]
    assert gain["mcnemar_p"] == pytest.approx(2 / 2**20)
    tiny = find(summary["differences"], baseline="clip-topk", label="all")
    assert tiny["difference"] == pytest.approx(0.025) and tiny["inside_noise"]


def test_table_marks_what_is_inside_the_noise(summary):
    console = Console(width=200, file=io.StringIO())
    console.print(table(summary))
    everything = next(line for line in console.file.getvalue().splitlines() if "  topk" in line)
    assert "75.0 [" in everything and "+50.0 [" in everything and "~ +2.5 [" in everything


def test_differences_only_where_both_methods_have_answered():
    rows = [row(i, "topk", True) for i in range(4)] + [row(i, "uniform", False) for i in range(2)]
    summary = summarize(rows, ("topk",))
    assert find(summary["differences"], label="all")["n"] == 2
    assert find(summary["accuracy"], method="topk", label="all")["n"] == 4
    console = Console(width=200, file=io.StringIO())
    console.print(table(summary))
    assert "all (2)" in console.file.getvalue() and "topk (4)" in console.file.getvalue()
    json.dumps(summary)


def test_budgets_are_apart():
    summary = summarize([row(0, "topk", True, k=8), row(0, "topk", False, k=16)], ("topk",))
    assert [find(summary["accuracy"], k=k, label="all")["accuracy"] for k in (8, 16)] == [1, 0]
    assert summary["differences"] == []


def test_labels_that_count_the_same():
    """MLVU's M-Avg: the one question of `order` is right, none of three of `count`."""
    rows = [row(i, "topk", i == 0, family="count" if i else "order") for i in range(4)]
    rows += [row(i, "uniform", False, family="count" if i else "order") for i in range(4)]
    summary = summarize(rows, ("topk",), macro="family")
    mean = find(summary["accuracy"], method="topk", grouping="macro")
    assert (mean["label"], mean["n"], mean["accuracy"]) == ("mean of family", 4, pytest.approx(0.5))
    assert find(summary["accuracy"], method="topk", label="all")["accuracy"] == 0.25
    assert find(summary["differences"], grouping="macro")["difference"] == pytest.approx(0.5)
    always = summarize([row(i, "topk", True, family="count" if i else "order") for i in range(12)], (), macro="family")
    mean = find(always["accuracy"], grouping="macro")
    assert mean["low"] == mean["high"] == mean["accuracy"] == 1


def lettered(i, method, letter, k=8):
    return row(i, method, letter == "A", k=k) | {"letter": letter}


def test_controls():
    """Of 8 questions (A is right) permuting changes 2 letters and 1 outcome; half the questions need no frame."""
    uniform, topk = "AAAABBBB", "AAAABBBA"
    permuted, blank, random = "AAABBBBC", "AAAACCCC", "AAAABBBB"
    rows = [
        lettered(i, method, letter)
        for method, letters in {
            "uniform": uniform, "topk": topk, "permuted": permuted, "blank": blank, "random": random,
        }.items()
        for i, letter in enumerate(letters)
    ]  # fmt: skip
    summary = summarize(rows, ("topk",))
    (controls,) = summary["controls"]
    assert controls == {
        "k": 8, "n": 8, "churn": 2 / 8, "churn_correct": 1 / 8, "churn_floor": pytest.approx(1.96 / 8, rel=1e-3),
        "frames_matter": 4 / 8, "blank": 4 / 8,
    }  # fmt: skip
    assert find(summary["accuracy"], method="permuted", label="all")["accuracy"] == 3 / 8
    console = Console(width=200, file=io.StringIO())
    console.print(table(summary))
    text = " ".join(console.file.getvalue().split())
    assert "changes 25.0 % of the letters" in text and "the frames matter in 50.0 %" in text and "blank" in text


def test_a_difference_below_the_churn_floor_is_noise():
    """Certain by its interval (8 of 40 questions), but permuting the options flips 24 answers."""
    rows = [lettered(i, "topk", "A") for i in range(40)]
    rows += [lettered(i, "uniform", "B" if i < 8 else "A") for i in range(40)]
    assert not find(summarize(rows, ("topk",))["differences"], label="all")["inside_noise"]
    rows += [lettered(i, "permuted", "B" if i < 32 else "A") for i in range(40)]
    assert find(summarize(rows, ("topk",))["differences"], label="all")["inside_noise"]


def test_missing_videos_are_said_in_the_table():
    summary = summarize([row(0, "topk", True)], ("topk",)) | {"missing_videos": ["lost.mp4"]}
    console = Console(width=200, file=io.StringIO())
    console.print(table(summary))
    assert "without the questions about 1 videos that are missing: lost.mp4" in " ".join(
        console.file.getvalue().split()
    )
