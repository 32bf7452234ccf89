"""Methods flat and backtrack beside selections, with a real captioner and a writer of the user's."""

import json

import numpy as np
import pytest
import tiny_store
from tiny_store import LONG, SHORT

from tspo_jax import config as cfg
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.evaluation import frame_indices, keyframe_metrics, results, rounds
from tspo_jax.evaluation import run as evaluate
from tspo_jax.evaluation.results import PLAIN
from tspo_jax.runs.run_folder import RunFolderError
from tspo_jax.toy.caption_world import agent_of

pytestmark = pytest.mark.slow  # a training or a whole evaluation, or the making of a model, before the first test


def writer(prompts):
    """Looks at 10 to 14 s of the long video and is sure of B then; of the short one it is sure at once, of A."""
    return [reply(prompt) for prompt in prompts]


def reply(prompt):
    agent, is_long = agent_of(prompt), "[20.0 s to " in prompt
    if agent == "answer":
        looked = "[10.0 s to 14.0 s]" in prompt
        return json.dumps({"Confidence": looked or not is_long, "Answer": "B" if is_long else "A"})
    if agent == "type":
        return '{"Flag": false, "Time Period": "No Time"}'
    if agent == "localize":
        return '{"Time Period": [[10, 14]], "Instruction": "Look.", "Reason": "There."}'
    return '{"Answer": "C"}'


@pytest.fixture(scope="module")
def config(tmp_path_factory, golden):
    folder = tmp_path_factory.mktemp("rounds")
    tiny_store.make_store(folder, golden)
    questions = tiny_store.write_questions(folder / "questions.jsonl", num=4)
    config = tiny_store.make_config(golden, folder / "store", questions)
    config.evaluation.methods = ("flat", "backtrack")
    config.evaluation.rounds.update(
        windows=(20.0, 5.0, 1.0), rounds=2, max_new_tokens=4, writer=f"{__name__}:writer", writer_context=4000
    )
    config.mesh.axes = (("data", -1), ("model", 1))
    return config


