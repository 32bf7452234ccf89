"""Strategies with a real answerer on stored videos and on files, by the command line too."""

import json
import subprocess
import sys

import pytest
from tiny_store import LONG, SHORT, make_store

from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import Settings
from tspo_jax.answering.calls import CaptionCall
from tspo_jax.answering.clip_captions import StoredClips
from tspo_jax.answering.own_models import default_mesh
from tspo_jax.answering.strategies import VideoFiles, WriterOptions, answer_questions, facts
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.data.frame_store import FrameStore

QUESTIONS = [Asked("a", LONG, "What is shown?", ("one", "two")), Asked("b", SHORT, "Who is it?")]
SETTINGS = Settings(windows=(20.0, 5.0, 1.0), rounds=1)


def sure(prompts):
    """A writer that is sure of option B."""
    return ['{"Confidence": true, "Answer": "B"}'] * len(prompts)


@pytest.fixture(scope="module")
def answerer(golden):
    return load_answerer(golden / "llava_video_grid")


@pytest.fixture(scope="module")
def store(tmp_path_factory, golden):
    return FrameStore(make_store(tmp_path_factory.mktemp("strategies"), golden))


def asked(strategy, videos, answerer, calls_file=None, writer=None, **options):
    writer = writer or WriterOptions(max_new_tokens=8)
    options = {"caption_tokens": 4, "batch_size": 4, **options}
    outcomes = answer_questions(
        strategy, QUESTIONS, videos, answerer, SETTINGS, writer, default_mesh(), calls_file=calls_file, **options
    )
    return {one.id: one for one in outcomes}


@pytest.mark.slow
def test_a_random_answerer_is_never_sure_and_resumes(store, answerer, tmp_path):
    made = []
    first = asked("backtrack", store, answerer, tmp_path / "calls.jsonl", report=lambda calls: made.append(calls.made))
    assert {one.phase for one in first.values()} <= {"forced", "rounds", "coarse"}
    assert first["a"].captions > 2 and first["a"].option in ("A", "B")
    again = asked("backtrack", store, answerer, tmp_path / "calls.jsonl", report=lambda calls: made.append(calls.made))
    assert again == first and sum(made[1].values()) == 0 < sum(made[0].values())


@pytest.mark.slow
def test_flat_and_a_writer_of_the_user(store, answerer):
    writer = WriterOptions(name=f"{__name__}:sure", max_new_tokens=8)
    assert asked("flat", store, answerer, writer=writer)["a"].option == "B"
    one = asked("backtrack", store, answerer, writer=writer)["a"]
    assert (one.phase, one.option, one.captions, one.writer_calls) == ("coarse", "B", 2, 1)


@pytest.mark.slow
def test_swinbert_captions_the_clips(golden, store, answerer, tmp_path):
    calls, folder = tmp_path / "calls.jsonl", golden / "swinbert_tiny"
    writer = WriterOptions(name=f"{__name__}:sure", max_new_tokens=8)
    one = asked("flat", store, answerer, calls, writer=writer, captioner=str(folder))["a"]
    rows = [json.loads(line) for line in calls.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "caption" and row["video"] == LONG]
    made = [CaptionCall(LONG, tuple(row["times"]), row["max_pixels"], row["instruction"]) for row in rows]
    said = StoredClips(load_captioner(folder), store).describe(made)
    assert one.captions == len(rows) == 2 and [row["text"] for row in rows] == [reply.text for reply in said]


def test_a_file_is_shown_at_its_own_rate(golden, store):
    files = VideoFiles({LONG: golden / LONG})
    assert files.video(LONG).num_frames == store.video(LONG).num_video_frames
    assert facts(files, LONG).fps == pytest.approx(store.video(LONG).fps)
    assert facts(store, LONG).fps == 1.0
    assert facts(files, LONG).duration == pytest.approx(facts(store, LONG).duration)
    assert facts(files, LONG).identity != facts(store, LONG).identity
    assert LONG in files and SHORT not in files
    assert files.frames(LONG, [0, 30, 30]).shape[0] == 3


def command(golden, *more):
    arguments = ["--answerer", golden / "llava_video_grid", "--video", golden / LONG, "--max_new_tokens=4", *more]
    return subprocess.run(
        [sys.executable, "-m", "tspo_jax.answer", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_by_the_command_line(golden, tmp_path):
    page, calls = tmp_path / "trace.html", tmp_path / "calls.jsonl"
    done = command(
        golden, "--question=What is it?\nA. one\nB. two", "--strategy=flat", f"--page={page}", f"--calls={calls}",
        "--windows=20,5,1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["phase"] == "flat" and result["captions"] == 2 and len(result["trace"]) >= 2
    assert len(calls.read_text().splitlines()) >= 3 and "What is it?" in page.read_text()


@pytest.mark.slow
def test_a_folder_with_a_video_that_cannot_be_read(golden, tmp_path):
    for name, size in (("good.mp4", None), ("bad.mp4", 2000)):
        (tmp_path / name).write_bytes((golden / "tspo_agent.mp4").read_bytes()[:size])
    done = command(golden, "--question=Why?", f"--video={tmp_path}", "--strategy=flat", "--windows=20,5,1")
    assert done.returncode == 2 and done.stderr.startswith(f"left out: {tmp_path}/bad.mp4"), done.stderr
    assert [one["video"] for one in json.loads(done.stdout)["answers"]] == ["good.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--strategy=backtrack", "--max_captions=0"), "captions is 0"),
        (("--strategy=flat", "--agent=x"), "without --frames, --agent"),
        (("--windows=1,2", "--strategy=flat"), "--windows=1,2"),
        (("--strategy=flat", "--writer=no"), "neither module:function"),
    ],
)
def test_flags_that_make_no_sense(golden, flags, message):
    done = command(golden, "--question=Why?", *flags)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
