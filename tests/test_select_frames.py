"""Frames of a video by the command line: the original's picks, every method, CLIP alone, bad input."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_store
from PIL import Image

from tspo_jax.data.decode import DECODERS, Video
from tspo_jax.selection.choosing import select_frames
from tspo_jax.selection.scoring import encode_video, load_scorer


@pytest.fixture(scope="module")
def scorer(golden):
    return load_scorer(golden / "tspo_agent")


@pytest.fixture(scope="module")
def cases(golden):
    arrays = np.load(golden / "tspo_agent.npz")
    return [(case, arrays) for case in json.loads(str(arrays["meta"]))]


@pytest.fixture(scope="module")
def candidates(golden, scorer):
    return encode_video(Video(golden / "tspo_agent.mp4"), scorer.clip)


def start(*more, **options):
    command = [sys.executable, "-m", "tspo_jax.select_frames", *(f"--{k}={v}" for k, v in options.items()), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("method", ["topk", "bin-max", "aks"])
def test_frames_of_the_original(scorer, candidates, cases, number, method):
    case, arrays = cases[number]
    result = select_frames(scorer, candidates, case["question"], case["k"], method)
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
        frames_dir=tmp_path / "frames",
        **shared,
    )
    to_stdout = start(agent=plain_clip, method="clip-topk", num_frames=4, **shared)
    out, err = to_file.communicate()
    assert to_file.returncode == 0, err
    assert out == ""
    result = json.loads((tmp_path / "new" / "picks.json").read_text())
    assert result["frame_idx"] == arrays["case0/bin-max"].tolist()
    assert (result["fps"], result["num_video_frames"], result["method"]) == (25.0, 1000, "bin-max")
    assert result["decoder"].split()[0] in DECODERS
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 4 * 300 and sheet.height > sheet.width // 2
    manifest = json.loads((tmp_path / "frames" / "manifest.json").read_text())
    assert [row["frame_idx"] for row in manifest["frames"]] == result["frame_idx"]
    assert len(list((tmp_path / "frames").glob("*.jpg"))) == len(result["frame_idx"])

    out, err = to_stdout.communicate()
    assert to_stdout.returncode == 0, err
    result = json.loads(out)
    best = np.sort(np.argsort(-arrays["case0/clip_scores"])[:4])
    assert result["frame_idx"] == arrays["candidate_idx"][best].tolist()
    assert result["scores"] is None and len(result["clip_scores"]) == 40


def test_fewer_candidates_than_frames_gives_all_of_them(scorer, candidates):
    for method in ("topk", "bin-max", "aks", "uniform", "clip-topk"):
        result = select_frames(scorer, candidates, "Why?", 64, method)
        assert result["frame_idx"] == result["candidate_idx"]


def test_clip_alone_selects_uniformly_but_not_by_an_agent(candidates, plain_clip):
    clip_only = load_scorer(plain_clip)
    assert select_frames(clip_only, candidates, "Why?", 4, "uniform")["frame_idx"] == [0, 325, 650, 975]
    for method in ("topk", "bin-max", "aks"):
        with pytest.raises(ValueError, match=f"holds no temporal agent.*method {method}"):
            select_frames(clip_only, candidates, "Why?", 4, method)


def test_agent_does_not_read_the_options(scorer, candidates):
    stem = select_frames(scorer, candidates, "Who opens the door?", 8, "topk")
    assert stem == select_frames(scorer, candidates, "Who opens the door?\nA. The cat\nB. A dog", 8, "topk")
    assert stem["scores"] != select_frames(scorer, candidates, "Who opens the door? A. The cat", 8, "topk")["scores"]


def test_bad_input_is_one_line_and_no_traceback(golden, tmp_path):
    (tmp_path / "config.json").write_text("{")
    good = dict(agent=golden / "tspo_agent", video=golden / "tspo_agent.mp4", question="Why?")
    bad = [
        (good | dict(video=tmp_path / "none.mp4"), "none.mp4: no such file"),
        (good | dict(agent=tmp_path), "config.json: not valid json"),
        (good | dict(num_frames=0), "--num_frames"),
        (good | dict(frames=4), "'frames'"),
        (dict(video=good["video"], question="Why?"), "--agent"),
        (good | dict(num_shards=2, shard_index=0), "--num_shards shares the videos of a folder"),
    ]
    processes = [start(**options) for options, _ in bad]
    for process, (_, message) in zip(processes, bad, strict=True):
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_unusable_folders_and_questions_are_named(golden, scorer, candidates):
    with pytest.raises(ValueError, match="llava_video_grid/config.json: model_type is 'llava_qwen', not clip"):
        load_scorer(golden / "llava_video_grid")
    with pytest.raises(ValueError, match="question is empty"):
        select_frames(scorer, candidates, " \n", 4, "topk")


@pytest.mark.slow
def test_many_questions_about_a_folder(golden, tmp_path):
    """One line per question in the neutral form, pictures and a page for each; a store, shared by two runs, gives the
    same frames. A broken file costs itself."""
    tiny_store.make_store(tmp_path, golden)
    (tmp_path / "videos").mkdir()
    for path in (golden / tiny_store.LONG, tmp_path / tiny_store.SHORT):
        (tmp_path / "videos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    shared = dict(agent=golden / "tspo_agent", num_frames=4)
    asked = "--question=Who opens the door?", "--question=Why?\nA. So\nB. Not so"
    from_files = start(
        *asked, video=tmp_path / "videos", output=tmp_path / "files.jsonl", page=tmp_path / "p.html", **shared
    )
    from_store = dict(store=tmp_path / "store", output=tmp_path / "store.jsonl", num_shards=2) | shared
    runs = [(from_files, 2, ["broken.mp4"])] + [(start(*asked, shard_index=i, **from_store), 0, []) for i in range(2)]
    for process, status, left_out in runs:
        out, err = process.communicate()
        assert (process.returncode, out) == (status, ""), err
        assert re.findall(r"left out: .*/(\S+): ", err) == left_out
    names = "files.jsonl", "store-00000-of-00002.jsonl", "store-00001-of-00002.jsonl"
    rows, *shares = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names)
    stored = [row for share in shares for row in share]
    assert [row["video_id"] for row in rows] == [tiny_store.SHORT] * 2 + [tiny_store.LONG] * 2
    assert all(len(row["frame_idx"]) == len(row["scores"]) == 4 and row["method"] == "topk" for row in rows)
    assert [row["frame_idx"] for row in rows] == [row["frame_idx"] for row in stored]
    page = (tmp_path / "p_3.html").read_text()
    assert page.count("<img") == 5 * 4 and "CLIP similarity" in page and "agent, bin-max" in page
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


@pytest.mark.slow
def test_search_by_the_command_line(golden, tmp_path):
    """T* needs no agent; a question whose objects nobody names, or a folder that is no detector, is one line."""
    shared = dict(video=golden / "tspo_agent.mp4", question="Where?", method="tstar", num_frames=4)
    good = shared | dict(detector=golden / "owlvit_tiny", targets="red ball,dog", cues="lawn", search_budget=0.5)
    bad = [
        (shared | dict(targets="dog"), "--method=tstar needs a --detector"),
        (shared | dict(detector=golden / "owlvit_tiny"), "needs --targets, or an --answerer"),
        (good | dict(adapter="x"), "--adapter needs the --answerer that it is for"),
        (shared | dict(detector=golden / "tspo_agent", targets="dog"), "model_type is 'clip', not owlvit"),
        (good | dict(search_budget=-1), "share is -1.0"),
    ]
    found = start(contact_sheet=tmp_path / "sheet.jpg", **good)
    processes = [start(**options) for options, _ in bad]
    out, err = found.communicate()
    assert found.returncode == 0, err
    result = json.loads(out)
    assert result["method"] == "tstar" and len(result["frame_idx"]) == 4 and result["clip_scores"] is None
    assert result["searched"]["frames"] <= 20 and result["searched"]["rounds"] >= 1
    assert result["searched"]["targets"] == ["red ball", "dog"] and (tmp_path / "sheet.jpg").is_file()
    for process, (_, message) in zip(processes, bad, strict=True):
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