@pytest.fixture(scope="module")
def run(config, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    summary = evaluate.evaluate(cfg.read(config), folder, golden / "tspo_agent")
    return folder, summary, results.read_rows(folder / "evaluation" / "rows.jsonl")


def test_rows_say_how_a_question_ended(run):
    folder, _, rows = run
    by = {(row["method"], row["id"]): row for row in rows}
    assert len(by) == len(rows) == 2 * 4 and {row["k"] for row in rows} == {0}
    long, short = by["backtrack", "0"], by["backtrack", "1"]
    assert (long["video"], long["phase"], long["letter"], long["correct"]) == (LONG, "rounds", "B", True)
    assert long["periods"] == [[10.0, 14.0]] and long["timestamps"] == pytest.approx([10, 11, 12, 13, 14], abs=0.1)
    assert (short["video"], short["phase"], short["correct"], short["candidate_idx"]) == (SHORT, "coarse", False, [])
    assert by["flat", "0"]["phase"] == "flat" and by["flat", "0"]["letter"] == "C"
    calls = [json.loads(line) for line in (folder / "evaluation" / "calls.jsonl").read_text().splitlines()]
    assert len({call["id"] for call in calls}) == len(calls)  # coarse captions are shared by questions and methods
    coarse = {(call["video"], tuple(call["times"])) for call in calls if call["kind"] == "caption"}
    assert len(coarse) == 2 + 1 + 1 + 4  # windows of the long video, of the short one; the period and its parts


def test_summary_has_the_phases_and_their_costs(run):
    folder, summary, rows = run
    assert json.loads((folder / "evaluation" / "summary.json").read_text()) == summary
    found = {(row["method"], row["phase"]): row for row in summary["rounds"]}
    assert found.keys() == {("flat", "all"), ("flat", "flat"), *(("backtrack", p) for p in ("all", "coarse", "rounds"))}
    assert found["backtrack", "rounds"]["n"] == 2 and found["backtrack", "rounds"]["accuracy"] == 1
    assert found["backtrack", "coarse"]["accuracy"] == 0 and found["backtrack", "all"]["accuracy"] == 0.5
    of_long = [row for row in rows if row["method"] == "backtrack" and row["video"] == LONG]
    assert found["backtrack", "rounds"]["captions"] == np.mean([row["captions"] for row in of_long]) == 2 + 1 + 4
    assert found["backtrack", "rounds"]["writer_calls"] == 4  # answer, type, localize, answer
    (gain,) = [row for row in summary["differences"] if row["label"] == "all"]
    assert (gain["method"], gain["baseline"], gain["difference"]) == ("backtrack", PLAIN, 0.5)
    assert any("backtrack, rounds (2)" in line for line in results.notes(summary))


def test_periods_are_an_index_file(run, config):
    """Which the keyframe metrics, and an evaluation as its frame_idx, take."""
    folder, _, rows = run
    read = frame_indices.read(
        folder / "evaluation" / "periods.jsonl", "", evaluate.read_items(cfg.read(config)), allow_missing=True
    )
    assert set(read) == {"0", "2"} and read["0"].method == "backtrack"
    assert list(read["0"].frame_idx) == next(row["frame_idx"] for row in rows if row["timestamps"])
    assert keyframe_metrics.hits(np.array(read["0"].timestamps), [(11.4, 11.5)], [1.0])["all@1.0"] == 1


def test_going_on_answers_nothing_twice_and_selections_may_come_later(run, config, golden, monkeypatch):
    folder, summary, _ = run
    more = config.copy_and_resolve_references()
    more.evaluation.methods = ("flat", "backtrack", "uniform")
    more.evaluation.budgets = (4,)
    tiny_store.fake_answerer(monkeypatch)
    again = evaluate.evaluate(cfg.read(more), folder, golden / "tspo_agent")
    assert again["rounds"] == summary["rounds"] and {row["method"] for row in again["accuracy"]} > {"uniform"}
    other = config.copy_and_resolve_references()
    other.evaluation.rounds.rounds = 3
    with pytest.raises(RunFolderError, match=r"rounds\.rounds"):
        evaluate.evaluate(cfg.read(other), folder, golden / "tspo_agent")


@pytest.mark.slow
def test_questions_that_nobody_answered_are_asked_again(run, config, golden, tmp_path, monkeypatch, capfd):
    def down(prompt):
        raise ConnectionError("the server is down")

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "reply", down)
        first = evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    assert {row["phase"] for row in first["rounds"]} == {"all", "failed"}
    assert "8 questions got no answer" in "".join(capfd.readouterr())
    _, summary, rows = run
    again = evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    assert [row["n"] for row in again["rounds"]] == [row["n"] for row in summary["rounds"]]
    found = results.read_rows(tmp_path / "evaluation" / "rows.jsonl")
    assert len(found) == 8 and {row["letter"] for row in found} == {row["letter"] for row in rows}


def test_settings_that_make_no_sense(config, golden, tmp_path):
    for field, value, message in (
        ("windows", (5.0, 20.0, 1.0), r"config\.evaluation\.rounds: windows"),
        ("max_captions", -1, "captions is -1"),
        ("rounds", -1, "rounds is -1"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.evaluation.rounds[field] = value
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(cfg.read(wrong), tmp_path, golden / "tspo_agent")


def test_candidates_of_periods(golden, config):
    timestamps = np.arange(5.0)
    assert rounds.candidates_in([(1.0, 2.5), (2.0, 3.0)], timestamps).tolist() == [1, 2, 3]
    assert rounds.candidates_in([(2.2, 2.4)], timestamps).tolist() == [2]  # none lies in it
    assert rounds.candidates_in([], timestamps).tolist() == []
    assert FrameStore(config.data.store).video(SHORT).num_frames == 5
