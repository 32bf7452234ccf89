"""Building the training set: what each stage keeps, resuming, and the whole command with a tiny answerer."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store, store_lengths

from tspo_jax.command_line.job_array import Shard
from tspo_jax.data.frame_store import StoreError
from tspo_jax.data.questions import QuestionError, question_of_row, read_questions
from tspo_jax.data.stages import number
from tspo_jax.runs.run_folder import RunFolderError, in_use, write_run_config
from tspo_jax.tspo.dataset import (
    Settings,
    build,
    event_requests,
    find_annotations,
    join_shards,
    random_picks,
)

ROOT = Path(__file__).parents[2]
LENGTHS = {f"b/{i}.mp4": 80 + i for i in range(12)} | {"b/short.mp4": 30}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_lengths(tmp_path_factory.mktemp("store"), LENGTHS)


def record(name, video, turns=2):
    said = []
    for i in range(turns):
        said.append({"from": "human", "value": f"Question {i} of {name}?\nA. one\nB. two\nC. three"})
        said.append({"from": "gpt", "value": "B. two"})
    return {"id": name, "conversations": said, "data_source": "b", "video": video}


@pytest.fixture
def annotations(tmp_path):
    records = [record(name[2:], name[2:]) for name in LENGTHS] + [record("gone", "gone.mp4")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b_mc_v0_1_qa_processed.json").write_text(json.dumps(records))
    (tmp_path / "in" / "b_oe_v0_1_qa_processed.json").write_text("not read")
    return find_annotations([str(tmp_path / "in")])


class FakeAnswerer:
    """Right or wrong by a hash of the question and the frames; captions tell video and frame."""

    def __init__(self, stop_after=None):
        self.asked, self.stop_after = [], stop_after

    def __call__(self, requests, max_new_tokens):
        for i in range(0, len(requests), 4):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            batch = requests[i : i + 4]
            self.asked += [request.id for request in batch]
            yield [(request, [self.text(request, picks) for picks in request.picks]) for request in batch]

    def text(self, request, picks):
        if "Describe" in request.text:
            return f"{request.video} at {picks[0]}."
        return "B." if number(f"{request.text} {picks.tolist()}") % 2 else "A."


def unwatched(stage, total, done):
    return lambda count: None


def run(annotations, store, output, answerer=None, shard=None, **settings):
    answerer = answerer or FakeAnswerer()
    settings = Settings(**settings)
    return build(annotations, store, output, settings, answerer, answerer, unwatched, shard or Shard()), answerer


def rows(path):
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_every_stage_keeps_what_it_should(annotations, store, tmp_path):
    result, _ = run(annotations, store, tmp_path, frame_sets=3, set_frames=8, heldout=0.3)
    flat, few, many, random = (rows(tmp_path / f"{n}.jsonl") for n in ("1_flat", "2_few", "3_many", "4_random"))
    assert len(flat) == 24 and flat.keys() == few.keys() and result["videos_not_in_store"] == ["b/gone.mp4"]
    assert many.keys() == {name for name, row in few.items() if row["rewards"] == [0.0]}
    assert random.keys() == {name for name, row in many.items() if row["rewards"] == [1.0]}
    assert all(len(row["answers"]) == 3 for row in random.values())
    kept = {name for name, row in random.items() if len(set(row["rewards"])) == 2}
    assert 0 < len(kept) < len(random) < len(many) < 24
    train, heldout = rows(tmp_path / "train.jsonl"), rows(tmp_path / "heldout.jsonl")
    both = {**train, **heldout}
    assert {name for name, row in both.items() if row["type"] == "general"} == kept
    assert sum(row["type"] == "specific" for row in both.values()) == 12 == len(rows(tmp_path / "6_needle.jsonl"))
    assert heldout and not {row["video"] for row in train.values()} & {row["video"] for row in heldout.values()}
    questions, errors = read_questions(tmp_path / "train.jsonl")
    assert len(questions) == len(train) and not errors
    assert result["counts"]["frame_sensitive"] == len(kept) and len(result["sha256"]) == 8


def test_needle_items_are_about_their_target(annotations, store, tmp_path):
    run(annotations, store, tmp_path)
    for line in rows(tmp_path / "6_needle.jsonl").values():
        question = question_of_row(line, 0, "x", None)
        of_target = [option.startswith(f"{question.video} at") for option in question.options]
        assert of_target.index(True) == "ABCD".index(question.answer) and sum(of_target) == 1
        assert question.video in question.query


def test_resumed_after_a_kill_at_any_batch(annotations, store, tmp_path):
    whole, answerer = run(annotations, store, tmp_path / "whole", frame_sets=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for stop in range(4, len(answerer.asked), 16):
        output = tmp_path / str(stop)
        first, second = FakeAnswerer(stop), FakeAnswerer()
        with pytest.raises(KeyboardInterrupt):
            run(annotations, store, output, first, frame_sets=2)
        with sorted(output.glob("[2-5]_*.jsonl"))[-1].open("a") as file:
            file.write('{"id": "cut o')
        again, _ = run(annotations, store, output, second, frame_sets=2)
        assert len(first.asked) + len(second.asked) == len(answerer.asked) and again == whole
        assert {path.name: path.read_bytes() for path in output.iterdir()} == files
        assert not run(annotations, store, output, frame_sets=2)[1].asked


def test_shards_make_the_same_set(annotations, store, tmp_path):
    whole, alone = run(annotations, store, tmp_path / "whole", frame_sets=2)
    asked, output = [], tmp_path / "out"
    for shard in (Shard(i, 3) for i in range(3)):
        folder, answerer = shard.path(output, "shard"), FakeAnswerer(8 if shard.index == 2 else None)
        write_run_config(folder, {"seed": 0})
        with contextlib.suppress(KeyboardInterrupt):  # the last one is killed
            run(annotations, store, folder, answerer, shard, frame_sets=2)
        asked += answerer.asked
    with pytest.raises(RunFolderError, match="seed: 0 there, 1 here"):
        join_shards(output, {"seed": 1}, ())
    with in_use(output / "shard-00001-of-00003"), pytest.raises(RunFolderError, match="00001-of-00003 is in use"):
        join_shards(output, {"seed": 0}, ())
    for _ in range(2):
        join_shards(output, {"seed": 0}, ())
    joined, answerer = run(annotations, store, output, frame_sets=2)
    assert answerer.asked and sorted(asked + answerer.asked) == sorted(alone.asked)
    assert joined["counts"] == whole["counts"]
    for name in ("1_flat", "6_needle", "train", "heldout"):
        assert (output / f"{name}.jsonl").read_bytes() == (tmp_path / "whole" / f"{name}.jsonl").read_bytes()


def test_numbers_of_questions(annotations, store, tmp_path):
    result, _ = run(annotations, store, tmp_path, num_general=2, num_specific=3, num_targets=6, heldout=0.0)
    assert result["counts"]["train_general"] == 2 and result["counts"]["train_specific"] == 3
    assert result["counts"]["needle_questions"] == 6 and result["counts"]["heldout_general"] == 0


def test_question_files_are_filtered_too(store, annotations, tmp_path):
    run(annotations, store, tmp_path / "a")
    result, _ = run([tmp_path / "a" / "1_flat.jsonl"], store, tmp_path / "b")
    assert result["counts"]["of_long_enough_videos"] == 24
    with pytest.raises(QuestionError, match="is a file or its name there twice"):
        run([tmp_path / "a" / "1_flat.jsonl"] * 2, store, tmp_path / "c")


def test_answers_to_other_questions_are_not_taken(annotations, store, tmp_path):
    run(annotations, store, tmp_path / "out", shard=Shard(0, 2))
    edited = tmp_path / annotations[0].name
    edited.write_text(annotations[0].read_text().replace("Question 0 of 0.mp4?", "Another question"))
    with pytest.raises(QuestionError, match=r"other questions than now had the ids b/0.mp4#0; use another --output"):
        run([edited], store, tmp_path / "out")


def test_no_usable_video(annotations, store, tmp_path):
    with pytest.raises(StoreError, match=r"none of 28 questions .* over 100 s; not in the store: b/gone.mp4"):
        run(annotations, store, tmp_path, min_seconds=100.0)


def test_random_frames(store):
    question = question_of_row(
        {"video": "v", "original_question": "q\nA. x\nB. y", "solution": "a", "type": "general"}, 0, "id", None
    )
    picks = random_picks(5, 8, 0)(question, 100)
    assert picks.shape == (5, 8) and (np.diff(picks) > 0).all() and len({tuple(p) for p in picks}) == 5
    np.testing.assert_array_equal(picks, random_picks(5, 8, 0)(question, 100))
    assert random_picks(2, 8, 0)(question, 5).shape == (2, 5)
    for request in event_requests(list(LENGTHS), store, Settings(events=4)):
        assert request.picks.min() >= 0 and request.picks.max() < LENGTHS[request.video]
        assert (np.diff(request.picks) == 1).all() and request.picks.shape == (1, min(8, request.picks.size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_sets": 1}, "cannot vary"),
        ({"events": 0}, "at least 1"),
        ({"heldout": 1.0}, "share"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**(vars(Settings()) | change))


def command(*args):
    done = subprocess.run(
        [sys.executable, "-m", "tspo_jax.build_dataset", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


@pytest.mark.slow
def test_whole_command_with_a_tiny_answerer(golden, tmp_path):
    """The answerer is random: every stage runs, resumes and leaves its file, whatever it keeps."""
    folder = make_store(tmp_path, golden)
    lines = [record(f"r{i}", (LONG, SHORT)[i % 2], turns=1) for i in range(4)]
    lines += [record("bad", "/x.mp4"), record("gone", "gone.mp4")]
    text = json.dumps([line | {"data_source": "."} for line in lines])
    (tmp_path / "x_mc_.json").write_text(text)
    arguments = (
        f"--annotations={tmp_path / 'x_mc_.json'}",
        f"--store={folder}",
        f"--answerer={golden / 'llava_video_grid'}",
        f"--adapter={golden / 'lora_peft'}",
        f"--output={tmp_path / 'out'}",
        "--min_seconds=3", "--few_frames=1", "--many_frames=2", "--event_frames=2", "--events=2",
        "--batch_size=4", "--model_axis=2", "--max_new_tokens=2", "--caption_tokens=3", "--max_bad=0.2",
    )  # fmt: skip
    with in_use(tmp_path / "out"):
        status, result, errors = command(*arguments)
    assert status == 1 and result is None and f"{tmp_path / 'out'} is in use by process {os.getpid()}" in errors
    status, result, errors = command(*arguments)
    assert status == 2 and "record 5: video: " in errors and "1 video(s) not in the store: gone.mp4" in errors, errors
    assert result["counts"]["of_long_enough_videos"] == 4 and result["counts"]["events_described"] == 4
    assert "Traceback" not in errors and "4" in (tmp_path / "out" / "README.md").read_text()
    assert " with adapters " in result["answerer"] and result["captioner"] == result["answerer"]
    assert command(*arguments)[1] == result
    status, _, errors = command(*arguments, "--batch_size=3")
    assert status == 1 and "batch_size is 3: it must be a multiple of mesh axis data (4)" in errors
    status, _, errors = command(*arguments, "--few_frames=4", "--adapter=")
    assert status == 1 and "few_frames: 1 there, 4 here" in errors
    assert f"answerer: {result['answerer']} there, {result['answerer'].split()[0]} here" in errors
    for more, share in (("--strict", "0%"), ("--max_bad=0.1", "10%")):
        status, _, errors = command(*arguments, more)
        assert status == 1 and "Traceback" not in errors
        assert f"1 bad question(s) of 7, above max_bad = {share}" in errors
