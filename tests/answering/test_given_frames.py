"""Answers by the command line: the original's tokens, frames from a video, and bad input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_store
from PIL import Image

from tspo_jax.answering import prompts
from tspo_jax.answering.given_frames import answer, read_frames
from tspo_jax.answering.rollout import Answers, Rollout
from tspo_jax.checkpoints.folders import Generation, load_answerer
from tspo_jax.selection.choosing import choose
from tspo_jax.selection.scoring import load_scorer
from tspo_jax.selection.video_source import file_source

QUESTION = "Who opens the door?\nA. The cat\nB. A dog"


def start(*more, **options):
    command = [sys.executable, "-m", "tspo_jax.answer", *(f"--{k}={v}" for k, v in options.items()), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def answerer(golden):
    return load_answerer(golden / "llava_video_grid")


@pytest.mark.slow
def test_tokens_of_the_original_by_the_command_line(golden, tmp_path):
    runs = []
    for name in ("llava_video_grid", "llava_video_one_token"):
        arrays = np.load(golden / f"{name}.npz")
        for case in json.loads(str(arrays["meta"])):
            stem = f"{name}_{case['case']}"
            np.savez(tmp_path / f"{stem}.npz", frames=arrays[f"case{case['case']}/frames"])
            process = start(
                answerer=golden / name,
                frames=tmp_path / f"{stem}.npz",
                question=case["question"],
                max_new_tokens=6,
                output=tmp_path / f"{stem}.json",
            )
            runs.append((process, tmp_path / f"{stem}.json", case, arrays[f"case{case['case']}/generated"]))
    assert len(runs) == 3
    for process, output, case, generated in runs:
        assert finished(process) == ""
        result = json.loads(output.read_text())
        assert result.keys() == {"answer", "token_ids", "option", "prompt", "num_visual_tokens", "frame_idx"}
        assert result["token_ids"] == generated.tolist()
        assert result["prompt"] == case["prompt"]
        assert result["num_visual_tokens"] == case["visual_tokens"]
        assert result["frame_idx"] is None


@pytest.mark.slow
def test_frames_of_a_video_by_the_command_line(golden):
    shared = dict(answerer=golden / "llava_video_one_token", video=golden / "tspo_agent.mp4", max_new_tokens=2)
    chosen = start(**shared, question=QUESTION, agent=golden / "tspo_agent", method="bin-max")
    spaced = start(**shared, question=QUESTION, num_frames=3, template="chatml_direct", suffix="")
    arrays = np.load(golden / "tspo_agent.npz")
    result = json.loads(finished(chosen))
    assert len(result["frame_idx"]) == 16 and set(result["frame_idx"]) <= set(arrays["candidate_idx"].tolist())
    result = json.loads(finished(spaced))
    assert result["frame_idx"] == [0, 475, 975]
    assert result["prompt"] == prompts.render(QUESTION, "chatml_direct", "")
    assert len(result["token_ids"]) == 2 and result["num_visual_tokens"] == 3 * 9 + 1


def test_agent_chooses_the_frames_of_the_original(golden):
    arrays = np.load(golden / "tspo_agent.npz")
    scorer = load_scorer(golden / "tspo_agent")
    source = file_source(golden / "tspo_agent.mp4", "v", scorer.clip)
    for case in json.loads(str(arrays["meta"])):
        question = f"{case['question']}\nA. One\nB. Two"  # the agent does not read the options
        for method in case["methods"]:
            picks = choose(source, scorer, question, 16, method)
            assert source.frame_idx[picks].tolist() == arrays[f"case{case['case']}/{method}"].tolist()


def test_answer_is_read_up_to_its_end_token(answerer):
    tokens = answerer.tokenizer("B.<|im_end|>AAA")["input_ids"]
    answers = Answers(np.array(tokens)[None, None], np.array([[3]]), np.array(3), None, None)

    class Said:
        max_new_tokens = 5

        def __call__(self, *_):
            return answers

    result = answer(answerer, Said(), [np.zeros((9, 9, 3), np.uint8)], prompts.render(QUESTION))
    assert (result["answer"], result["option"], result["token_ids"]) == ("B.", "B", tokens[:3])


def test_repetition_penalty_is_that_of_generation_config(golden, tmp_path, answerer):
    folder = shutil.copytree(golden / "llava_video_grid", tmp_path / "answerer")
    config = json.loads((folder / "config.json").read_text()) | {"repetition_penalty": 3.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_answerer(folder).generation == answerer.generation
    assert answerer.generation.repetition_penalty == 1.0
    settings = {"repetition_penalty": 1.05, "eos_token_id": [256, 257], "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert load_answerer(folder).generation == Generation((256, 257), 257, 1.05)


def test_pictures_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    shades = {"b.png": 200, "a.jpg": 100, "c.PNG": 50}
    for name, shade in shades.items():
        Image.new("L", (8, 6), shade).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    frames, times = read_frames(tmp_path)
    assert times is None
    assert [frame.shape for frame in frames] == [(6, 8, 3)] * 3
    assert [frame[0, 0, 0] for frame in frames] == [100, 200, 50]


def test_unusable_frames_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture"):
        read_frames(tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="broken.png is not a readable picture"):
        read_frames(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="none.npz: no such file or folder"):
        read_frames(tmp_path / "none.npz")
    for content in (b"", b"text", b"PK\x03\x04 cut"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match="broken.npz is not a readable npz file"):
            read_frames(tmp_path / "broken.npz")
    np.save(tmp_path / "array.npy", np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="array.npy is not a readable npz file"):
        read_frames(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(ValueError, match="no array `frames`"):
        read_frames(tmp_path / "other.npz")
    for frames in (np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)):
        np.savez(tmp_path / "wrong.npz", frames=frames)
        with pytest.raises(ValueError, match=r"not uint8 \[K, H, W, 3\]"):
            read_frames(tmp_path / "wrong.npz")


@pytest.mark.slow
def test_bad_input_is_one_line_and_no_traceback(golden, tmp_path):
    good = dict(answerer=golden / "llava_video_grid", question=QUESTION)
    video = dict(video=golden / "tspo_agent.mp4")
    bad = [
        (good, "--video or --frames"),
        (good | video | dict(method="aks"), "--method=aks needs an --agent"),
        (good | video | dict(answerer=golden / "tspo_agent"), "model_type 'clip' is not supported"),
        (good | video | dict(question=f"<image>\n{QUESTION}"), "<image>"),
    ]
    processes = [start(**options) for options, _ in bad]
    for process, (_, message) in zip(processes, bad, strict=True):
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_many_questions_give_a_page_and_pictures(golden, tmp_path):
    """Of a folder; each answer is that of the question alone."""
    (tmp_path / "videos").mkdir()
    shutil.copy(golden / "tspo_agent.mp4", tmp_path / "videos" / "v.mp4")
    shared = dict(answerer=golden / "llava_video_grid", agent=golden / "tspo_agent", num_frames=3, max_new_tokens=2)
    alone = start(**shared, video=golden / "tspo_agent.mp4", question=QUESTION)
    pictures = dict(page=tmp_path / "page.html", contact_sheet=tmp_path / "sheet.jpg")
    many = start("--question=Why?", **shared, **pictures, video=tmp_path / "videos", question=QUESTION)
    answers = json.loads(finished(many))["answers"]
    assert [(a["video"], a["question"]) for a in answers] == [("v.mp4", QUESTION), ("v.mp4", "Why?")]
    own = json.loads(finished(alone))
    assert own == {name: answers[0][name] for name in own}
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section>") == 2 and page.count("<img") == 2 * 5 * 3 and "agent, top-k" in page
    assert {path.name for path in tmp_path.glob("sheet*")} == {"sheet_0.jpg", "sheet_1.jpg"}


@pytest.mark.slow
def test_a_video_of_a_store_by_the_command_line(golden, tmp_path):
    """The video files are gone; the frames are those that the store has."""
    tiny_store.make_store(tmp_path, golden)
    (tmp_path / tiny_store.SHORT).unlink()
    shared = dict(answerer=golden / "llava_video_grid", store=tmp_path / "store", max_new_tokens=2, num_frames=3)
    chosen = start(**shared, video=tiny_store.SHORT, question=QUESTION, agent=golden / "tspo_agent")
    spaced = start(**shared, question=QUESTION)
    lost = start(**shared, question=QUESTION, video="lost.mp4")
    result = json.loads(finished(chosen))
    assert len(result["frame_idx"]) == 3 and set(result["frame_idx"]) <= set(range(0, 125, 25))
    answers = json.loads(finished(spaced))["answers"]
    assert [(a["video"], a["frame_idx"]) for a in answers] == [
        (tiny_store.SHORT, [0, 50, 100]),
        (tiny_store.LONG, [0, 475, 975]),
    ]
    _, err = lost.communicate()
    assert lost.returncode == 1 and err.startswith("error: --video: lost.mp4 is not in"), err


@pytest.mark.parametrize("name", [pytest.param("llava_video_grid", marks=pytest.mark.slow), "llava_video_one_token"])
def test_places_for_more_frames_change_no_answer(golden, name):
    """Few programs for all videos and questions, with the tokens of a program for each."""
    answerer = load_answerer(golden / name)
    frames = list(np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3)).astype(np.uint8))
    exact, padded = (Rollout.of(answerer, max_new_tokens=4) for _ in range(2))
    for k, text in ((2, QUESTION), (3, f"Now: {QUESTION}"), (5, "Who?\nA. Cat\nB. Dog")):
        rendered = prompts.render(text)
        alone = answer(answerer, exact, frames[:k], rendered)
        assert answer(answerer, padded, frames[:k], rendered, num_frames=5) == alone
    assert (exact.num_compilations, padded.num_compilations) == (3, 1)
