"""select -> answer -> score on two tiny videos with the golden checkpoints, and what a stop or bad input does to it."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_store
from tiny_store import LONG, SHORT
from video_files import write_video

from tspo_jax import config as cfg
from tspo_jax.answering import prompts
from tspo_jax.answering.rollout import Rollout
from tspo_jax.answering.shapes import Shapes
from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.config import ConfigError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.evaluation import frame_sets
from tspo_jax.evaluation import run as evaluate
from tspo_jax.runs.metrics import read_rows
from tspo_jax.runs.run_folder import RunFolderError, in_use, write_content, write_run_config
from tspo_jax.selection import methods as selection
from tspo_jax.selection.scoring import load_scorer
from tspo_jax.selection.video_source import stored_source


@pytest.fixture(scope="module")
def run(golden, folder):
    """A whole evaluation: summary and rows by (id, method, k)."""
    config = tiny_store.make_config(golden, folder / "store", folder / "questions.jsonl")
    summary = evaluate.evaluate(cfg.read(config), folder / "run", golden / "tspo_agent")
    rows = [json.loads(line) for line in (folder / "run" / "evaluation" / "rows.jsonl").read_text().splitlines()]
    return summary, {(row["id"], row["method"], row["k"]): row for row in rows}, rows


@pytest.fixture
def fake_answers(monkeypatch):
    """Answers that are a function of question and frames, without a model: a letter, by hash."""
    answered = []
    tiny_store.fake_answerer(monkeypatch, answered)
    return answered


def test_every_question_method_and_budget_has_one_row(run):
    _, rows, all_rows = run
    assert len(all_rows) == len(rows) == 12 * 3 * 2
    assert {row["groups"]["family"][0] for row in all_rows} == {"lookup", "position", "relation"}


def test_picks_are_those_of_select_frames(run, golden, folder):
    """From the features of the store, as if the video were decoded and encoded again."""
    clip = load_clip(golden / "tspo_agent")
    store, scorer = FrameStore(folder / "store", clip.identity), load_scorer(golden / "tspo_agent")
    clip_scores, scores = scorer.ask(store.features(LONG), "Which number is shown at moment 4?")
    for method in ("uniform", "clip-topk", "topk"):
        row = run[1]["4", method, 6]
        assert row["candidate_idx"] == selection.select(method, scores, clip_scores, 6).tolist()
        assert row["frame_idx"] == [25 * i for i in row["candidate_idx"]]
        assert row["timestamps"] == pytest.approx(row["candidate_idx"])


def test_fewer_candidates_than_k_gives_all_of_them(run):
    """The short video has five."""
    for method in ("uniform", "clip-topk", "topk"):
        row = run[1]["1", method, 6]
        assert row["video"] == SHORT and row["candidate_idx"] == [0, 1, 2, 3, 4]
    assert len({run[1]["1", method, 6]["answer"] for method in ("uniform", "clip-topk", "topk")}) == 1


def test_answers_are_those_of_the_answerer(run, golden, folder):
    """Alone, without padding of batch and prompt, on one device."""
    answerer = load_answerer(golden / "llava_video_grid")
    row = run[1]["2", "topk", 6]
    frames = FrameStore(folder / "store").frames(LONG, row["candidate_idx"])
    pixels = np.stack([answerer.processor.crop(frame) for frame in frames])[None]
    question = "Which number is shown at moment 2?\nA. one\nB. two\nC. three\nD. four"
    ids, lengths = prompts.pad([prompts.tokenize(prompts.render(question), answerer.tokenizer)], 0)
    program = Rollout.of(answerer, max_new_tokens=2)
    answers = program(answerer.params, pixels, np.arange(6)[None, None], ids, lengths)
    ((text,),) = prompts.decode(np.asarray(answers.tokens), np.asarray(answers.lengths), answerer.tokenizer)
    assert row["answer"] == text


@pytest.mark.slow
def test_videos_below_the_budget_share_a_few_programs(golden, folder, config, tmp_path, monkeypatch):
    """Of eight lengths, with the answers of a program for each; a long question does not pad all others."""
    rng = np.random.default_rng(0)
    videos = {f"{n}.mp4": write_video(tmp_path / f"{n}.mp4", num_frames=25 * n) for n in range(3, 11)}
    config.data.store = str(tiny_store.store_videos(tmp_path / "store", videos, golden / "tspo_agent"))
    rows = [
        {
            "video": name,
            "original_question": f"<image>\nWhich number{' at all' * (40 if i == 3 else 0)}?\nA. one\nB. two {i}",
            "solution": "<answer>b</answer>",
            "type": "general",
        }
        for i, name in enumerate(rng.permutation(list(videos)).tolist())
    ]
    config.evaluation.questions = str(tmp_path / "questions.jsonl")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.evaluation.methods, config.evaluation.budgets, config.evaluation.batch_size = ("topk",), (64,), 2
    config.mesh.axes = (("data", 2), ("model", 4))
    made = []

    def recording(*args, original=Rollout.of, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Rollout, "of", recording)

    def answers(run):
        evaluate.evaluate(cfg.read(config), run, golden / "tspo_agent")
        return {
            (row["id"], len(row["candidate_idx"])): row["answer"] for row in read_rows(run / "evaluation/rows.jsonl")
        }

    few = answers(tmp_path / "few")
    monkeypatch.setattr(evaluate, "shapes_of", lambda *_: Shapes())
    assert answers(tmp_path / "each") == few and {k for _, k in few} == set(range(3, 11))
    assert made[1].num_compilations >= 8 and made[0].num_compilations <= 4


def test_summary_is_written_and_complete(run, folder):
    summary, _, _ = run
    assert json.loads((folder / "run" / "evaluation" / "summary.json").read_text()) == summary
    assert (summary["num_questions"], summary["num_videos"], summary["missing_videos"]) == (12, 2, [])
    groups = {(r["method"], r["k"], r["label"]) for r in summary["accuracy"]}
    labels = ("all", "lookup", "position", "relation")
    assert groups == {(m, k, f) for m in ("uniform", "clip-topk", "topk") for k in (4, 6) for f in labels}
    assert {r["baseline"] for r in summary["differences"]} == {"uniform", "clip-topk"}


def test_going_on_needs_no_answerer(run, golden, folder, config, monkeypatch):
    def never(*_):
        raise AssertionError("all questions are answered")

    monkeypatch.setattr(evaluate, "_load_answerer", never)
    assert evaluate.evaluate(cfg.read(config), folder / "run", golden / "tspo_agent") == run[0]


def test_a_stopped_evaluation_goes_on(golden, config, tmp_path, fake_answers, monkeypatch):
    """Stopped after each batch, the last line cut in the middle: the same rows, none answered twice."""
    whole = evaluate.evaluate(cfg.read(config), tmp_path / "whole", golden / "tspo_agent")
    assert any(r["accuracy"] > 0 for r in whole["accuracy"])
    expected = sorted((tmp_path / "whole" / "evaluation" / "rows.jsonl").read_text().splitlines())
    first_pass = sorted(fake_answers)
    fake_answers.clear()

    config.evaluation.batch_size = 4
    config.mesh.axes = (("data", 4), ("model", 2))
    stop_after = evaluate.ResultFile.append
    path = tmp_path / "stopped" / "evaluation" / "rows.jsonl"

    def append_and_stop(self, rows):
        stop_after(self, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.ResultFile, "append", append_and_stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(cfg.read(config), tmp_path / "stopped", golden / "tspo_agent")
    monkeypatch.setattr(evaluate.ResultFile, "append", stop_after)
    with path.open("a") as file:
        file.write('{"id": "3", "vi')
    stopped = evaluate.evaluate(cfg.read(config), tmp_path / "stopped", golden / "tspo_agent")
    assert stopped == whole
    assert sorted(path.read_text().splitlines()) == expected
    assert sorted(fake_answers) == first_pass


@pytest.mark.slow
def test_killed_five_times(golden, folder, config, tmp_path):
    """SIGKILL before the first answer and in the middle of them: the table of an undisturbed run, no row twice."""
    config.evaluation.questions = str(tiny_store.write_questions(tmp_path / "questions.jsonl", num=20))
    config.evaluation.budgets, config.evaluation.batch_size = (4,), 4
    config.mesh.axes = (("data", 4), ("model", 2))
    whole = evaluate.evaluate(cfg.read(config), tmp_path / "whole", golden / "tspo_agent")
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config.to_dict()})\n"
    )
    command = [sys.executable, "-m", "tspo_jax.evaluate", f"--config={tmp_path / 'config.py'}"]
    command += [f"--run_dir={tmp_path / 'killed'}", f"--agent={golden / 'tspo_agent'}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = tmp_path / "killed" / "evaluation" / "rows.jsonl"

    def lines():
        """Whole lines of rows.jsonl, None before it is there."""
        return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else None

    kept = [None]
    for _ in range(5):
        with subprocess.Popen(command, env=os.environ | cache, **pipes) as process:
            while process.poll() is None and lines() == kept[-1]:
                time.sleep(0.005)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        kept.append(lines())
    assert kept[1] == [] and 0 < len(kept[-1]) < 20 * 3
    assert all(more[: len(fewer)] == fewer for fewer, more in itertools.pairwise(kept[1:]))
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == whole
    undisturbed = (tmp_path / "whole" / "evaluation" / "rows.jsonl").read_bytes().splitlines()
    assert lines()[: len(kept[-1])] == kept[-1] and sorted(lines()) == sorted(undisturbed)


def test_methods_and_budgets_may_be_added_later(golden, config, tmp_path, fake_answers):
    config.evaluation.methods = ("uniform",)
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    before = len(fake_answers)
    config.evaluation.methods = ("uniform", "bin-max", "aks")
    config.evaluation.budgets = (4, 6, 8)
    summary = evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    assert {(r["method"], r["k"]) for r in summary["accuracy"]} == {
        (m, k) for m in ("uniform", "bin-max", "aks") for k in (4, 6, 8)
    }
    assert len(set(fake_answers[before:])) == len(fake_answers[before:])


def test_features_of_a_video_are_read_once(golden, folder, config, tmp_path, fake_answers, monkeypatch):
    read = []
    features = FrameStore.features
    monkeypatch.setattr(FrameStore, "features", lambda self, name: read.append(name) or features(self, name))
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    assert sorted(read) == sorted([LONG, SHORT])


def test_equal_frame_sets_are_answered_once(golden, config, tmp_path, fake_answers):
    """Six questions about the short video: all methods agree at K = 6."""
    config.evaluation.budgets = (6,)
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    assert sum(picks == (0, 1, 2, 3, 4) for _, picks in fake_answers) == 6


def test_another_agent_needs_another_folder(golden, config, tmp_path, fake_answers):
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    config.answerer.encode_chunk = 4  # memory may be saved when it goes on
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    config.answerer.template, config.agent.num_heads = "chatml_direct", 2
    message = r"num_heads: 8 there, 2 here(?s:.*)answerer.template:  there, chatml_direct here"
    with pytest.raises(RunFolderError, match=message):
        evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")


def test_what_an_evaluation_depends_on_is_its_content(golden, folder, config, tmp_path, fake_answers):
    """The same files under other paths are accepted, a store with other frames is not."""
    shutil.copytree(folder / "store", tmp_path / "store")
    shutil.copy(folder / "questions.jsonl", tmp_path / "moved.jsonl")
    evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    before = len(fake_answers)
    config.evaluation.store, config.evaluation.questions = str(tmp_path / "store"), str(tmp_path / "moved.jsonl")
    evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    assert len(fake_answers) == before
    shutil.rmtree(tmp_path / "store")
    videos = {LONG: golden / LONG, SHORT: write_video(tmp_path / SHORT, num_frames=150)}
    tiny_store.store_videos(tmp_path / "store", videos, golden / "tspo_agent")
    with pytest.raises(RunFolderError, match="store_sha256: "):
        evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")


def test_an_adapter_of_other_content_is_another_answerer(golden, config, tmp_path, fake_answers):
    config.answerer.adapter = str(tmp_path / "adapter")
    for content in (b"one", b"two"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(content)
        if content == b"one":
            evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    with pytest.raises(RunFolderError, match="answerer.identity: "):
        evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")


def test_the_agent_of_a_run_with_another_clip_is_refused(golden, config, tmp_path, fake_answers):
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    write_run_config(tmp_path / "x", {"agent": {"clip": "other/clip"}})
    write_content(tmp_path / "x", {"agent.clip": "0123456789abcdef-bfloat16"})
    for agent in ("x", "x/best"):
        with pytest.raises(ValueError, match="x.*: its agent was trained with the features of another CLIP .* than "):
            evaluate.evaluate(cfg.read(config), tmp_path / "run", tmp_path / agent)


def test_two_evaluations_at_once(golden, config, tmp_path, fake_answers):
    with in_use(tmp_path / "evaluation"), pytest.raises(RunFolderError, match="is in use by process"):
        evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")


def test_features_of_other_frames_are_missing(golden, config, tmp_path, fake_answers, monkeypatch):
    monkeypatch.setattr(FrameStore, "has_features", lambda store, name: name != SHORT)
    with pytest.raises(ValueError, match=f"lacks 1 videos of .*, or their features: {SHORT};"):
        evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    monkeypatch.setattr(FrameStore, "has_features", lambda store, name: False)
    with pytest.raises(ValueError, match="has none of the videos of"):
        evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent", allow_missing=True)


def test_missing_videos_are_listed_or_left_out(golden, folder, config, tmp_path, fake_answers):
    rows = (folder / "questions.jsonl").read_text().replace(SHORT, "lost.mp4")
    config.evaluation.questions = str(tmp_path / "questions.jsonl")
    (tmp_path / "questions.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"lacks 1 videos of .*: lost.mp4; run python -m tspo_jax.predecode"):
        evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    summary = evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent", allow_missing=True)
    assert summary["num_questions"] == 6 and summary["missing_videos"] == ["lost.mp4"]


def test_a_folder_of_videos_instead_of_a_store(golden, folder, config, tmp_path, fake_answers):
    """They are decoded and encoded once; what is no video is missing."""
    (tmp_path / "videos").mkdir()
    shutil.copy(folder / SHORT, tmp_path / "videos" / SHORT)
    (tmp_path / "videos" / LONG).write_bytes(b"no video")
    config.evaluation.videos = str(tmp_path / "videos")
    with pytest.raises(ValueError, match=f"frames lacks 1 videos of .*: {LONG}"):
        evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    (tmp_path / "videos" / SHORT).unlink()
    summary = evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent", allow_missing=True)
    assert (summary["num_questions"], summary["missing_videos"]) == (6, [LONG])


def test_a_benchmarks_questions_prompts_and_letters(golden, config, tmp_path, fake_answers):
    """The annotation file of MLVU, read by the published protocol."""
    question = {"question": "What?\n(A) x\n(B) y\n", "candidates": ["x", "y"], "answer": "B", "duration": 40.0}
    rows = [
        question | {"video_name": LONG, "task_type": t, "question_id": f"Q{i}"} for i, t in enumerate(["ego", "count"])
    ]
    (tmp_path / "mlvu.json").write_text(json.dumps(rows))
    config.evaluation.benchmark = "mlvu"
    config.evaluation.questions = str(tmp_path / "mlvu.json")
    config.evaluation.protocol = "published"
    (item, _) = evaluate.read_items(cfg.read(config))
    assert item.prompt == "\nWhat?\n(A) x\n(B) y\n\nOnly give the best option.\n\nBest option: ("
    summary = evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    assert {r["label"] for r in summary["accuracy"]} == {"all", "ego", "count", "mean of task_type"}


def test_controls_are_answered_once_and_summed_up(golden, config, tmp_path, fake_answers):
    config.evaluation.controls = ("permuted", "random", "blank")
    config.evaluation.budgets = (4,)
    summary = evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    path = tmp_path / "evaluation" / "rows.jsonl"
    rows = {(row["id"], row["method"]): row for row in map(json.loads, path.read_text().splitlines())}
    assert len(rows) == 12 * 6
    for i in range(12):
        uniform, blank, permuted = (rows[str(i), method] for method in ("uniform", "blank", "permuted"))
        assert uniform["candidate_idx"] == blank["candidate_idx"] == permuted["candidate_idx"]
        assert permuted["solution"] == "B"
        # The letter is that of the option in its original place.
        item = evaluate.read_items(cfg.read(config))[i]
        order = frame_sets.shuffled_order(config.seed, item)
        assert order != (0, 1, 2, 3)
        assert permuted["letter"] == "ABCD"[order["ABCD".index(permuted["answer"][0])]]
    (controls,) = summary["controls"]
    assert controls["n"] == 12 and {"churn", "churn_correct", "churn_floor", "frames_matter", "blank"} < set(controls)


def test_permuted_and_blank_reach_the_answerer(golden, config, tmp_path, monkeypatch):
    seen = []
    tiny_store.fake_answerer(monkeypatch)
    monkeypatch.setattr(evaluate, "answer", lambda sets, *_: [[seen.append(s) or (s, "A.")] for s in sets])
    config.evaluation.methods, config.evaluation.budgets = ("uniform",), (4,)
    config.evaluation.controls = ("permuted", "blank")
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    by_kind = {method: [s for s in seen if s.choices == ((method, 4),)] for method in ("uniform", "permuted", "blank")}
    assert [len(sets) for sets in by_kind.values()] == [12, 12, 12]
    assert all(s.blank for s in by_kind["blank"]) and not any(s.blank for s in by_kind["uniform"])
    for s in by_kind["permuted"]:
        lines = s.item.prompt.splitlines()[1:5]
        assert lines == [f"{x}. {o}" for x, o in zip("ABCD", s.item.options, strict=True)]
        assert s.item.options[ord(s.item.answer) - 65] == "two"


def index_file(tmp_path, frames):
    """The same frames for all questions, those beyond the short video only for the long one."""
    rows = [{"question_id": str(i), "video_id": (LONG, SHORT)[i % 2], "frame_idx": frames[i % 2]} for i in range(12)]
    (tmp_path / "idx.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "idx.jsonl")


def test_frames_of_an_index_file_are_one_more_method(golden, config, tmp_path, fake_answers):
    config.evaluation.budgets = (4,)
    config.evaluation.frame_idx = index_file(tmp_path, ([0, 250, 510, 975], [0, 50]))
    summary = evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")
    rows = map(json.loads, (tmp_path / "run" / "evaluation" / "rows.jsonl").read_text().splitlines())
    own = {row["id"]: row for row in rows if row["method"] == "frame-idx"}
    assert len(own) == 12 and {row["k"] for row in own.values()} == {4}
    assert own["0"]["candidate_idx"] == [0, 10, 20, 39] and own["1"]["candidate_idx"] == [0, 2]
    assert {r["baseline"] for r in summary["differences"] if r["method"] == "frame-idx"} == {"uniform", "clip-topk"}


def test_an_index_file_that_does_not_fit(golden, config, tmp_path):
    config.evaluation.frame_idx = index_file(tmp_path, ([0, 1000], [0]))
    with pytest.raises(ValueError, match="question 0: frame 1000 was chosen, but video tspo_agent.mp4 has 1000 frames"):
        evaluate.evaluate(cfg.read(config), tmp_path / "run", golden / "tspo_agent")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("questions", "", "config.evaluation.questions is empty"),
        ("methods", ("topk", "best"), "config.evaluation.methods has 'best', which is not one of topk"),
        ("controls", ("shuffled",), "config.evaluation.controls has 'shuffled', which is not one of permuted, random"),
        ("budgets", (0,), "at least one budget|one budget"),
        ("protocol", "loose", "config.evaluation.protocol is 'loose', not published or strict"),
        ("batch_size", 3, "batch_size is 3: it must be a multiple of mesh axis data"),
        ("questions", "nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_bad_fields_are_named(golden, config, tmp_path, field, value, message):
    config.evaluation[field] = value
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")


@pytest.mark.slow
def test_search_is_one_more_method(golden, folder, config, tmp_path, fake_answers):
    """Rows say what the search cost, and are those of the searcher alone; it may be added later, and goes on where it
    stopped. Lines of the question file name the objects, or the answerer does."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    named = [row | {"targets": ["red ball", f"number {i}"], "cues": ["dog"]} for i, row in enumerate(rows)]
    config.evaluation.questions = str(tmp_path / "named.jsonl")
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    run = tmp_path / "run"
    evaluate.evaluate(cfg.read(config), run, golden / "tspo_agent")
    config.evaluation.search.detector = str(golden / "owlvit_tiny")
    config.evaluation.search.grid = (2, 2)
    config.evaluation.methods = ("uniform", "tstar")
    summary = evaluate.evaluate(cfg.read(config), run, golden / "tspo_agent")
    assert {row["method"] for row in summary["accuracy"]} == {"uniform", "tstar"}
    gains = {(row["method"], row["baseline"]) for row in summary["differences"]}
    assert gains == {("tstar", "uniform")}
    written = [json.loads(line) for line in (run / "evaluation" / "rows.jsonl").read_text().splitlines()]
    searched = [row for row in written if "searched" in row]
    assert len(searched) == 12 * 2 and all(row["method"] == "tstar" for row in searched)
    searcher = frame_sets.make_searcher(cfg.read(config), None)
    for row in (row for row in searched if row["k"] == 4):
        found = searcher(
            stored_source(FrameStore(folder / "store"), row["video"]), "Why?", 4, ("red ball", f"number {row['id']}"),
            ("dog",),
        )  # fmt: skip
        assert row["candidate_idx"] == found.picks.tolist() and row["searched"] == found.searched
        assert row["searched"]["frames"] >= 4 and row["searched"]["detections"] >= 1


