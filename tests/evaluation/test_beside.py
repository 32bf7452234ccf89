"""Two agents in one table: the rows of another run are those that it has, and only where they may be compared."""

import io
import json

import pytest
import tiny_store
from rich.console import Console

from tspo_jax import config as cfg
from tspo_jax.evaluation import run as evaluate
from tspo_jax.evaluation.results import difference_text, table
from tspo_jax.pages import report


@pytest.fixture
def first(golden, config, tmp_path, monkeypatch):
    """A run folder with the evaluation of the golden agent, and its summary."""
    tiny_store.fake_answerer(monkeypatch)
    return tmp_path / "first", evaluate.evaluate(cfg.read(config), tmp_path / "first", golden / "tspo_agent")


def by_group(rows, **wanted):
    return {(row["k"], row["label"]): row for row in rows if wanted.items() <= row.items()}


def test_the_other_agent_stands_beside(first, plain_clip, config, tmp_path):
    """The other run's numbers are unchanged, and those of this run are what they are alone."""
    run, alone = first
    here = tmp_path / "second"
    before = evaluate.evaluate(cfg.read(config), here, plain_clip)
    summary = evaluate.evaluate(cfg.read(config), here, plain_clip, beside=[run])
    other = by_group(summary["accuracy"], method="topk of first")
    for group, row in by_group(alone["accuracy"], method="topk").items():
        assert other[group] == row | {"method": "topk of first"}
    for method in ("uniform", "clip-topk", "topk"):
        assert by_group(summary["accuracy"], method=method) == by_group(before["accuracy"], method=method)
    own, gains = (
        by_group(summary["accuracy"], method="topk"),
        by_group(summary["differences"], baseline="topk of first"),
    )
    assert gains.keys() == own.keys() and {row["method"] for row in gains.values()} == {"topk"}
    for group, row in gains.items():
        assert row["difference"] == pytest.approx(own[group]["accuracy"] - other[group]["accuracy"])
    assert any(row["difference"] for row in gains.values())  # the agents do differ
    assert by_group(summary["differences"], method="topk of first", baseline="uniform").keys() == own.keys()
    order = [row["method"] for row in summary["accuracy"] if (row["k"], row["label"]) == (4, "all")]
    assert order == ["uniform", "clip-topk", "topk of first", "topk"]
    assert json.loads((here / "evaluation" / "summary.json").read_text()) == summary
    assert not any("of first" in line for line in (here / "evaluation" / "rows.jsonl").read_text().splitlines())

    console = Console(width=200, file=io.StringIO())
    console.print(table(summary))
    assert f"K = 4: topk - topk of first: {difference_text(gains[4, 'all'])}" in console.file.getvalue()
    page = report.names_of(summary)
    assert page["topk of first"] == "trained agent, top-k of first" and list(page)[:-1] == list(report.NAMES)


@pytest.mark.slow
def test_the_report_shows_both(first, golden, plain_clip, config, tmp_path):
    evaluate.evaluate(cfg.read(config), tmp_path / "second", plain_clip, beside=[first[0]])
    html = report.write_report(tmp_path / "second").read_text()
    assert "<th>trained agent, top-k of first</th>" in html
    assert "<th>trained agent, top-k<br />− trained agent, top-k of first</th>" in html


def test_only_the_same_questions_methods_and_budgets(first, golden, config, tmp_path):
    config.evaluation.budgets = (6,)
    summary = evaluate.evaluate(cfg.read(config), tmp_path / "six", golden / "tspo_agent", beside=[first[0]])
    assert {row["k"] for row in summary["accuracy"]} == {6}
    config.evaluation.budgets = (5,)
    with pytest.raises(ValueError, match="first/evaluation has no answers by a trained agent at these budgets"):
        evaluate.evaluate(cfg.read(config), tmp_path / "five", golden / "tspo_agent", beside=[first[0]])


def test_what_may_not_be_compared_is_named(first, golden, config, tmp_path):
    run, agent = first[0], golden / "tspo_agent"

    def refused(message, name, *runs):
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(cfg.read(config), tmp_path / name, agent, beside=runs)

    refused("nothing/evaluation holds no evaluation; run python -m tspo_jax.evaluate", "a", tmp_path / "nothing")
    refused("named alike: topk of first", "b", run, run)
    config.answerer.max_new_tokens = 3
    refused("answered otherwise; answerer.max_new_tokens: 2 there, 3 here", "c", run)
    config.answerer.max_new_tokens = 2
    config.evaluation.questions = str(tiny_store.write_questions(tmp_path / "others.jsonl", num=8))
    refused("is of other questions, or was answered otherwise; questions_sha256", "d", run)
