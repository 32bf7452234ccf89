"""The study of ways to choose frames: its runs, what it counts as read, and its table."""

import pytest
from tiny_store import LONG, make_store, write_questions

from benchmarks import selection_study as study
from tspo_jax.checkpoints.weights import checkpoint_identity
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import Question
from tspo_jax.data.row_file import RowFile
from tspo_jax.runs.run_folder import RunFolderError
from tspo_jax.selection import methods
from tspo_jax.selection.video_source import stored_source


def test_runs(tmp_path):
    paper, plus, start, own, span = (
        study.config_of(way, 2, tmp_path, tmp_path) for way in ("paper", "plus", "start", "own", "span")
    )
    assert study.calls_of(paper) == 300 * 64 and study.calls_of(own) == study.calls_of(plus) == 200 * 64
    assert study.calls_of(start) == study.calls_of(span) == 0 and span.agent.kind == "span"
    assert start.data.questions == span.data.questions == str(tmp_path / "labelled_2.jsonl")
    assert plus.data.questions == own.data.questions == str(tmp_path / "train.jsonl")
    assert own.policy.warm_start_steps == 0, "evidence of the training file is not used"
    assert own.agent.init == str(tmp_path / "start_2_agent")
    assert {config.num_steps for config in (paper, plus, span)} == {300}


def test_what_a_question_names():
    def question(query, *options):
        return Question(0, "", query, query, options, "A", "general", "")

    asked = question("In the desert, what colour is the ball shown with the tree?", "red", "blue")
    assert study.named(asked) == {"targets": ["tree"], "cues": ["red ball", "blue ball"]}
    assert study.named(question("What is shown at the end of the video?", "car")) == {"targets": [], "cues": ["car"]}


@pytest.mark.parametrize("scoring_reads, read", [(True, 40), (False, 8)])
def test_frames_that_are_read(golden, tmp_path, scoring_reads, read):
    store = FrameStore(make_store(tmp_path, golden), checkpoint_identity(golden / "tspo_agent"))
    question = Question(0, LONG, "What?", "What?", (), "A", "general", "")

    def by_scores(source, question):
        return source.pictures(methods.topk(source.candidates().features[:, 0], 8).tolist())

    found = study.timed(lambda video: stored_source(store, video), by_scores, question, scoring_reads)
    assert found.frames == read and found.seconds > 0 and found.cpu_seconds > 0


def test_results_of_other_settings_are_not_gone_on_from(tmp_path):
    for name in ("train", "eval"):
        write_questions(tmp_path / f"{name}.jsonl", 3)
    sizes = {"labelled": 9, "coarse": 3, "timed_questions": 4}
    with RowFile(tmp_path / "study" / "results.jsonl") as file:
        for _ in range(2):
            study.Study(tmp_path, tmp_path / "study", file, **sizes)
        with pytest.raises(RunFolderError, match="labelled: 9 there, 8 here"):
            study.Study(tmp_path, tmp_path / "study", file, **(sizes | {"labelled": 8}))
        write_questions(tmp_path / "eval.jsonl", 4)
        with pytest.raises(RunFolderError, match="eval: "):
            study.Study(tmp_path, tmp_path / "study", file, **sizes)


def test_table():
    accuracy = dict.fromkeys(study.FAMILIES, 50.0)
    rows = {
        "uniform": {"accuracy": accuracy, "calls": 0},
        "paper 0": {"accuracy": accuracy, "calls": 19200},
        "paper 1": {"accuracy": accuracy | {"all": 60.0}, "calls": 19000},
        "labels 0": {"answers": 9},
        "times paper": {where: {"seconds": 1.25, "frames": 150.2} for where in (study.COLD, study.STORED)},
    }
    head, _, uniform, paper = study.table(rows).splitlines()
    assert head.count("|") == uniform.count("|") == paper.count("|")
    assert uniform.startswith("| uniform | 1 | 50.0 |") and "| 0 |" in uniform
    assert "| 55.0 [-9, 119] |" in paper and "| 19,100 | 150 | 150 | 1.25 | 1.25 |" in paper