@pytest.mark.parametrize("reply", [(("red ball",), ("dog",)), ValueError("the answerer named no objects")])
def test_objects_that_the_answerer_names(golden, config, tmp_path, fake_answers, monkeypatch, reply):
    """It is asked where a line names none, with the options; where it names none, frames are evenly spaced."""
    asked = []

    def ground(frames, question):
        asked.append(question)
        if isinstance(reply, ValueError):
            raise reply
        return reply

    monkeypatch.setattr(frame_sets, "grounder", lambda answerer: ground)
    config.evaluation.search.detector = str(golden / "owlvit_tiny")
    config.evaluation.methods, config.evaluation.budgets = ("uniform", "tstar"), (4,)
    evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")
    assert len(asked) == 12 and asked[0].endswith("?\nA. one\nB. two\nC. three\nD. four")
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "rows.jsonl").read_text().splitlines()]
    uniform = {row["id"]: row for row in rows if row["method"] == "uniform"}
    for row in (row for row in rows if row["method"] == "tstar"):
        searched = row["searched"]
        if isinstance(reply, ValueError):
            assert row["candidate_idx"] == uniform[row["id"]]["candidate_idx"]
            assert searched["fallback"] == "the answerer named no objects" and searched["targets"] == []
        else:
            assert (searched["targets"], searched["cues"]) == (["red ball"], ["dog"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("detector", "", "search.detector is empty"),
        ("schedule", "fast", "config.evaluation.search: schedule is 'fast'"),
        ("share", 0.0, "config.evaluation.search: share is 0.0"),
        ("threshold", 2.0, "config.evaluation.search: threshold is 2.0"),
        ("grid", (0, 1), "config.evaluation.search: grid is"),
    ],
)
def test_search_that_makes_no_sense(golden, config, tmp_path, field, value, message):
    config.evaluation.methods = ("tstar",)
    config.evaluation.search.update({"detector": str(golden / "owlvit_tiny"), field: value})
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(cfg.read(config), tmp_path, golden / "tspo_agent")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"videos": "videos"}, "config.evaluation.videos: several processes read a frame store"),
        ({"methods": ("uniform", "flat")}, "methods: flat asks call after call, which one process does alone"),
        ({"methods": ("tstar",)}, "tstar needs targets in the lines .* 12 have none"),
    ],
)
def test_what_several_processes_cannot_share(golden, config, tmp_path, monkeypatch, fields, message):
    config.evaluation.search.detector = str(golden / "owlvit_tiny")
    config.evaluation.update(fields)
    monkeypatch.setattr(evaluate.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(cfg.read(config), tmp_path)


def test_sigterm_keeps_the_answers_and_the_next_start_goes_on(golden, config, tmp_path, fake_answers, monkeypatch):
    append = evaluate.ResultFile.append

    def append_and_terminate(self, rows):
        append(self, rows)
        os.kill(os.getpid(), signal.SIGTERM)

    config.evaluation.batch_size, config.mesh.axes = 4, (("data", 4), ("model", 2))
    whole = evaluate.evaluate(cfg.read(config), tmp_path / "whole", golden / "tspo_agent")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.ResultFile, "append", append_and_terminate)
        assert evaluate.evaluate(cfg.read(config), tmp_path / "stopped", golden / "tspo_agent") is None
    path = tmp_path / "stopped" / "evaluation" / "rows.jsonl"
    assert 0 < len(path.read_text().splitlines()) < 12 * 6
    assert evaluate.evaluate(cfg.read(config), tmp_path / "stopped", golden / "tspo_agent") == whole


