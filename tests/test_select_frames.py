"""Frames of a video by the command line: the original's picks, every method, CLIP alone, bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tspo_jax.data.decode import Video
from tspo_jax.scoring import load_scorer
from tspo_jax.select_frames import select_frames


@pytest.fixture(scope="module")
def scorer(golden):
    return load_scorer(golden / "tspo_agent")


@pytest.fixture(scope="module")
def cases(golden):
    arrays = np.load(golden / "tspo_agent.npz")
    return [(case, arrays) for case in json.loads(str(arrays["meta"]))]


def start(**options):
    command = [sys.executable, "-m", "tspo_jax.select_frames", *(f"--{k}={v}" for k, v in options.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("method", ["topk", "bin-max", "aks"])
def test_frames_of_the_original(golden, scorer, cases, number, method):
    case, arrays = cases[number]
    video = Video(golden / "tspo_agent.mp4")
    result = select_frames(scorer, video, case["question"], case["k"], method)
    assert result["frame_idx"] == arrays[f"case{number}/{method}"].tolist()
    assert result["candidate_idx"] == arrays["candidate_idx"].tolist()
    np.testing.assert_allclose(result["scores"], arrays[f"case{number}/scores"], atol=1e-4)
    np.testing.assert_allclose(result["clip_scores"], arrays[f"case{number}/clip_scores"], atol=1e-5)
    np.testing.assert_allclose(result["timestamps"], np.array(result["frame_idx"]) / 25, atol=1e-9)


def test_command_line(golden, cases, plain_clip, tmp_path):
    case, arrays = cases[0]
    shared = dict(video=golden / "tspo_agent.mp4", question=case["question"])
    to_file = start(
        agent=golden / "tspo_agent",
        method="bin-max",
        window=12,
        output=tmp_path / "new" / "picks.json",
        contact_sheet=tmp_path / "sheet.jpg",
        **shared,
    )
    to_stdout = start(agent=plain_clip, method="clip-topk", num_frames=4, **shared)
    out, err = to_file.communicate()
    assert to_file.returncode == 0, err
    assert out == ""
    result = json.loads((tmp_path / "new" / "picks.json").read_text())
    assert result["frame_idx"] == arrays["case0/bin-max"].tolist()
    assert (result["fps"], result["num_video_frames"], result["method"]) == (25.0, 1000, "bin-max")
    assert result["decoder"].split()[0] in ("decord", "pyav")
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 4 * 300 and sheet.height > sheet.width // 2

    out, err = to_stdout.communicate()
    assert to_stdout.returncode == 0, err
    result = json.loads(out)
    best = np.sort(np.argsort(-arrays["case0/clip_scores"])[:4])
    assert result["frame_idx"] == arrays["candidate_idx"][best].tolist()
    assert result["scores"] is None and len(result["clip_scores"]) == 40


def test_fewer_candidates_than_frames_gives_all_of_them(golden, scorer):
    video = Video(golden / "tspo_agent.mp4")
    for method in ("topk", "bin-max", "aks", "uniform", "clip-topk"):
        result = select_frames(scorer, video, "Why?", 64, method)
        assert result["frame_idx"] == result["candidate_idx"]


def test_clip_alone_selects_uniformly_but_not_by_an_agent(golden, plain_clip):
    clip_only, video = load_scorer(plain_clip), Video(golden / "tspo_agent.mp4")
    assert select_frames(clip_only, video, "Why?", 4, "uniform")["frame_idx"] == [0, 325, 650, 975]
    for method in ("topk", "bin-max", "aks"):
        with pytest.raises(ValueError, match=f"holds no temporal agent.*method {method}"):
            select_frames(clip_only, video, "Why?", 4, method)


def test_agent_does_not_read_the_options(golden, scorer):
    video = Video(golden / "tspo_agent.mp4")
    stem = select_frames(scorer, video, "Who opens the door?", 8, "topk")
    assert stem == select_frames(scorer, video, "Who opens the door?\nA. The cat\nB. A dog", 8, "topk")
    assert stem["scores"] != select_frames(scorer, video, "Who opens the door? A. The cat", 8, "topk")["scores"]


def test_bad_input_is_one_line_and_no_traceback(golden, tmp_path):
    (tmp_path / "config.json").write_text("{")
    good = dict(agent=golden / "tspo_agent", video=golden / "tspo_agent.mp4", question="Why?")
    bad = [
        (good | dict(video=tmp_path / "none.mp4"), "none.mp4: no such file"),
        (good | dict(agent=tmp_path), "config.json: not valid json"),
        (good | dict(num_frames=0), "--num_frames"),
        (good | dict(frames=4), "'frames'"),
        (dict(video=good["video"], question="Why?"), "--agent"),
    ]
    processes = [start(**options) for options, _ in bad]
    for process, (_, message) in zip(processes, bad, strict=True):
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_unusable_folders_and_questions_are_named(golden, scorer):
    with pytest.raises(ValueError, match="llava_video_grid/config.json: model_type is 'llava_qwen', not clip"):
        load_scorer(golden / "llava_video_grid")
    with pytest.raises(ValueError, match="question is empty"):
        select_frames(scorer, Video(golden / "tspo_agent.mp4"), " \n", 4, "topk")