def test_a_field_that_does_not_exist():
    with pytest.raises(ConfigError, match="config.evaluation.budget does not exist; did you mean budgets"):
        cfg.check_overrides(["evaluate", "--config.evaluation.budget=8"])


@pytest.mark.slow
def test_keyframes_by_the_command_line(tmp_path):
    """No config, no video, no model: one JSON object in the output file, nothing on stdout."""
    row = {
        "video_path": "v.mp4", "question": "What?", "candidates": ["x", "y"], "correct_choice": 0, "position": [240],
        "topic_category": "t", "question_category": "q", "level": "L1", "id": "v_0", "duration_group": 15,
        "duration": 15.0, "frame_idx": [0, 275],
    }  # fmt: skip
    (tmp_path / "idx.json").write_text(json.dumps([row | {"fps": 25}]))
    command = [sys.executable, "-m", "tspo_jax.evaluate", "--keyframes", "--benchmark=longvideobench"]
    files = [f"--annotations={tmp_path / 'idx.json'}", f"--frame_idx={tmp_path / 'idx.json'}"]
    done = subprocess.run([*command, *files, f"--output={tmp_path / 'out.json'}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    table = json.loads((tmp_path / "out.json").read_text())["selections"]["frame_idx"]["all"]
    assert table["any"] == {"1": 100.0, "2": 100.0, "5": 100.0} and table["mean_distance_s"] == 1.0
    failed = subprocess.run([*command, "--annotations=lost.json"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "lost.json" in failed.stderr
    alone = subprocess.run([part for part in command if part != "--keyframes"], capture_output=True, text=True)
    assert alone.returncode == 1 and "--benchmark is for --keyframes" in alone.stderr
